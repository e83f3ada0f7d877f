"""Paged attention by flash-attn 2, where it is installed. Norm, rotation and cache write are our kernel's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, tensor
from ..kv_cache import KVCache
from ..models.spec import ModelSpec
from .rope_store import RopeStore


class Functions(Protocol):
    """What is used of the module ``flash_attn``; shapes and meaning as its documentation has them."""

    def flash_attn_varlen_func(self, *args: Any, **kwargs: Any) -> Tensor: ...
    def flash_attn_with_kvcache(self, *args: Any, **kwargs: Any) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class _Step:
    positions: Tensor
    slots: Tensor
    tables: Tensor
    contexts: Tensor
    """[sequences] int32: keys of each."""
    spans: tuple[Tensor, Tensor, int, int] | None
    """First rows and first keys of sequences, [sequences + 1] int32, and the most of each. None: decode."""


class FlashAttention:
    """One call for any mixture, another for decode, which cuts long contexts for few sequences.

    How it cuts depends on the whole batch: a row's last bits may depend on its neighbours.
    """

    name = "flash"
    graphs = True

    def __init__(
        self, spec: ModelSpec, block_size: int, max_len: int, device: torch.device, functions: Functions
    ) -> None:
        self.spec, self.block_size, self.device, self._functions = spec, block_size, device, functions
        self._rope_store = RopeStore(spec, block_size, max_len, device)
        self._slopes = torch.tensor(spec.alibi, dtype=torch.float32, device=device) if spec.alibi else None

    def block_shape(self) -> tuple[int, ...]:
        return (self.block_size, self.spec.num_kv_heads, self.spec.head_dim)

    def use(self, cache: KVCache) -> None:
        self._cache = cache
        self._rope_store.use(cache)

    def begin(self, batch: Batch) -> None:
        if (frame := batch.frame) is not None:
            self._step = _Step(frame.positions, frame.slots, frame.tables, frame.contexts, None)
            return
        n, contexts = len(batch.counts), batch.contexts.astype(np.int32)
        first_keys = np.concatenate([[0], np.cumsum(contexts)])
        parts = [batch.tables.ravel(), contexts, batch.first_row, [batch.rows], first_keys]
        whole = tensor(np.concatenate(parts).astype(np.int32), self.device)
        tables, lengths = whole[: -3 * n - 2], whole[-3 * n - 2 : -2 * n - 2]
        mixed = (whole[-2 * n - 2 : -n - 1], whole[-n - 1 :], int(batch.counts.max()), int(contexts.max()))
        spans = mixed if batch.rows > n else None
        self._step = _Step(batch.positions, batch.slots, tables.view(n, -1), lengths, spans)

    def attend(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        spec, step, window = self.spec, self._step, self.spec.windows[layer]
        self._rope_store(layer, qkv, step.positions, step.slots, q_norm, k_norm)
        q = qkv[:, : spec.q_size].view(len(qkv), spec.num_heads, spec.head_dim)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        scores: dict[str, Any] = {
            "softmax_scale": spec.scale,
            "causal": True,
            "window_size": (-1, -1) if window is None else (window - 1, 0),
            "softcap": spec.softcap or 0.0,
            "alibi_slopes": self._slopes,
            "block_table": step.tables,
        }
        if step.spans is None:
            out = self._functions.flash_attn_with_kvcache(
                q[:, None], keys, values, cache_seqlens=step.contexts, **scores
            )
        else:
            out = self._functions.flash_attn_varlen_func(q, keys, values, *step.spans, **scores)
        return out.reshape(len(qkv), spec.q_size)
