"""Trials: which requests may run after the engine crashed, until it is known which of them it cannot bear."""

from __future__ import annotations

from collections import deque
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

REPEATED = 4
"""In so many crashes in a row even a request that makes tokens each time becomes a suspect …"""
SOON, SOON_TOKENS = 2, 32
"""… and in so many, if it made no more tokens than that before each: its trial is short. Of one that ran for
long everybody would wait for as long again, and two kills from outside may happen to anybody."""


@dataclass(slots=True)
class _Member:
    made: int = 0
    """Tokens since this engine started."""
    need: int = 0
    """Tokens it must make in a trial to be cleared; 0: nobody suspects it."""
    crashes: int = 0
    """Crashes in a row that it was running in."""
    soon: int = 0
    """Of these, the last ones, each of which came within ``SOON_TOKENS`` tokens."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whom a crash puts under suspicion, and who was running alone in it: that one caused it."""

    suspects: frozenset[str] = frozenset()
    alone: str | None = None


class Trials:
    """Bisects the requests that were running in a crash. Pure: no threads, no I/O.

    A suspect is who made no token since the engine started, or was in each of the last ``REPEATED`` crashes,
    or in each of the last ``SOON`` within ``SOON_TOKENS`` tokens. Suspects run in groups while others wait:
    a group that outlives its last crash by a token each is cleared, a group that crashes is halved, and one
    that crashes alone is the culprit. It is tried again after the others, until its owner removes it.

    Invariants: each suspect is in exactly one group; a group holds suspects and members cleared by it.
    """

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._groups: deque[tuple[str, ...]] = deque()

    def add(self, request_id: str, *, suspect: bool = False) -> None:
        """A request that may run; a suspect (by what its journal tells) is tried alone first."""
        self._members[request_id] = _Member(need=1 if suspect else 0)
        if suspect:
            self._groups.append((request_id,))

    def remove(self, request_id: str) -> None:
        """It ended, or was given up. Unknown ids are ignored."""
        self._members.pop(request_id, None)
        self._settle()

    def progress(self, request_id: str, tokens: int) -> None:
        """It made tokens."""
        member = self._members.get(request_id)
        if member is None:
            return
        member.made += tokens
        if member.need and member.made >= member.need:
            member.need = 0
            self._settle()

    def crashed(self, ran: AbstractSet[str]) -> Verdict:
        """The engine died while these were in it. The next one is to be given ``runnable``."""
        group = self._groups[0] if self._groups and ran and ran <= set(self._groups[0]) else None
        for request_id, member in self._members.items():
            member.crashes = member.crashes + 1 if request_id in ran else 0
            member.soon = member.soon + 1 if request_id in ran and member.made <= SOON_TOKENS else 0
        verdict = self._blame_any(ran) if group is None else self._blame_group(group)
        for member in self._members.values():
            member.made = 0
        return verdict

    @property
    def runnable(self) -> frozenset[str]:
        """Who may be in the engine now."""
        return frozenset(self._groups[0] if self._groups else self._members) & self._members.keys()

    @property
    def alone(self) -> str | None:
        """The suspect that is to run with nobody beside it; None: there is no such trial now."""
        return self._groups[0][0] if self._groups and len(self._groups[0]) == 1 else None

    @property
    def on(self) -> bool:
        """A trial goes on: whoever is not part of it waits."""
        return bool(self._groups)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._members

    def __len__(self) -> int:
        return len(self._members)

    def check(self) -> None:
        """Raise AssertionError unless the invariants hold."""
        grouped = [request_id for group in self._groups for request_id in group]
        assert len(grouped) == len(set(grouped)), "a request is in two groups"
        suspects = {i for i, member in self._members.items() if member.need}
        assert suspects <= set(grouped), f"suspects without a trial: {sorted(suspects - set(grouped))}"
        assert all(suspects & set(group) for group in self._groups), "a trial of nobody"

    # ---- whom to blame

    def _blame_any(self, ran: AbstractSet[str]) -> Verdict:
        members = self._members
        waiting = {i for group in self._groups for i in group}
        guilty = [
            i
            for i in sorted(ran & members.keys() - waiting)
            if members[i].made == 0 or members[i].soon >= SOON or members[i].crashes >= REPEATED
        ]
        self._try_longer(guilty)
        self._groups.extendleft(reversed(_halves(guilty)))
        return Verdict(frozenset(guilty))

    def _blame_group(self, group: tuple[str, ...]) -> Verdict:
        self._groups.popleft()
        guilty = [i for i in group if i in self._members and self._members[i].need] or [
            i for i in group if i in self._members
        ]
        self._try_longer(guilty)
        if len(group) == 1:
            self._groups.append(group)
            return Verdict(frozenset(guilty), alone=group[0])
        self._groups.extendleft(reversed(_halves(guilty)))
        return Verdict(frozenset(guilty))

    def _try_longer(self, guilty: list[str]) -> None:
        """A trial must outlast what the last engine bore, or it shows nothing."""
        for request_id in guilty:
            member = self._members[request_id]
            member.need = member.made + 1

    def _settle(self) -> None:
        """Forget groups in which nobody is suspected any more."""
        members = self._members
        groups = (tuple(i for i in group if i in members) for group in self._groups)
        self._groups = deque(group for group in groups if any(members[i].need for i in group))


def _halves(ids: list[str]) -> list[tuple[str, ...]]:
    middle = (len(ids) + 1) // 2
    return [tuple(half) for half in (ids[:middle], ids[middle:]) if half]
