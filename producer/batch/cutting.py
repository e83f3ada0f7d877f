"""Rows cut into segments by estimated seconds of work: large ones first, small ones towards the end. Pure.

The end of a batch is where workers would idle beside one that still has much to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .order import work_s
from .spool import Spooled

LONGEST_S, SHORTEST_S = 60.0, 5.0
SHARES = 16
"""A segment is that part of what is left: eight workers with two segments each."""
MOST_SEGMENTS = 5_000
MOST_ROWS = 10_000
MOST_BYTES = 16 * 1024 * 1024
FEWEST_ROWS = 32
"""An engine runs rows side by side; fewer would leave it half empty."""
COPIES_BYTES = 4 * 1024 * 1024
"""Copies that stay together with the row they copy, since they lie in its segment."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A row as it goes into a segment. ``copy_of``: the line, in the same segment, whose answer is its."""

    row: Spooled
    copy_of: int | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """What a segment is estimated to be, for forecasts. Tokens are those that are computed."""

    rows: int
    prompt_tokens: float
    output_tokens: float


@dataclass(frozen=True, slots=True)
class Cut:
    """The rows of one segment, numbered from 1."""

    number: int
    rows: list[Sent]
    work_s: float

    @property
    def part(self) -> Part:
        """Its estimates."""
        computed = [each.row for each in self.rows if each.copy_of is None]
        return Part(
            len(self.rows),
            sum(row.prompt_tokens for row in computed),
            sum(row.output_tokens for row in computed),
        )

    @property
    def first(self) -> int:
        """The lowest line."""
        return min(each.row.line for each in self.rows)

    @property
    def last(self) -> int:
        """The highest line."""
        return max(each.row.line for each in self.rows)


def cut(rows: Iterable[Sent], total_s: float) -> Iterator[Cut]:
    """``total_s``: estimated work of all rows. The same rows are cut in the same places, always.

    Memory: one segment. A row and its copies are not parted.
    """
    number, left_s = 1, total_s
    held: list[Sent] = []
    held_s, held_bytes = 0.0, 0
    for each in rows:
        if each.copy_of is None and held and _full(len(held), held_bytes, held_s, left_s, total_s):
            yield Cut(number, held, held_s)
            left_s -= held_s
            number, held, held_s, held_bytes = number + 1, [], 0.0, 0
        held.append(each)
        held_bytes += len(each.row.body)
        held_s += work_s(each.row) if each.copy_of is None else 0.0
    if held:
        yield Cut(number, held, held_s)


def _full(rows: int, size: int, seconds: float, left_s: float, total_s: float) -> bool:
    if rows >= MOST_ROWS or size >= MOST_BYTES:
        return True
    longest_s = max(LONGEST_S, total_s / MOST_SEGMENTS)
    target_s = min(longest_s, max(SHORTEST_S, total_s / MOST_SEGMENTS, left_s / SHARES))
    return rows >= FEWEST_ROWS and seconds >= target_s


def with_copies(leader: Spooled, copies: Iterable[Spooled]) -> Iterator[Sent]:
    """A row and those that ask for the same, in groups that a segment can hold."""
    yield Sent(leader)
    line, size = leader.line, len(leader.body)
    for copy in copies:
        size += len(copy.body)
        if size > COPIES_BYTES:
            line, size = copy.line, len(copy.body)
            yield Sent(copy)
        else:
            yield Sent(copy, line)
