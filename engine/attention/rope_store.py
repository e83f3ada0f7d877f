"""The first half of attention on a GPU, one launch: norm, rotate, write keys and values to the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gpu import attention as kernels
from ..kv_cache import KVCache
from ..kv_numbers import Numbers
from ..layers.rope import tables
from ..models.spec import ModelSpec

HEADS_AT_ONCE = 16
"""Heads that one program turns."""


class RopeStore:
    """Tables of angles, and the kernel over a cache whose blocks are [tokens, kv heads, head dim]."""

    def __init__(
        self,
        spec: ModelSpec,
        block_size: int,
        max_len: int,
        device: torch.device,
        numbers: Numbers | None = None,
    ) -> None:
        self._spec, self._block_size, self._numbers = spec, block_size, numbers
        self._angles = {
            rope: tuple(table.to(device).contiguous() for table in tables(rope, spec.head_dim, max_len))
            for rope in dict.fromkeys(spec.ropes)
            if rope
        }
        self._nothing = torch.zeros(1, device=device)
        self._wide = max(1, power_of_two(spec.head_dim // 2))

    def use(self, cache: KVCache) -> None:
        self._cache = cache

    def scales(self, layer: int) -> tuple[Tensor, Tensor]:
        """Of the cached keys and values; where they have none, something that is not read."""
        if self._numbers is None:
            return self._nothing, self._nothing
        return self._cache.key_scales[layer], self._cache.value_scales[layer]

    def __call__(
        self,
        layer: int,
        qkv: Tensor,
        positions: Tensor,
        slots: Tensor,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
    ) -> None:
        """Queries in ``qkv`` become what scores are computed from. positions, slots: [rows] int64."""
        spec, rope = self._spec, self._spec.ropes[layer]
        cos, sin = self._angles[rope] if rope else (self._nothing, self._nothing)
        normed = q_norm is not None and k_norm is not None
        # Nothing happens to queries: only keys and values are looked at.
        first = 0 if rope or normed else spec.num_heads
        heads = len(qkv) * (spec.num_heads + spec.num_kv_heads - first)
        kernels.rope_store[(-(-heads // HEADS_AT_ONCE),)](
            qkv,
            self._cache.keys[layer],
            self._cache.values[layer],
            positions,
            slots,
            cos,
            sin,
            q_norm if normed else self._nothing,
            k_norm if normed else self._nothing,
            *self.scales(layer),
            spec.norm_eps,
            len(qkv),
            FIRST=first,
            HEADS=spec.num_heads,
            KV_HEADS=spec.num_kv_heads,
            DIM=spec.head_dim,
            WIDE=self._wide,
            BLOCK=HEADS_AT_ONCE,
            PAGE=self._block_size,
            ROPE=rope is not None,
            NORM=normed,
            TOP=self._numbers.top if self._numbers else 0.0,
            WHOLE=self._numbers is not None and not self._numbers.dtype.is_floating_point,
            num_warps=4,
        )


def power_of_two(n: int) -> int:
    """The smallest that is no less than ``n``."""
    return 1 << (n - 1).bit_length()
