"""Checked rows on their way to segments: a file without a name, written once and read once or twice."""

from __future__ import annotations

import hashlib
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO, Self, cast

from .twins import temporary_full

_HEAD = struct.Struct("<IBHIff")
_OFFSET = struct.Struct("<Q")
BUFFER_BYTES = 1 << 20
VALID, REFUSED = 0, 1


@dataclass(frozen=True, slots=True)
class Spooled:
    """A row. ``body``: its job in JSON without what only its batch knows; of a refused one, its error."""

    line: int
    custom_id: str
    body: bytes
    refused: bool = False
    prompt_tokens: float = 0.0
    """Estimates, like ``output_tokens``."""
    output_tokens: float = 0.0
    ordinal: int = -1
    """Its place among the rows of the spool, from 0."""


class Spool:
    """Rows in the order of the input, on disk. Gone however the process ends.

    ``indexed``: also keeps where each lies, for ``at``: 8 more bytes on disk.
    """

    def __init__(self, *, indexed: bool = False) -> None:
        self._stack = ExitStack()
        self._file = self._temporary()
        self._index = self._temporary() if indexed else None
        self._digest = hashlib.sha256()
        self._position = 0
        """Where the file stands while it is read in order; -1: elsewhere."""
        self.count = self.size_bytes = 0

    def add(self, row: Spooled) -> int:
        """Returns its ordinal. Raises Misconfigured when the disk is full."""
        custom_id = row.custom_id.encode("utf-8", "surrogatepass")
        head = _HEAD.pack(
            row.line,
            REFUSED if row.refused else VALID,
            len(custom_id),
            len(row.body),
            row.prompt_tokens,
            row.output_tokens,
        )
        data = head + custom_id + row.body
        self._digest.update(data)
        try:
            self._file.write(data)
            if self._index is not None:
                self._index.write(_OFFSET.pack(self.size_bytes))
        except OSError as exc:
            raise temporary_full(exc) from exc
        self.size_bytes += len(data)
        self.count += 1
        return self.count - 1

    @property
    def digest(self) -> str:
        """Of all rows: what the input says, in whatever form it says it."""
        return self._digest.hexdigest()

    def rows(self) -> Iterator[Spooled]:
        """All of them, from the first. Once at a time."""
        self._position = -1
        at = 0
        for ordinal in range(self.count):
            if self._position != at:
                self._file.seek(at)
            row, size = self._next(ordinal)
            self._position = at = at + size
            yield row

    def at(self, ordinal: int) -> Spooled:
        """One row, also while ``rows`` is being read."""
        assert self._index is not None, "the spool keeps no index"
        self._index.seek(ordinal * _OFFSET.size)
        self._file.seek(_OFFSET.unpack(self._index.read(_OFFSET.size))[0])
        self._position = -1
        return self._next(ordinal)[0]

    def _next(self, ordinal: int) -> tuple[Spooled, int]:
        head = self._file.read(_HEAD.size)
        line, kind, id_bytes, body_bytes, prompt_tokens, output_tokens = _HEAD.unpack(head)
        data = self._file.read(id_bytes + body_bytes)
        custom_id = data[:id_bytes].decode("utf-8", "surrogatepass")
        row = Spooled(
            line, custom_id, data[id_bytes:], kind == REFUSED, prompt_tokens, output_tokens, ordinal
        )
        return row, _HEAD.size + len(data)

    def _temporary(self) -> BinaryIO:
        return cast(
            "BinaryIO",
            self._stack.enter_context(tempfile.TemporaryFile(prefix="gristmill-", buffering=BUFFER_BYTES)),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
