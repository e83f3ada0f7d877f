"""AdapterPool: whose weights may stay in memory. Pure: no torch, no clock, no files."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Set as AbstractSet


class AdapterPool:
    """Adapters by name and size within a bound of bytes; the least recently used unpinned one goes first.

    Invariant, after every public call: the sizes of all held adapters add up to ``used <= capacity``; only
    held ones are pinned, and a pinned one is never given up.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity = capacity_bytes
        self.used = 0
        self._sizes: dict[str, int] = {}
        """In order of use, oldest first."""
        self._pins: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    @property
    def names(self) -> AbstractSet[str]:
        """Held ones."""
        return self._sizes.keys()

    def pinned(self, name: str) -> int:
        """How many hold on to it."""
        return self._pins.get(name, 0)

    def pinned_bytes(self, names: Iterable[str]) -> int:
        """What these take, as far as they are pinned."""
        return sum(self._sizes[name] for name in names if self.pinned(name))

    def take(self, name: str, size: int) -> list[str] | None:
        """Hold ``name``: the names given up for it, or None while pinned ones leave no room."""
        assert name not in self._sizes, f"{name} is held already"
        assert size <= self.capacity, f"{name} could never be held: {size} of {self.capacity} bytes"
        going: list[str] = []
        freed = self.capacity - self.used
        for other, bytes_ in self._sizes.items():
            if freed >= size:
                break
            if not self.pinned(other):
                going.append(other)
                freed += bytes_
        if freed < size:
            return None
        for other in going:
            self.drop(other)
        self._sizes[name] = size
        self.used += size
        return going

    def drop(self, name: str) -> None:
        """Give up an adapter that nobody has pinned."""
        assert not self.pinned(name), f"{name} is pinned {self.pinned(name)} times"
        self.used -= self._sizes.pop(name)

    def pin(self, name: str) -> None:
        """Hold on to it, and count it as just used."""
        self._sizes[name] = self._sizes.pop(name)
        self._pins[name] = self.pinned(name) + 1

    def unpin(self, name: str) -> None:
        self._pins[name] -= 1
        if not self._pins[name]:
            del self._pins[name]

    def check(self) -> None:
        """Raise AssertionError unless the class invariant holds. O(adapters)."""
        assert self.used == sum(self._sizes.values()) <= self.capacity, (
            f"{self.used} of {self.capacity} bytes"
        )
        assert self._pins.keys() <= self._sizes.keys(), f"pinned, not held: {self._pins}"
        assert all(count > 0 for count in self._pins.values()), f"pinned less than once: {self._pins}"
