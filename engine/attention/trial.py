"""A step of one attention layer over random numbers: what backends are tried, raced and checked with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, pack
from ..kv_cache import KVCache
from ..kv_numbers import Numbers, dequantize, quantize
from ..models.spec import ModelSpec
from .backend import Attention

Pieces = Sequence[tuple[int, int]]
"""Of each sequence: keys in the cache, tokens fed."""


@dataclass(frozen=True, slots=True)
class _Fed:
    tokens: Sequence[int]
    computed: int
    block_table: Any  # of numpy's integers
    adapter: str | None = None

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class _Piece:
    seq: _Fed
    count: int
    guesses: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trial:
    """The inputs of one step; the same for every backend whose blocks are [tokens, kv heads, head dim]."""

    batch: Batch
    qkv: Tensor
    keys: Tensor
    values: Tensor
    scales: tuple[Tensor, ...]
    """Of keys and of values, where ``numbers`` keep them."""
    numbers: Numbers | None
    norm: Tensor | None
    """Weights of the norm of queries, and of that of keys."""

    @classmethod
    def draw(
        cls,
        spec: ModelSpec,
        pieces: Pieces,
        block_size: int,
        device: torch.device,
        dtype: torch.dtype,
        numbers: Numbers | None = None,
    ) -> Trial:
        """From a fixed seed; blocks lie anywhere. In what no token was written to there is no number."""
        generator = torch.Generator().manual_seed(0)
        needed = [-(-(start + count) // block_size) for start, count in pieces]
        free = torch.randperm(sum(needed), generator=generator).numpy()
        order = np.split(free, np.cumsum(needed)[:-1])
        work = [
            _Piece(_Fed([0] * (start + count), start, blocks), count)
            for (start, count), blocks in zip(pieces, order, strict=True)
        ]
        batch = pack(work, block_size, device)
        shape = (2, sum(needed) * block_size, spec.num_kv_heads, spec.head_dim)
        cache = torch.randn(shape, generator=generator)
        for (start, _), blocks in zip(pieces, order, strict=True):
            slots = (blocks[:, None] * block_size + np.arange(block_size)).flatten()
            cache[:, slots[start:]] = float("nan")
        scales: tuple[Tensor, ...] = ()
        kept = cache.to(device, dtype)
        if numbers:
            kept, scale = quantize(kept, numbers)
            first, second = scale.view(2, -1, block_size, spec.num_kv_heads).transpose(2, 3).contiguous()
            scales = (first, second)
        keys, values = kept.view(2, -1, block_size, *shape[2:])
        qkv = torch.randn(batch.rows, spec.q_size + 2 * spec.kv_size, generator=generator)
        norm = torch.linspace(0.5, 1.5, spec.head_dim).to(device, dtype)
        fused = spec.qk_norm == "head" and spec.norm == "rms"
        return cls(batch, qkv.to(device, dtype), keys, values, scales, numbers, norm if fused else None)

    def run(self, backend: Attention, layer: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """What attention says, and the keys and values that are cached then."""
        layers, keys, values = backend.spec.num_layers, self.keys.clone(), self.values.clone()
        scales = [each.clone() for each in self.scales]
        backend.use(
            KVCache((keys,) * layers, (values,) * layers, len(keys), *((each,) * layers for each in scales))
        )
        backend.begin(self.batch)
        out = backend.attend(layer, self.qkv.clone(), self.norm, self.norm)
        if self.numbers:
            both = zip((keys, values), scales, strict=True)
            keys, values = (dequantize(kept, each.transpose(1, 2), out.dtype) for kept, each in both)
        return out, keys, values


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest, of numbers above 1 relative; NaN against NaN, which is memory nobody wrote, is none."""
    off = (ours.float() - theirs.float()).abs() / theirs.float().abs().clamp(min=1)
    return off[~(ours.isnan() & theirs.isnan())].max().item()
