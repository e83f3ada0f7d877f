"""BlockPool: which KV block belongs to whom. Knows nothing of tensors or tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """Hands out the ids of fixed KV blocks, reference counted.

    Invariant, after every public call: each id is free or has ``refs > 0``, never both, and
    ``free + used == capacity``.

    A free block keeps what was written to it until it is handed out again: those of least worth first, and
    among equals the one released longest ago. So whoever remembers what a block holds may take it back with
    ``share`` for as long as it is free.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity > 0, f"a pool of {capacity} blocks"
        self.capacity = capacity
        self.free = capacity
        """Blocks that nobody holds."""
        self._refs = [0] * capacity
        self._worth = [0] * capacity
        self._free = {0: OrderedDict[int, None].fromkeys(range(capacity))}
        """By worth; no entry is empty."""

    def refs(self, block: int) -> int:
        """How many holders ``block`` has."""
        return self._refs[block]

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` blocks, all or none. None means: not now, ask again later."""
        if count > self.free:
            return None
        taken: list[int] = []
        for worth in sorted(self._free) if count else ():
            queue = self._free[worth]
            while queue and len(taken) < count:
                taken.append(queue.popitem(last=False)[0])
            if queue:
                break
            del self._free[worth]
        for block in taken:
            self._refs[block], self._worth[block] = 1, 0
        self.free -= count
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Become one more holder of each block, free or not; its contents stay."""
        for block in blocks:
            if self._refs[block] == 0:
                self._take_out(block)
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
                self._put_in(block)

    def rate(self, block: int, worth: int) -> None:
        """Say what the contents of ``block`` are worth, until it is handed out anew; 0 at first."""
        if worth == self._worth[block]:
            return
        free = self._refs[block] == 0
        if free:
            self._take_out(block)
        self._worth[block] = worth
        if free:
            self._put_in(block)

    def _put_in(self, block: int) -> None:
        self._free.setdefault(self._worth[block], OrderedDict())[block] = None
        self.free += 1

    def _take_out(self, block: int) -> None:
        queue = self._free[self._worth[block]]
        del queue[block]
        if not queue:
            del self._free[self._worth[block]]
        self.free -= 1

    def check(self) -> None:
        """Raise AssertionError unless the class invariant holds. O(capacity)."""
        assert len(self._refs) == self.capacity
        free = [block for queue in self._free.values() for block in queue]
        assert len(free) == len(set(free)) == self.free, "a block is free twice, or counted wrong"
        assert set(free) <= set(range(self.capacity)), "a free block that does not exist"
        assert all(self._free.values()), "an empty queue was kept"
        assert all(block in self._free[self._worth[block]] for block in free), "queued by another's worth"
        there = set(free)
        wrong = [b for b, refs in enumerate(self._refs) if refs < 0 or (refs == 0) != (b in there)]
        assert not wrong, f"blocks {wrong} are neither free nor held, or both"
