"""The order in which rows go to workers: those that begin alike meet, and long ones start first.

Pure. Within a window, since the input may be of any size; windows follow each other as they stand in the
input.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .spool import Spooled

WINDOW_ROWS = 20_000
WINDOW_BYTES = 32 * 1024 * 1024
SHARED_BYTES = 256
"""Less of a common beginning is not worth keeping rows together for: it is a few blocks of the KV cache."""

PROMPT_TOKENS_PER_S = 20_000.0
OUTPUT_TOKENS_PER_S = 2_000.0
ROW_S = 0.0005
"""A worker of middling speed. Only proportions matter: a slow holder of a segment gives rows back."""


def work_s(row: Spooled) -> float:
    """Seconds that a row takes of a worker which runs many at a time."""
    return ROW_S + row.prompt_tokens / PROMPT_TOKENS_PER_S + row.output_tokens / OUTPUT_TOKENS_PER_S


def windows(rows: Iterable[Spooled]) -> Iterator[list[Spooled]]:
    """Consecutive rows, as many as are held in memory at once."""
    window: list[Spooled] = []
    size = 0
    for row in rows:
        window.append(row)
        size += len(row.body)
        if len(window) >= WINDOW_ROWS or size >= WINDOW_BYTES:
            yield window
            window, size = [], 0
    if window:
        yield window


def in_order(window: Sequence[Spooled]) -> list[Spooled]:
    """The rows of a window, reordered; the same rows give the same order.

    A body begins with its prompt, so bodies that sort together begin alike. A family is a run of them that
    share half of what they say, and at least ``SHARED_BYTES``; families with the longest rows come first.
    """
    families: list[list[Spooled]] = []
    for row in sorted(window, key=lambda each: (each.body, each.line)):
        if families and _akin(families[-1][-1].body, row.body):
            families[-1].append(row)
        else:
            families.append([row])
    families.sort(key=lambda family: (-sum(map(work_s, family)) / len(family), family[0].line))
    return [row for family in families for row in family]


def _akin(one: bytes, other: bytes) -> bool:
    shared = max(SHARED_BYTES, min(len(one), len(other)) // 2)
    return len(one) >= shared and one[:shared] == other[:shared]
