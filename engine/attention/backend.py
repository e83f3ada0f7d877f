"""The seam between the decoder and how attention is computed."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..batch import Batch
from ..kv_cache import KVCache
from ..models.spec import ModelSpec


class Attention(Protocol):
    """Rotary embedding, KV write and paged attention; the layout of a KV block is the backend's own business.

    Use: ``use(cache)`` once, ``begin(batch)`` once per step, ``attend`` once per layer of that step.

    CUDA graphs. Where ``graphs``, ``begin`` of a batch that has a ``Frame`` only takes note of the frame: it
    copies nothing and waits for nothing, and what ``attend`` launches reads the frame's memory, on grids that
    follow from ``frame.rows`` and ``frame.longest``. So a forward pass over ``frame.step(tokens)`` can be
    captured, and replayed after each ``frame.fill(batch)``. Scratch is allocated as activations are, while
    capturing in the graph's pool; run such a pass once before, so that kernels are compiled. What ``attend``
    says of a row is the same in a frame of any size and outside of one: to the last bit, but for flash-attn,
    which cuts keys as the whole batch suggests.
    """

    name: str
    spec: ModelSpec
    block_size: int
    graphs: bool
    """``begin`` knows frames."""

    def block_shape(self) -> tuple[int, ...]:
        """Shape of one block of keys (or of values) of one layer."""
        ...

    def use(self, cache: KVCache) -> None:
        """Work on this cache from now on."""
        ...

    def begin(self, batch: Batch) -> None:
        """Prepare what all layers of a step share. A batch with a frame only where ``graphs``."""
        ...

    def attend(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        """Write this step's keys and values, then attend each query to its own sequence's keys, causally.

        qkv: [tokens, (heads + 2 * kv_heads) * head_dim]: query heads, then keys, then values, before norm and
        rotation; its contents are used up. Returns [tokens, heads * head_dim]. Sums are float32 inside.
        """
        ...
