"""The seam between the decoder and how attention is computed."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..batch import Batch
from ..kv_cache import KVCache


class Attention(Protocol):
    """Rotary embedding, KV write and paged attention; the layout of a KV block is the backend's own business.

    Use: ``use(cache)`` once, ``begin(batch)`` once per step, ``attend`` once per layer of that step.
    """

    name: str

    def block_shape(self) -> tuple[int, ...]:
        """Shape of one block of keys (or of values) of one layer."""
        ...

    def use(self, cache: KVCache) -> None:
        """Work on this cache from now on."""
        ...

    def begin(self, batch: Batch) -> None:
        """Prepare what all layers of a step share."""
        ...

    def attend(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """Write this step's keys and values, then attend each query to its own sequence's keys, causally.

        qkv: [tokens, (heads + 2 * kv_heads) * head_dim]: query heads, then keys, then values, before norm and
        rotation; its contents are used up. Returns [tokens, heads * head_dim]. Sums are float32 inside.
        """
        ...
