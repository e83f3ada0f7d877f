"""Breadth first through every world a model can reach; a broken property comes with a trace to it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from .model import Kind, Label, Model, World, canonical, successors

Step = tuple[World, Label, World]
"""Before, what happened, after."""


class Broken(AssertionError):
    """A property does not hold. ``trace`` leads to it; each line names an action."""

    def __init__(self, name: str, trace: list[str]) -> None:
        lines = "\n".join(f"{number:3d}. {line}" for number, line in enumerate(trace, 1))
        super().__init__(f"{name}\n{lines}")
        self.property, self.trace = name, trace


@dataclass(frozen=True)
class Property:
    """``holds`` is asked about every world, or about every step."""

    name: str
    of_world: Callable[[Model, World], bool] | None = None
    of_step: Callable[[Model, Step], bool] | None = None


@dataclass
class Graph:
    """Canonical worlds in the order they were found, how each was reached, and where progress leads."""

    worlds: list[World] = field(default_factory=list)
    parents: array[int] = field(default_factory=lambda: array("l"))
    progress: list[tuple[int, int]] = field(default_factory=list)
    steps: int = 0

    def trace(self, model: Model, at: int, last: Label | None = None) -> list[str]:
        """Actions from the start to a world, with the tags as they would really be."""
        path: list[int] = []
        while at >= 0:
            path.append(at)
            at = self.parents[at]
        lines, world = [], model.start()
        for to in path[-2::-1]:
            for label, after in successors(model, world):
                if canonical(after) == self.worlds[to]:
                    lines.append(str(label))
                    world = after
                    break
            else:
                raise AssertionError("a canonical world without a real one")
        return [*lines, last.name] if last else lines


def explore(model: Model, properties: tuple[Property, ...], limit: int = 2_000_000) -> Graph:
    """Every reachable world: all that need no fault first, then those that need one, and so on.

    A world that was reached with fewer faults can do whatever it could do now: it is not looked at again.
    Raises Broken at the first property that fails, with a trace of as few faults as possible.
    """
    graph = Graph()
    seen: dict[World, int] = {}
    of_world = [(p.name, p.of_world) for p in properties if p.of_world]
    of_step = [(p.name, p.of_step) for p in properties if p.of_step]

    def add(world: World, parent: int) -> int:
        at = seen[world] = len(graph.worlds)
        assert at < limit, f"more than {limit:,} worlds; make the model smaller"
        graph.worlds.append(world)
        graph.parents.append(parent)
        for name, holds in of_world:
            if not holds(model, world):
                raise Broken(name, graph.trace(model, at))
        return at

    layer = [(model.start(), -1)]
    for left in range(model.size.faults, -1, -1):
        todo = [add(world, parent) for world, parent in layer if world not in seen]
        layer = []
        for at in todo:  # it grows
            before = graph.worlds[at]
            for label, after in successors(model, before, faults=left > 0):
                graph.steps += 1
                for name, holds in of_step:
                    if not holds(model, (before, label, after)):
                        raise Broken(name, graph.trace(model, at, label))
                after = canonical(after)
                if label.kind is Kind.FAULT:
                    if after not in seen:
                        layer.append((after, at))
                    continue
                to = seen.get(after)
                if to is None:
                    todo.append(to := add(after, at))
                if label.kind is Kind.PROGRESS:
                    graph.progress.append((at, to))
    return graph


def stuck(graph: Graph, ended: Callable[[World], bool]) -> Iterator[int]:
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


def check(model: Model, properties: tuple[Property, ...], ended: Callable[[World], bool]) -> Graph:
    """All of it: safety in every world and step, then that every world can still come to its end."""
    graph = explore(model, properties)
    if (first := next(stuck(graph, ended), None)) is not None:
        raise Broken("every world can still come to its end", graph.trace(model, first))
    return graph
