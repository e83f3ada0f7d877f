"""Objects of finished rows, each sorted by line, as one sequence in the order of the input: a k-way merge.

Memory is bounded by MEMORY_BYTES and by one row of each object that is open at a time, whatever the rows.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self

from ..schemas.batch import ResultObject, unpack_lines
from ..schemas.errors import ResultsDamaged
from .object_lines import gone
from .store import ResultStore

FAN_IN = 256
"""Objects that are open at a time."""
MEMORY_BYTES = 64 * 1024 * 1024
MIN_SPAN_BYTES = 64 * 1024
MAX_SPAN_BYTES = 8 * 1024 * 1024
OPEN_AHEAD = 4
READERS = 8
_ID = re.compile(rb'\{"id":"batch_req_[A-Za-z0-9_-]+\.([0-9]{1,10})"')


@dataclass(frozen=True, slots=True)
class Piece:
    """An object of finished rows, sorted by line. ``first`` and ``last`` are lines of the input."""

    name: str
    size: int
    rows: int
    first: int
    last: int
    sha256: str | None = None
    """None: not known."""

    @classmethod
    def of(cls, accepted: ResultObject) -> Self:
        """An accepted object."""
        lines = unpack_lines(accepted.lines)
        return cls(accepted.name, accepted.bytes, accepted.rows, lines[0], lines[-1], accepted.sha256)


def line_number(line: bytes) -> int:
    """Of a finished row, in the input. Raises ResultsDamaged."""
    found = _ID.match(line)
    if found is None:
        raise ResultsDamaged(f"a line of {len(line):,} bytes does not begin with the id of a row")
    return int(found[1])


def overlap(pieces: Iterable[Piece]) -> int:
    """How many of them have to be open at once: as many as one line lies within."""
    open_until: list[int] = []
    most = 0
    for piece in sorted(pieces, key=lambda each: each.first):
        while open_until and open_until[0] < piece.first:
            heapq.heappop(open_until)
        heapq.heappush(open_until, piece.last)
        most = max(most, len(open_until))
    return most


def merged(store: ResultStore, pieces: Sequence[Piece]) -> Iterator[bytes]:
    """Their lines in the order of the input. Raises ResultsDamaged for a line that is there twice, or missing
    in an object, and what the store does.
    """
    span = max(MIN_SPAN_BYTES, min(MAX_SPAN_BYTES, MEMORY_BYTES // (2 * max(1, overlap(pieces)))))
    with ThreadPoolExecutor(READERS, thread_name_prefix="merge") as threads:
        opened = (_Source(store, piece, span, threads) for piece in sorted(pieces, key=lambda p: p.first))
        before = 0
        for number, line in _in_order(_ahead(opened, OPEN_AHEAD)):
            if number <= before:
                raise ResultsDamaged(f"line {number} of the input is there twice, or behind line {before}")
            before = number
            yield line


def _in_order(sources: Iterable[_Source]) -> Iterator[tuple[int, bytes]]:
    """``sources`` come by their first line, and are begun no sooner than it is their turn."""
    heap: list[tuple[int, int, bytes, Iterator[tuple[int, bytes]]]] = []

    def advance(order: int, rows: Iterator[tuple[int, bytes]]) -> None:
        following = next(rows, None)
        if following is not None:
            heapq.heappush(heap, (following[0], order, following[1], rows))

    def pop_until(limit: int | None) -> Iterator[tuple[int, bytes]]:
        while heap and (limit is None or heap[0][0] < limit):
            number, order, line, rows = heapq.heappop(heap)
            yield number, line
            advance(order, rows)

    for order, source in enumerate(sources):
        yield from pop_until(source.piece.first)
        advance(order, source.rows())
    yield from pop_until(None)


def _ahead(sources: Iterator[_Source], count: int) -> Iterator[_Source]:
    """The next ones are being read by the time it is their turn."""
    waiting: deque[_Source] = deque()
    for source in sources:
        waiting.append(source)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


class _Source:
    """One object, read in spans: the next one is under way while one is used."""

    def __init__(self, store: ResultStore, piece: Piece, span: int, threads: ThreadPoolExecutor) -> None:
        self.piece = piece
        self._store, self._span, self._threads = store, span, threads
        self._next = self._ask(0)

    def rows(self) -> Iterator[tuple[int, bytes]]:
        """Line numbers and lines."""
        count, rest, digest = 0, b"", hashlib.sha256()
        for data in self._spans():
            digest.update(data)
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                count += 1
                yield line_number(line), line + b"\n"
        check_piece(self.piece, rows=count, size=None, sha256=digest.hexdigest())
        if rest:
            raise ResultsDamaged(f"{self.piece.name} ends in the middle of a line")

    def _spans(self) -> Iterator[bytes]:
        for start in range(0, self.piece.size, self._span):
            data = self._next.result()
            if data is None:
                raise gone(self.piece.name)
            if start + self._span < self.piece.size:
                self._next = self._ask(start + self._span)
            yield data

    def _ask(self, start: int) -> Future[bytes | None]:
        return self._threads.submit(self._store.read, self.piece.name, start, self._span)


def check_piece(piece: Piece, *, rows: int, size: int | None, sha256: str) -> None:
    """Raises ResultsDamaged unless an object holds what was recorded of it. ``size`` None: not looked at."""
    if size not in (None, piece.size):
        raise ResultsDamaged(f"{piece.name} has {size:,} bytes, and {piece.size:,} were accepted")
    if piece.sha256 not in (None, sha256):
        raise ResultsDamaged(f"{piece.name} has another SHA-256 than what was accepted: it was changed")
    if rows != piece.rows:
        raise ResultsDamaged(f"{piece.name} has {rows:,} lines, and {piece.rows:,} were accepted")


def fewer(pieces: Sequence[Piece], join: Callable[[Sequence[Piece]], Piece]) -> list[Piece]:
    """As many as may be open at once, where ``join`` makes one of a group."""
    found = list(pieces)
    while overlap(found) > FAN_IN:
        found.sort(key=lambda piece: piece.first)
        groups = [found[i : i + FAN_IN] for i in range(0, len(found), FAN_IN)]
        found = [group[0] if len(group) == 1 else join(group) for group in groups]
    return found
