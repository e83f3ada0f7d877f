"""Paged attention by the native CPU kernel. What it computes is written down in ``torch_backend``."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import Batch, Int32
from ..kv_cache import KVCache
from ..kv_numbers import Numbers
from ..layers.rope import tables
from ..models.spec import ModelSpec, RopeSpec
from ..native.library import MAX_HEAD_DIM, Library

QUERY_ROWS = 48
"""Query rows (tokens x heads of a group) of a prefill work item: they share each key and value read."""
SPLIT_TOKENS = 512
"""A decode row with more keys than this is cut into pieces of this size, computed in parallel and merged.
The cut depends on the row's own length only, so that a sequence's arithmetic is the same in any batch."""
NEVER = 2**31 - 1

ITEM_FIELDS = 7
"""row, tokens, position of the first, block table, first key, end of keys, scratch part (-1: none)."""


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
        numbers: Numbers | None = None,
    ) -> None:
        """``uniform``: the same instructions for a row whether it is decoded or part of a prefill.

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
        self._uniform, self._split = int(uniform), NEVER if uniform else SPLIT_TOKENS
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
        self._items, self._merges, parts = work_items(batch, self._tile, self._split)
        self._scratch = torch.empty(parts * self.spec.num_heads * (self._padded + 2))
        self._tables = batch.tables
        self._batch = batch  # owns the memory behind the pointers below
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
            self._items.ctypes.data,
            len(self._items),
            self._merges.ctypes.data,
            len(self._merges),
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
            self._uniform,
            self._kind,
            *self._scales[layer],
        )
        return out


def _angles(rope: RopeSpec | None, head_dim: int, max_len: int) -> tuple[Tensor, Tensor]:
    """cos and sin; where nothing turns one row, that of position 0."""
    return tables(rope, head_dim, max_len) if rope else tables(RopeSpec(), head_dim, 1)


def work_items(batch: Batch, tile: int, split: int = SPLIT_TOKENS) -> tuple[Int32, Int32, int]:
    """Cut a step into items of the kernel: prefill by tiles of queries, long decode rows by runs of keys.

    Returns items [n, 7], merges [m, 3] (row, first part, parts) and the number of parts in all.
    """
    alone = batch.counts == 1
    if alone.all() and int(batch.starts.max()) < split:
        return _decode_items(batch), np.zeros((0, 3), np.int32), 0
    items: list[tuple[int, ...]] = []
    merges: list[tuple[int, int, int]] = []
    parts = 0
    spans = zip(batch.first_row.tolist(), batch.counts.tolist(), batch.starts.tolist(), strict=True)
    for table, (row, count, start) in enumerate(spans):
        context = start + count
        if count == 1 and context > split:
            cuts = range(0, context, split)
            items += [
                (row, 1, start, table, cut, min(cut + split, context), parts + i)
                for i, cut in enumerate(cuts)
            ]
            merges.append((row, parts, len(cuts)))
            parts += len(cuts)
        else:
            # The last tile sees the most keys: the longest work first.
            items += [
                (row + at, min(tile, count - at), start + at, table, 0, start + min(at + tile, count), -1)
                for at in reversed(range(0, count, tile))
            ]
    return _rows(items, ITEM_FIELDS), _rows(merges, 3), parts


def _decode_items(batch: Batch) -> Int32:
    items = np.zeros((len(batch.counts), ITEM_FIELDS), np.int32)
    items[:, 0] = batch.first_row
    items[:, 1] = 1
    items[:, 2] = batch.starts
    items[:, 3] = np.arange(len(items))
    items[:, 5] = batch.contexts
    items[:, 6] = -1
    return items


def _rows(values: list[tuple[int, ...]], width: int) -> NDArray[np.int32]:
    return np.array(values, np.int32).reshape(-1, width)
