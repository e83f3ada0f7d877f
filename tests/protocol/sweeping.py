"""When expired claims are swept, as a model: a server that stands still, an owner that lives or not.

Time is counted in sixths of a lease (ticks), and relative to now. ``swept`` is queue_sweep.lua once more, and
``test_sweeping_searched.py`` asks the real script the same questions.

What is relied on: who lives sweeps, and renews what it holds, in less than a third of a lease, counted from
when the server answers. After a standstill that was longer an owner may take most of a lease to find its way
back, unless all who saw it begin are dead. And the server stands still once: if it does so again within a
third of a lease, and a newcomer swept in between, a living owner may lose its claim. That costs an attempt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .checker import Kind, Label, Property

LEASE, THIRD = 6, 2
LONG = LEASE + THIRD + 1
"""Ticks beyond which nothing changes."""
SLOW = LEASE - 1
"""An owner needs at most so long to come back, if another one lives who knows of the gap."""


@dataclass(frozen=True)
class Rules:
    """Of queue_sweep.lua."""

    a_gap_gives_time: bool = True
    survivors_give_a_lease: bool = True
    """Also when a newcomer swept first, and gave a third."""
    a_restart_gives_a_lease: bool = True


class Books(NamedTuple):
    """The key SWEEP. Ages and times left, in ticks; -1: not set."""

    at: int = 0
    hold: int = 0
    gap: int = -1
    known_run: bool = True
    """``run`` names the server that answers now."""


class World(NamedTuple):
    books: Books = Books()
    left: int = LEASE
    """Of the owner's claim."""
    owner: bool = True
    up: bool = True
    back: int = LONG
    """How long the server has answered."""
    down: int = 0
    """How long it did not, before that."""
    survivor: int = 0
    """When the one who has been here all along swept last; -1: it died."""
    newcomer: int = -1
    swept: bool = False


class Model(NamedTuple):
    faults: int
    rules: Rules = Rules()

    def start(self) -> World:
        return World()

    def canonical(self, w: World) -> World:
        return w

    def successors(self, w: World, *, faults: bool = True) -> Iterator[tuple[Label, World]]:
        """Nothing happens any more to a claim that was swept."""
        if not w.swept:
            for name, kind, after in _possible(self, w):
                if faults or kind is not Kind.FAULT:
                    yield Label(name, kind), after


def _possible(model: Model, w: World) -> Iterator[tuple[str, Kind, World]]:
    if not _overdue(w):
        yield "time passes", Kind.PROGRESS, _later(w)
    if w.up:
        if w.survivor > 0:
            yield "the survivor sweeps", Kind.PROGRESS, _sweep(model, w, w.survivor)._replace(survivor=0)
        if w.newcomer > 0:
            yield "the newcomer sweeps", Kind.PROGRESS, _sweep(model, w, w.newcomer)._replace(newcomer=0)
        elif w.newcomer < 0:
            yield "a newcomer sweeps", Kind.PROGRESS, _sweep(model, w, None)._replace(newcomer=0)
        if w.owner and w.left < LEASE:
            yield "the owner renews", Kind.PROGRESS, w._replace(left=LEASE)
        if w.down == 0:
            yield "the server stands still", Kind.FAULT, w._replace(up=False, down=0)
    else:
        yield "the server goes on", Kind.PROGRESS, w._replace(up=True, back=0)
        books = w.books._replace(known_run=False)
        yield "the server is started again", Kind.PROGRESS, w._replace(up=True, back=0, books=books)
    if w.owner:
        yield "the owner dies", Kind.FAULT, w._replace(owner=False)
    if w.survivor >= 0:
        yield "the survivor dies", Kind.FAULT, w._replace(survivor=-1)


def _overdue(w: World) -> bool:
    """What those who live and are connected would have done by now."""
    sweeping = any(min(age, w.back) >= THIRD - 1 for age in (w.survivor, w.newcomer) if age >= 0)
    lost = w.back < LEASE and w.down > THIRD and w.survivor >= 0
    renewing = w.owner and min(LEASE - w.left, w.back) >= (SLOW if lost else THIRD - 1)
    return w.up and (sweeping or renewing)


def _later(w: World) -> World:
    books = w.books
    gap = books.gap + 1 if 0 <= books.gap < LONG else -1
    books = books._replace(at=min(books.at + 1, LONG), hold=max(books.hold - 1, 0), gap=gap)
    survivor, newcomer = (min(age + 1, LONG) if age >= 0 else -1 for age in (w.survivor, w.newcomer))
    w = w._replace(books=books, left=max(w.left - 1, 0), survivor=survivor, newcomer=newcomer)
    if w.up:
        return w._replace(back=min(w.back + 1, LONG))
    return w._replace(down=min(w.down + 1, THIRD + 1))


def _sweep(model: Model, w: World, mine: int | None) -> World:
    books, done = swept(model.rules, w.books, mine, w.back)
    return w._replace(books=books, swept=done and w.left == 0)


def swept(rules: Rules, books: Books, mine: int | None, up_for: int) -> tuple[Books, bool]:
    """queue_sweep.lua: the books afterwards, and whether it looked for what has expired.

    ``mine``: how long ago this caller swept; None: never. ``up_for``: the server's age, if it is a new one.
    """
    at, hold, gap, known = books
    knows_better = hold > 0 and gap >= 0 and mine is not None and mine > gap + THIRD
    if knows_better and rules.survivors_give_a_lease:
        hold = max(hold, LEASE - gap)
    elif at < 1:
        return books, False
    if not known:
        if rules.a_restart_gives_a_lease:
            hold = max(hold, LEASE - (up_for if up_for < at else 0))
    elif at > THIRD and rules.a_gap_gives_time:
        gap, hold = 0, max(hold, THIRD if mine is None else LEASE)
    return Books(0, hold, gap, True), hold == 0


PROPERTIES = (
    Property[Model, World]("a living owner keeps its claim", of_world=lambda _, w: not (w.swept and w.owner)),
)


def ended(w: World) -> bool:
    """Swept, or in the hands of who lives."""
    return w.swept or w.owner
