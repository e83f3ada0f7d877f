"""How small the smallest document of a JSON schema is, at least. Pure; linear in the schema's size.

Each schema is a part whose size follows from other parts: a sum (of an object's required properties), the
greatest (of what must all hold) or the least (of what may be chosen). Parts may refer to one another in
circles; Knuth's generalisation of Dijkstra's algorithm (1977) settles them in the order of their sizes, and
what it never reaches has no finite document.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast
from urllib.parse import unquote

COUNTED_TO = 10**15
"""Sizes beyond are not told apart."""
Weighed: TypeAlias = "tuple[_Part, int]"


@dataclass(slots=True, eq=False)
class _Part:
    combine: Callable[[Iterable[int]], int] = max
    least: int = 1
    """Characters, whatever its parts are."""
    parts: list[Weighed] = field(default_factory=list[Weighed])
    """With how often each of them comes."""
    users: list[_Part] = field(default_factory=list["_Part"])
    open: int = 0
    """Of ``parts``, as long as their size is not known."""
    size: int | None = None
    """Once it is known."""
    place: str | None = None
    """The reference that led here."""

    def known(self) -> int:
        sizes = [times * (part.size or 0) for part, times in self.parts]
        if self.combine is sum:
            return min(COUNTED_TO, self.least + sum(sizes))
        return max(self.least, *sizes, 0)


def smallest(schema: Any) -> int | str:
    """Characters of the smallest document, at least: bounds of numbers, patterns and formats do not count,
    and nor does what is wrong with the schema. A string: the reference that leads to itself again whatever
    is chosen, so that no document ends.
    """
    reader = _Reader(schema)
    root = reader.read()
    _settle(reader.all)
    return root.size if root.size is not None else _circle(root)


def _settle(parts: Iterable[_Part]) -> None:
    heap: list[tuple[int, int, _Part]] = []

    def reach(part: _Part, size: int) -> None:
        heapq.heappush(heap, (size, id(part), part))

    for part in parts:
        part.open = len(part.parts)
        for used, _ in part.parts:
            used.users.append(part)
        if not part.parts:
            reach(part, part.least)
    while heap:
        size, _, part = heapq.heappop(heap)
        if part.size is not None:
            continue
        part.size = size
        for user in part.users:
            user.open -= 1
            if user.combine is min:
                reach(user, max(size, user.least))
            elif not user.open:
                reach(user, user.known())


def _circle(part: _Part) -> str:
    """From a part without a size to another one, until one comes again."""
    seen: set[int] = set()
    place = "#"
    while id(part) not in seen:
        seen.add(id(part))
        part = next(inner for inner, _ in part.parts if inner.size is None)
        place = part.place or place
    return place


class _Reader:
    """Reads each schema once, however many references lead to it."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._of: dict[int, _Part] = {}
        self._unread: list[tuple[_Part, dict[str, Any]]] = []
        self.all: list[_Part] = []

    def read(self) -> _Part:
        root = self._part(self._root)
        while self._unread:
            part, schema = self._unread.pop()
            part.parts += [(each, 1) for each in self._conditions(schema)]
        return root

    def _made(self, combine: Callable[[Iterable[int]], int], least: int, parts: Iterable[Weighed]) -> _Part:
        made = _Part(combine, least, [*parts])
        self.all.append(made)
        return made

    def _part(self, schema: Any) -> _Part:
        if not isinstance(schema, dict):
            return self._made(max, 1, [])
        found = self._of.get(id(cast("Any", schema)))
        if found is None:
            found = self._of[id(cast("Any", schema))] = self._made(max, 1, [])
            self._unread.append((found, cast("dict[str, Any]", schema)))
        return found

    def _conditions(self, schema: dict[str, Any]) -> Iterable[_Part]:
        """All of which a document must meet."""
        ref = schema.get("$ref")
        if isinstance(ref, str):
            part = self._part(_pointed_at(self._root, ref))
            part.place = ref
            yield part
        yield from (self._part(each) for each in _list(schema.get("allOf")))
        for name in ("anyOf", "oneOf"):
            if several := _list(schema.get(name)):
                yield self._made(min, 1, [(self._part(each), 1) for each in several])
        if "const" in schema:
            yield self._made(max, _chars(schema["const"]), [])
        if values := _list(schema.get("enum")):
            yield self._made(max, min(map(_chars, values)), [])
        kinds = schema.get("type")
        if kinds := [kinds] if isinstance(kinds, str) else _list(kinds):
            yield self._made(min, 1, [(self._typed(kind, schema), 1) for kind in kinds])

    def _typed(self, kind: Any, schema: dict[str, Any]) -> _Part:
        match kind:
            case "object":
                return self._object(schema)
            case "array":
                return self._array(schema)
            case "string":
                return self._made(max, 2 + _count(schema.get("minLength")), [])
            case "boolean" | "null":
                return self._made(max, 4, [])
            case _:
                return self._made(max, 1, [])

    def _object(self, schema: dict[str, Any]) -> _Part:
        given = schema.get("properties")
        properties: dict[str, Any] = cast("Any", given) if isinstance(given, dict) else {}
        named = [name for name in _list(schema.get("required")) if isinstance(name, str)]
        required = list(dict.fromkeys(named))
        others = max(0, _count(schema.get("minProperties")) - len(required))
        least = sum(_chars(name) + 1 for name in required) + 4 * others  # "":0
        commas = max(0, len(required) + others - 1)
        return self._made(
            sum, 2 + least + commas, [(self._part(properties.get(name)), 1) for name in required]
        )

    def _array(self, schema: dict[str, Any]) -> _Part:
        count = _count(schema.get("minItems"))
        items = schema.get("items")
        first = _list(schema.get("prefixItems"))
        if isinstance(items, list):  # as drafts before 2020-12 have it
            first, items = cast("list[Any]", items), schema.get("additionalItems")
        parts = [(self._part(each), 1) for each in first[:count]]
        if count > len(first):
            parts.append((self._part(items), count - len(first)))
        return self._made(sum, 2 + max(0, count - 1), parts)


def _pointed_at(root: Any, ref: str) -> Any:
    """What a reference within the document names; None for others, and for what is not there."""
    if ref != "#" and not ref.startswith("#/"):
        return None
    found = root
    for name in unquote(ref[1:]).split("/")[1:]:
        name = name.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = cast("dict[str, Any]", found).get(name)
        elif isinstance(found, list) and name.isdecimal() and len(name) < 9:
            found = _at(cast("list[Any]", found), int(name))
        else:
            return None
    return found


def _at(values: list[Any], index: int) -> Any:
    return values[index] if index < len(values) else None


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []


def _count(value: Any) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return int(min(COUNTED_TO, max(0, value))) if is_number else 0


def _chars(value: Any) -> int:
    """Of a value, written as short as can be; a number may be written in many ways, and counts as one."""
    match value:
        case bool():
            return 4 if value else 5
        case None:
            return 4
        case str():
            return 2 + len(value)
        case list():
            several = cast("list[Any]", value)
            return 2 + max(0, len(several) - 1) + sum(map(_chars, several))
        case dict():
            pairs = cast("dict[str, Any]", value)
            of_pairs = sum(3 + len(name) + _chars(each) for name, each in pairs.items())
            return 2 + max(0, len(pairs) - 1) + of_pairs
        case _:
            return 1
