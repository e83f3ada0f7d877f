"""BlockPool: which KV block belongs to whom. Knows nothing of tensors or tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Hands out the ids of fixed KV blocks, reference counted.

    Invariant, after every public call: each id is free or has ``refs > 0``, never both, and
    ``free + used == capacity``.

    A free block keeps what was written to it until it is handed out again, least recently released first.
    So whoever remembers what a block holds may take it back with ``share`` for as long as it is free.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity > 0, f"a pool of {capacity} blocks"
        self.capacity = capacity
        self._refs = [0] * capacity
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(capacity))

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def refs(self, block: int) -> int:
        """How many holders ``block`` has."""
        return self._refs[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks, all or none. None means: not now, ask again later."""
        if count > len(self._free):
            return None
        taken = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in taken:
            self._refs[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Become one more holder of each block, free or not; its contents stay."""
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
            self._refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one reference to each. Pass a block table in its order.

        The table's tail is queued for reuse before its head: later blocks are worth less to anyone who
        shares a prefix.
        """
        for block in reversed(list(blocks)):
            assert self._refs[block] > 0, f"block {block} is released once too often"
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None

    def check(self) -> None:
        """Raise AssertionError unless the class invariant holds. O(capacity)."""
        assert len(self._refs) == self.capacity
        assert set(self._free) <= set(range(self.capacity)), "a free block that does not exist"
        wrong = [b for b, refs in enumerate(self._refs) if refs < 0 or (refs == 0) != (b in self._free)]
        assert not wrong, f"blocks {wrong} are neither free nor held, or both"
