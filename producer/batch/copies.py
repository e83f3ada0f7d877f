"""Rows that ask for what an earlier one asks for, so that it is computed once: who copies whom, on disk."""

from __future__ import annotations

import heapq
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import pairwise, starmap
from typing import Any, BinaryIO, Self, cast

from .twins import Lines, Twins, temporary_full

CHUNK_PAIRS = 100_000
_PAIR = struct.Struct(">QQ")
PAGE_BYTES = 512 * _PAIR.size


class Copies:
    """Asked for by ordinals of the spool, leaders in ascending order: a merge of sorted files feeds it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._are = Lines()
        self._file: BinaryIO | None = None
        self._ends = [0]
        """Of the sorted chunks in it, in bytes; each begins where the one before it ends."""
        self._pairs: Iterator[tuple[int, int]] = iter(())
        self._next: tuple[int, int] | None = None

    def find(self, same: Twins, refused: Lines) -> None:
        """Take over what ``same`` found, but for rows that are ``refused``.

        Raises Misconfigured when the disk is full.
        """
        chunk: list[tuple[int, int]] = []
        for copy, leader in _allowed(same.pairs(), refused):
            self._are.add(copy)
            chunk.append((leader, copy))
            if len(chunk) >= CHUNK_PAIRS:
                self._write(chunk)
                chunk = []
        chunk.sort()
        self._pairs = heapq.merge(*starmap(self._read, pairwise(self._ends)), chunk)
        self._next = next(self._pairs, None)

    @property
    def count(self) -> int:
        """Rows that are copies."""
        return self._are.count

    def __contains__(self, ordinal: int) -> bool:
        return ordinal in self._are

    def of(self, leader: int) -> list[int]:
        """The copies of a row, ascending. Ask for greater and greater leaders only."""
        found: list[int] = []
        while self._next is not None and self._next[0] <= leader:
            if self._next[0] == leader:
                found.append(self._next[1])
            self._next = next(self._pairs, None)
        return found

    def _write(self, chunk: list[tuple[int, int]]) -> None:
        chunk.sort()
        try:
            if self._file is None:
                file = tempfile.TemporaryFile(prefix="gristmill-")  # noqa: SIM115 - closed by the stack
                self._stack.callback(file.close)
                self._file = cast("BinaryIO", file)
            self._file.write(b"".join(_PAIR.pack(*pair) for pair in chunk))
            self._file.flush()
        except OSError as exc:
            raise temporary_full(exc) from exc
        self._ends.append(self._ends[-1] + len(chunk) * _PAIR.size)

    def _read(self, start: int, end: int) -> Iterator[tuple[Any, ...]]:
        """A chunk, page by page: others are read in between."""
        assert self._file is not None, "a chunk was written somewhere"
        for at in range(start, end, PAGE_BYTES):
            self._file.seek(at)
            yield from _PAIR.iter_unpack(self._file.read(min(PAGE_BYTES, end - at)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def _allowed(pairs: Iterable[tuple[int, int]], refused: Lines) -> Iterator[tuple[int, int]]:
    """Without those; where the first of some equal rows is refused, the next one leads."""
    group, leader = -1, -1
    for copy, first in pairs:
        if first != group:
            group, leader = first, -1 if first in refused else first
        if copy in refused:
            continue
        if leader < 0:
            leader = copy
        else:
            yield copy, leader
