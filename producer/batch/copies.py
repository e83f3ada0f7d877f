"""Rows that ask for what an earlier one asks for, so that it is computed once: who copies whom, on disk."""

from __future__ import annotations

import heapq
import struct
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO, Self, cast

from .twins import Lines, Twins, temporary_full

CHUNK_PAIRS = 100_000
_PAIR = struct.Struct(">QQ")


class Copies:
    """Asked for by ordinals of the spool, leaders in ascending order: a merge of sorted files feeds it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._are = Lines()
        self._chunks: list[BinaryIO] = []
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
        self._pairs = heapq.merge(*map(_read, self._chunks), chunk)
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
            file = tempfile.TemporaryFile(prefix="gristmill-")  # noqa: SIM115 - closed by the stack
            self._stack.callback(file.close)
            file.write(b"".join(_PAIR.pack(*pair) for pair in chunk))
            file.seek(0)
        except OSError as exc:
            raise temporary_full(exc) from exc
        self._chunks.append(cast("BinaryIO", file))

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


def _read(file: BinaryIO) -> Iterator[tuple[Any, ...]]:
    while data := file.read(_PAIR.size * 512):
        yield from _PAIR.iter_unpack(data)
