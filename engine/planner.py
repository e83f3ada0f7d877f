"""Planner: who of those that wait is admitted next. Pure: no torch, no clock."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence as Trail
from dataclasses import dataclass, field

from .sequence import Sequence

OVERTAKES = (8, 64, 1024)
"""By class, interactive first: so many later ones of its class may be admitted before a sequence."""
BATCH = 2
"""In this class nobody looks at the single answer, and whoever has most to write starts first: else the
longest would be left over in the end, alone in the engine."""
EVERYBODY = b""

_Key = tuple[int, tuple[int, float, int]]


@dataclass(slots=True)
class _Waiting:
    """What the planner knows of one sequence."""

    trail: Trail[bytes]
    preference: _Key
    """Among those who share as much. As it was when it came: it may get a token while it waits, or end."""
    overtaken: int = 0
    """So many later ones were admitted before it."""


@dataclass(slots=True)
class _Class:
    """The waiting sequences of one class."""

    overtakes: int
    known: dict[Sequence, _Waiting] = field(default_factory=dict[Sequence, _Waiting])
    by_rank: list[Sequence] = field(default_factory=list[Sequence])
    overdue: list[Sequence] = field(default_factory=list[Sequence])
    """By rank: they must not be overtaken again."""
    takers: dict[bytes, list[Sequence]] = field(default_factory=dict[bytes, list[Sequence]])
    """Who begins with the blocks of this name; the one to take first is the first."""
    last: Trail[bytes] = ()
    """The trail of the sequence that was admitted last."""

    def preference(self, seq: Sequence) -> _Key:
        return self.known[seq].preference


class Planner:
    """Orders admissions so that sequences with a common beginning follow one another.

    Classes are strict. Within one, the next is a sequence that shares as much as possible with the one before
    it, so that the queue is walked like a tree, branch by branch, and a prefix is needed only as long as its
    branch lasts. What sequences share is told by ``trail``: names of their beginnings, the longest first.

    Bounded unfairness: a sequence is admitted after at most ``overtakes`` later ones of its class. One that
    was preempted is overtaken by nobody.

    Invariant: each waiting sequence is in its class's order of rank, and once under each name of its trail.
    """

    def __init__(self, overtakes: tuple[int, int, int] = OVERTAKES) -> None:
        self._classes = [_Class(count) for count in overtakes]

    def add(self, seq: Sequence, trail: Trail[bytes]) -> None:
        """It waits. Names in ``trail`` stand for beginnings that others may have too, the longest first."""
        room = self._classes[seq.request.priority]
        insort(room.by_rank, seq, key=_rank)
        room.known[seq] = _Waiting((*trail, EVERYBODY), _preference(seq))
        self._count(room, seq, room.overtakes if seq.preempted else 0)
        for name in room.known[seq].trail:
            insort(room.takers.setdefault(name, []), seq, key=room.preference)

    def remove(self, seq: Sequence) -> None:
        """It does not wait any more, and did not get in."""
        self._take_out(seq)

    def admit(self, seq: Sequence) -> None:
        """It got in: before all those of its class that rank ahead of it. O(those)."""
        room = self._classes[seq.request.priority]
        room.last = self._take_out(seq).trail
        for other in room.by_rank[: bisect_left(room.by_rank, seq.rank, key=_rank)]:
            self._count(room, other, 1)

    def next(self) -> Sequence | None:
        """Who should be admitted now."""
        room = next((room for room in self._classes if room.by_rank), None)
        if room is None:
            return None
        if room.overdue:
            return room.overdue[0]
        return next(room.takers[name][0] for name in (*room.last, EVERYBODY) if name in room.takers)

    def _count(self, room: _Class, seq: Sequence, times: int) -> None:
        """It was overtaken so often more. Nobody overdue ever is."""
        known = room.known[seq]
        known.overtaken += times
        if known.overtaken >= room.overtakes:
            insort(room.overdue, seq, key=_rank)

    def _take_out(self, seq: Sequence) -> _Waiting:
        room = self._classes[seq.request.priority]
        waiting = room.known[seq]
        del room.by_rank[bisect_left(room.by_rank, seq.rank, key=_rank)]
        if waiting.overtaken >= room.overtakes:
            room.overdue.remove(seq)
        for name in waiting.trail:
            takers = room.takers[name]
            del takers[bisect_left(takers, waiting.preference, key=room.preference)]
            if not takers:
                del room.takers[name]
        del room.known[seq]
        return waiting

    def check(self, waiting: list[Sequence]) -> None:
        """Raise AssertionError unless the invariant holds for these, in order of rank."""
        assert [seq for room in self._classes for seq in room.by_rank] == waiting, "not those who wait"
        for room in self._classes:
            assert room.known.keys() == set(room.by_rank)
            due = [seq for seq in room.by_rank if room.known[seq].overtaken >= room.overtakes]
            assert room.overdue == due, "somebody is overdue and does not know"
            listed = sum(len(takers) for takers in room.takers.values())
            assert listed == sum(len(known.trail) for known in room.known.values())
            for seq, known in room.known.items():
                assert all(seq in room.takers[name] for name in known.trail), f"{seq.id} is not on its trail"


def _rank(seq: Sequence) -> tuple[int, float, int]:
    return seq.rank


def _preference(seq: Sequence) -> _Key:
    """In the batch class who has most to write comes first, elsewhere who ranks first."""
    rest = seq.limit - seq.length if seq.request.priority == BATCH else 0
    return -rest, seq.rank
