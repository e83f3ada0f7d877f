"""What the native kernel does in a step: which query rows meet which keys, and what is joined afterwards.

Rows that begin alike have the same blocks in their tables. Those that decode read what they share together,
each key and value once for all of them, and what is their own alone; both parts are then merged by the sums
of their softmax (as in Hydragen, arXiv:2402.05099).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..batch import Batch, Int32

QUERY_ROWS = 48
"""Query rows (tokens x heads of a group) of a work item: they share each key and value read."""
SPLIT_TOKENS = 512
"""A decode row with more keys than this is cut into pieces of this size, computed in parallel and merged."""
NEVER = 2**31 - 1
SHARERS, SHARED_TOKENS = 4, 128
"""So many rows and common keys, or more: below, merging costs what sharing saves."""
SHARING_COUNT = 16
"""Tokens of a row that shares, at most: it decodes, maybe with guesses. A prefill's share reads anyway."""

Query = tuple[int, int, int]
"""Row, its position, and its part of the scratch memory; -1: none, it is written where it belongs."""
QUERY_FIELDS, ITEM_FIELDS, MERGE_FIELDS = 3, 5, 3


@dataclass(frozen=True, slots=True)
class Work:
    """Arrays as attention.h reads them."""

    queries: Int32
    """[q, 3]: see ``Query``."""
    items: Int32
    """[n, 5]: first query, queries, block table, first key, end of keys."""
    merges: Int32
    """[m, 3]: row, first part, parts."""
    parts: int


class _Plan:
    def __init__(self) -> None:
        self.queries: list[Query] = []
        self.items: list[tuple[int, ...]] = []
        self.merges: list[tuple[int, ...]] = []
        self.parts = 0

    def add(self, queries: Iterable[Query], table: int, begin: int, end: int) -> None:
        first = len(self.queries)
        self.queries += queries
        self.items.append((first, len(self.queries) - first, table, begin, end))

    def merge(self, row: int, parts: int) -> int:
        """The first of ``parts`` that become ``row``."""
        first, self.parts = self.parts, self.parts + parts
        self.merges.append((row, first, parts))
        return first

    def work(self) -> Work:
        return Work(
            _rows(self.queries, QUERY_FIELDS),
            _rows(self.items, ITEM_FIELDS),
            _rows(self.merges, MERGE_FIELDS),
            self.parts,
        )


def plan_work(
    batch: Batch, block_size: int, tile: int, *, split: int = SPLIT_TOKENS, share: bool = True
) -> Work:
    """Cut a step into items: prefill by tiles of ``tile`` queries, long decode rows by runs of keys, and what
    rows share apart if they ``share``."""
    groups = shared_prefixes(batch, block_size) if share else []
    if not groups and (batch.counts == 1).all() and int(batch.starts.max()) < split:
        return _decodes(batch)
    plan = _Plan()
    spans = list(zip(batch.first_row.tolist(), batch.counts.tolist(), batch.starts.tolist(), strict=True))
    grouped: set[int] = set()
    for members, shared in groups:
        _add_group(plan, members, [spans[member] for member in members], shared, tile, split)
        grouped.update(members)
    for table, (row, count, start) in enumerate(spans):
        if table in grouped:
            continue
        context = start + count
        if count == 1 and context > split:
            cuts = range(0, context, split)
            part = plan.merge(row, len(cuts))
            for i, cut in enumerate(cuts):
                plan.add([(row, start, part + i)], table, cut, min(cut + split, context))
            continue
        for at in reversed(range(0, count, tile)):  # the last tile sees the most keys: the longest work first
            end = min(at + tile, count)
            plan.add([(row + i, start + i, -1) for i in range(at, end)], table, 0, start + end)
    return plan.work()


def shared_prefixes(batch: Batch, block_size: int) -> list[tuple[list[int], int]]:
    """Sequences that decode and have their first keys in the same blocks, and how many keys those are.

    No sequence is in two groups; whoever is in none has no group to its advantage, or a better one is taken.
    """
    able = np.flatnonzero((batch.counts <= SHARING_COUNT) & (batch.starts >= SHARED_TOKENS))
    if len(able) < SHARERS:
        return []
    # Who shares enough shares this block; most steps end here, whose rows share none.
    at = batch.tables[able, max(0, SHARED_TOKENS // block_size - 1)]
    _, which, sizes = np.unique(at, return_inverse=True, return_counts=True)
    groups: list[tuple[list[int], int]] = []
    for each in np.flatnonzero(sizes >= SHARERS):
        alike = able[which == each]
        while len(alike) >= SHARERS and (found := _best_group(batch, alike, block_size)):
            groups.append(found)
            alike = np.setdiff1d(alike, found[0], assume_unique=True)
    return groups


def _best_group(batch: Batch, alike: NDArray[np.int64], block_size: int) -> tuple[list[int], int] | None:
    """Those that share most with the first: so many times so long that most is saved. None: too little."""
    equal = np.logical_and.accumulate(batch.tables[alike] == batch.tables[alike[0]], axis=1).sum(1)
    common = np.minimum(equal, batch.starts[alike] // block_size) * block_size
    longest = np.sort(common)[::-1]
    best = int((np.arange(len(alike)) * longest).argmax())
    if best + 1 < SHARERS or longest[best] < SHARED_TOKENS:
        return None
    return alike[common >= longest[best]].tolist(), int(longest[best])


def _add_group(
    plan: _Plan,
    members: Sequence[int],
    spans: Sequence[tuple[int, int, int]],
    shared: int,
    tile: int,
    split: int,
) -> None:
    common = range(0, shared, split)
    together: list[tuple[int, int, int]] = []
    alone: list[tuple[list[Query], int, int, int]] = []
    for table, (row, count, start) in zip(members, spans, strict=True):
        cuts = range(shared, start + count, split)
        firsts = [plan.merge(row + i, len(common) + len(cuts)) for i in range(count)]
        together += [(row + i, start + i, first) for i, first in enumerate(firsts)]
        for n, cut in enumerate(cuts, len(common)):
            own = [(row + i, start + i, first + n) for i, first in enumerate(firsts)]
            alone.append((own, table, cut, min(cut + split, start + count)))
    for n, cut in enumerate(common):
        for at in range(0, len(together), tile):
            queries = [(row, position, first + n) for row, position, first in together[at : at + tile]]
            plan.add(queries, members[0], cut, min(cut + split, shared))
    for item in alone:
        plan.add(*item)


def _decodes(batch: Batch) -> Work:
    n = len(batch.counts)
    queries, items = np.full((n, QUERY_FIELDS), -1, np.int32), np.zeros((n, ITEM_FIELDS), np.int32)
    queries[:, 0], queries[:, 1] = batch.first_row, batch.starts
    items[:, 0] = items[:, 2] = np.arange(n)
    items[:, 1], items[:, 4] = 1, batch.contexts
    return Work(queries, items, np.zeros((0, MERGE_FIELDS), np.int32), 0)


def _rows(values: Sequence[Sequence[int]], width: int) -> NDArray[np.int32]:
    return np.array(values, np.int32).reshape(-1, width)
