"""Paged attention by the native CPU kernel. What it computes is written down in ``torch_backend``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..batch import Batch
from ..kv_cache import KVCache
from ..kv_numbers import Numbers
from ..layers.rope import tables
from ..models.spec import ModelSpec, RopeSpec
from ..native.library import MAX_HEAD_DIM, Library
from .native_work import NEVER, QUERY_ROWS, SPLIT_TOKENS, plan_work


def unsupported(spec: ModelSpec) -> str | None:
    """What the kernel lacks for this model, if anything."""
    if spec.head_dim > MAX_HEAD_DIM:
        return f"head_dim {spec.head_dim} is above {MAX_HEAD_DIM}"
    if spec.head_dim % 2 and any(spec.ropes):
        return f"head_dim {spec.head_dim} is odd, and has halves to rotate"
    return None


class NativeAttention:
    """Keys and values in the kernel's block layout; a work item: sequence, tile of queries, run of keys."""

    name = "cpu"
    graphs = False

    def __init__(
        self,
        spec: ModelSpec,
        block_size: int,
        max_len: int,
        library: Library,
        *,
        uniform: bool = False,
        share: bool = True,
        numbers: Numbers | None = None,
    ) -> None:
        """``uniform``: the same sums for a row whether it is decoded or part of a prefill, and whoever is in
        the batch. ``share``: rows that begin alike read their common keys together.

        ``numbers``: keys and values in fewer bits.
        """
        assert block_size % library.lanes == 0, f"block size {block_size} is no multiple of {library.lanes}"
        self.spec, self.block_size, self._lib = spec, block_size, library
        kinds = list(dict.fromkeys(spec.ropes))
        self._kinds = [kinds.index(rope) for rope in spec.ropes]
        self._angles = [_angles(rope, spec.head_dim, max_len) for rope in kinds]
        self._turning = [rope is not None for rope in kinds]
        self._padded = -(-spec.head_dim // library.lanes) * library.lanes
        self._slopes = torch.tensor(spec.alibi, dtype=torch.float32)
        self._scoring = (spec.scale, spec.softcap or 0.0, self._slopes.data_ptr() if spec.alibi else None)
        self._windows = [window or 0 for window in spec.windows]
        self._shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, block_size, library.threads)
        self._split = NEVER if uniform else SPLIT_TOKENS
        self._share = share and not uniform
        self._kind = numbers.kernel if numbers else 0
        self._tile = max(1, QUERY_ROWS // spec.group)

    def block_shape(self) -> tuple[int, ...]:
        return (self.spec.num_kv_heads, self.block_size * self._padded)

    def use(self, cache: KVCache) -> None:
        self._cache = cache
        self._places = [(k.data_ptr(), v.data_ptr()) for k, v in zip(cache.keys, cache.values, strict=True)]
        scales = zip(cache.key_scales, cache.value_scales, strict=True)
        self._scales = [(k.data_ptr(), v.data_ptr()) for k, v in scales] or [(None, None)] * len(cache.keys)

    def begin(self, batch: Batch) -> None:
        work = plan_work(batch, self.block_size, self._tile, split=self._split, share=self._share)
        self._scratch = torch.empty(work.parts * self.spec.num_heads * (self._padded + 2))
        self._tables = batch.tables
        self._batch, self._work = batch, work  # own the memory behind the pointers below
        positions = batch.positions
        self._nowhere = positions if all(self._turning) else torch.zeros_like(positions)
        self._where = [
            (
                batch.slots.data_ptr(),
                (positions if turning else self._nowhere).data_ptr(),
                cos.data_ptr(),
                sin.data_ptr(),
            )
            for turning, (cos, sin) in zip(self._turning, self._angles, strict=True)
        ]
        self._plan = (
            work.queries.ctypes.data,
            work.items.ctypes.data,
            len(work.items),
            work.merges.ctypes.data,
            len(work.merges),
            self._tables.ctypes.data,
            self._tables.shape[1],
            self._scratch.data_ptr(),
        )

    def attend(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        assert qkv.is_contiguous()
        assert qkv.dtype == self._lib.dtype
        keys, values = self._places[layer]
        out = qkv.new_empty(len(qkv), self.spec.q_size)
        self._lib.attend_raw(
            self._lib.wide,
            out.data_ptr(),
            qkv.data_ptr(),
            keys,
            values,
            *self._where[self._kinds[layer]],
            None if q_norm is None else q_norm.data_ptr(),
            None if k_norm is None else k_norm.data_ptr(),
            self.spec.norm_eps,
            len(qkv),
            *self._plan,
            self._windows[layer],
            *self._scoring,
            *self._shape,
            self._kind,
            *self._scales[layer],
        )
        return out


def _angles(rope: RopeSpec | None, head_dim: int, max_len: int) -> tuple[Tensor, Tensor]:
    """cos and sin; where nothing turns one row, that of position 0."""
    return tables(rope, head_dim, max_len) if rope else tables(RopeSpec(), head_dim, 1)
