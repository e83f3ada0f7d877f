"""Swapped blocks of a model on several ranks: each rank moves its own part."""

from __future__ import annotations

from collections.abc import Callable

from ..kv_cache import HostBlocks, KVCache
from .messages import Load, Reserve, Save, Told


class SharedBlocks(HostBlocks):
    """Rank 0's part, whose every move is told to the others, among the steps that they are told."""

    def __init__(self, cache: KVCache, capacity: int, tell: Callable[[Told], None]) -> None:
        super().__init__(cache, capacity)
        self._tell = tell
        tell(Reserve(capacity))

    def save(self, block: int, slot: int) -> None:
        self._tell(Save(block, slot))
        super().save(block, slot)

    def load(self, slot: int, block: int) -> None:
        self._tell(Load(slot, block))
        super().load(slot, block)
