"""Breadth first through every world a model can reach; a broken property comes with a trace to it.

Knows no model: a ``Searchable`` says where it starts and what may happen next.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

W = TypeVar("W", bound=Hashable)
M = TypeVar("M", contravariant=True)


class Kind(Enum):
    """Why an action happens: what is promised without luck may only count on PROGRESS."""

    PROGRESS = "somebody does the next thing, or time passes"
    HARM = "likewise, but it must not go on for ever"
    CHOICE = "may happen, or not"
    FAULT = "costs one of the faults a run is allowed"


class Label(NamedTuple):
    """An action as it happened: to whom, by tag or by job."""

    name: str
    kind: Kind
    at: tuple[int, ...] = ()

    def __str__(self) -> str:
        subject = "".join(f" {'abcdefghijklmnopqrstuvwxyz'[job]}" for job in self.at[:1])
        tag = f".{self.at[1]}#{self.at[2]}" if len(self.at) == 3 else ""
        return self.name + subject + tag


class Searchable(Protocol[W]):
    """What is searched. Its worlds are values."""

    @property
    def faults(self) -> int:
        """How many a run is allowed."""
        ...

    def start(self) -> W:
        """The first world."""
        ...

    def successors(self, w: W, *, faults: bool = True) -> Iterator[tuple[Label, W]]:
        """Everything that may happen next; without ``faults``, everything but those."""
        ...

    def canonical(self, w: W) -> W:
        """One world for all that differ in names only."""
        ...


class Broken(AssertionError):
    """A property does not hold. ``trace`` leads to it; each line names an action."""

    def __init__(self, name: str, trace: list[str]) -> None:
        lines = "\n".join(f"{number:3d}. {line}" for number, line in enumerate(trace, 1))
        super().__init__(f"{name}\n{lines}")
        self.property, self.trace = name, trace


@dataclass(frozen=True)
class Property(Generic[M, W]):
    """``holds`` is asked about every world, or about every step: before, what happened, after."""

    name: str
    of_world: Callable[[M, W], bool] | None = None
    of_step: Callable[[M, tuple[W, Label, W]], bool] | None = None


@dataclass
class Graph(Generic[W]):
    """Canonical worlds in the order they were found, how each was reached, and where progress leads."""

    worlds: list[W] = field(default_factory=list)
    parents: array[int] = field(default_factory=lambda: array("l"))
    progress: list[tuple[int, int]] = field(default_factory=list)
    harmful: list[bool] = field(default_factory=list)
    """Of each of ``progress``."""
    steps: int = 0

    def trace(self, model: Searchable[W], at: int, last: Label | None = None) -> list[str]:
        """Actions from the start to a world, with the tags as they would really be."""
        path: list[int] = []
        while at >= 0:
            path.append(at)
            at = self.parents[at]
        lines, world = [], model.start()
        for to in path[-2::-1]:
            for label, after in model.successors(world):
                if model.canonical(after) == self.worlds[to]:
                    lines.append(str(label))
                    world = after
                    break
            else:
                raise AssertionError("a canonical world without a real one")
        return [*lines, last.name] if last else lines


def explore(
    model: Searchable[W], properties: tuple[Property[Any, W], ...], limit: int = 2_000_000
) -> Graph[W]:
    """Every reachable world: all that need no fault first, then those that need one, and so on.

    A world that was reached with fewer faults can do whatever it could do now: it is not looked at again.
    Raises Broken at the first property that fails, with a trace of as few faults as possible.
    """
    graph: Graph[W] = Graph()
    seen: dict[W, int] = {}
    of_world = [(p.name, p.of_world) for p in properties if p.of_world]
    of_step = [(p.name, p.of_step) for p in properties if p.of_step]

    def add(world: W, parent: int) -> int:
        at = seen[world] = len(graph.worlds)
        assert at < limit, f"more than {limit:,} worlds; make the model smaller"
        graph.worlds.append(world)
        graph.parents.append(parent)
        for name, holds in of_world:
            if not holds(model, world):
                raise Broken(name, graph.trace(model, at))
        return at

    layer = [(model.start(), -1)]
    for left in range(model.faults, -1, -1):
        todo = [add(world, parent) for world, parent in layer if world not in seen]
        layer = []
        for at in todo:  # it grows
            before = graph.worlds[at]
            for label, after in model.successors(before, faults=left > 0):
                graph.steps += 1
                for name, holds in of_step:
                    if not holds(model, (before, label, after)):
                        raise Broken(name, graph.trace(model, at, label))
                after = model.canonical(after)
                if label.kind is Kind.FAULT:
                    if after not in seen:
                        layer.append((after, at))
                    continue
                to = seen.get(after)
                if to is None:
                    todo.append(to := add(after, at))
                if label.kind is not Kind.CHOICE:
                    graph.progress.append((at, to))
                    graph.harmful.append(label.kind is Kind.HARM)
    return graph


def stuck(graph: Graph[W], ended: Callable[[W], bool]) -> Iterator[int]:
    """Worlds from which progress alone, without luck and without another fault, does not lead to an end."""
    into: list[list[int]] = [[] for _ in graph.worlds]
    for before, after in graph.progress:
        into[after].append(before)
    good = bytearray(len(graph.worlds))
    todo = [at for at, world in enumerate(graph.worlds) if ended(world)]
    for at in todo:
        good[at] = 1
    while todo:
        for before in into[todo.pop()]:
            if not good[before]:
                good[before] = 1
                todo.append(before)
    return (at for at, fine in enumerate(good) if not fine)


def check(
    model: Searchable[W], properties: tuple[Property[Any, W], ...], ended: Callable[[W], bool]
) -> Graph[W]:
    """All of it: safety in every world and step, then that every world can still come to its end."""
    graph = explore(model, properties)
    if (first := next(stuck(graph, ended), None)) is not None:
        raise Broken("every world can still come to its end", graph.trace(model, first))
    return graph


def most_harm(model: Searchable[W], graph: Graph[W]) -> int:
    """How much may still come, from any world on, by progress alone. Raises Broken if it never ends."""
    onward: list[list[tuple[int, bool]]] = [[] for _ in graph.worlds]
    for (before, after), harm in zip(graph.progress, graph.harmful, strict=True):
        onward[before].append((after, harm))
    most, entered = [0] * len(onward), bytearray(len(onward))
    for first in range(len(onward)):
        todo = [first]
        while todo:
            at = todo[-1]
            if entered[at] == 0:
                entered[at] = 1
                for after, _ in onward[at]:
                    if entered[after] == 1:
                        raise Broken("it ends", [*graph.trace(model, at), "and so on, for ever"])
                    if entered[after] == 0:
                        todo.append(after)
            else:
                todo.pop()
                if entered[at] == 1:
                    entered[at] = 2
                    most[at] = max((most[after] + harm for after, harm in onward[at]), default=0)
    return max(most)
