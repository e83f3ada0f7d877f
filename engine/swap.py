"""SwapSpace: KV blocks that had to make way and are wanted again, in the host's memory. Pure: no torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

HALF_LIFE_STEPS = 64


class Mover(Protocol):
    """Copies a block between the cache and a slot of the host's, at once or in the order of the calls."""

    def save(self, block: int, slot: int) -> None: ...
    def load(self, slot: int, block: int) -> None: ...


class StepCosts:
    """What one more token costs in a step: the slope of seconds over tokens, of the last hundred steps or so.

    Least squares with weights that halve every ``HALF_LIFE_STEPS``. What a step costs at any size is left
    out: recomputed tokens ride along in steps that are run anyway.
    """

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, tokens: int, seconds: float) -> None:
        """A step has been run."""
        fade = 0.5 ** (1 / HALF_LIFE_STEPS)
        self._weight = fade * self._weight + 1
        self._x = fade * self._x + tokens
        self._y = fade * self._y + seconds
        self._xx = fade * self._xx + tokens * tokens
        self._xy = fade * self._xy + tokens * seconds

    @property
    def token_s(self) -> float | None:
        """Seconds a token adds. None: nothing was observed. Steps all alike: their mean per token."""
        if not self._x:
            return None
        spread = self._xx - self._x * self._x / self._weight
        if spread <= 1e-6 * self._xx:
            return self._y / self._x
        return max(0.0, (self._xy - self._x * self._y / self._weight) / spread)


def swap_pays(*, block_tokens: int, token_s: float | None, block_s: float) -> bool:
    """Whether moving a block out and in again takes less time than computing its tokens once more."""
    return token_s is not None and 2 * block_s < block_tokens * token_s


class SwapSpace:
    """Which block's contents stand in which slot. Names are the prefix cache's.

    Full: the contents saved longest ago make way. Invariant: each slot is free or has one name.
    """

    def __init__(self, capacity: int, mover: Mover, pays: Callable[[], bool]) -> None:
        self.capacity = capacity
        self._mover, self._pays = mover, pays
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(capacity))
        self.saved = self.loaded = 0
        """Blocks moved since the start."""

    def __contains__(self, name: bytes) -> bool:
        return name in self._slots

    def save(self, name: bytes, block: int) -> None:
        """Keep what is in ``block``, if that costs less than computing it again."""
        if not self.capacity or not self._pays():
            return
        slot = self._free.pop() if self._free else self._slots.popitem(last=False)[1]
        self._mover.save(block, slot)
        self._slots[name] = slot
        self.saved += 1

    def load(self, name: bytes, block: int) -> None:
        """Put it into ``block``; it is kept here no longer."""
        self._mover.load(self._slots[name], block)
        self.drop(name)
        self.loaded += 1

    def drop(self, name: bytes) -> None:
        """Nobody wants it any more, or it is in the cache again."""
        slot = self._slots.pop(name, None)
        if slot is not None:
            self._free.append(slot)

    def names(self) -> set[bytes]:
        """Of all that is here."""
        return set(self._slots)

    def check(self) -> None:
        """Raise AssertionError unless the invariant holds."""
        slots = [*self._free, *self._slots.values()]
        assert sorted(slots) == list(range(self.capacity)), "a slot is lost, or used twice"


class NoMover:
    """For a space without slots."""

    def save(self, block: int, slot: int) -> None:
        raise AssertionError(f"block {block} has no slot {slot} to go to")

    def load(self, slot: int, block: int) -> None:
        raise AssertionError(f"slot {slot} has nothing for block {block}")


def no_swap() -> SwapSpace:
    """Keeps nothing."""
    return SwapSpace(0, NoMover(), lambda: False)
