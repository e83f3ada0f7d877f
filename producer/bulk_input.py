"""A bulk input, checked whole before anything runs: each line is a valid row, or an error with its number.

Memory is bounded: a line at a time, and the custom_ids seen so far in a temporary SQLite file.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO, Protocol

from ..schemas.batch_lines import Row, claimed_custom_id, default_custom_id, parse_line
from ..schemas.errors import BadInput, DuplicateCustomId, ModelNotFound, PayloadTooLarge
from ..schemas.job import Priority
from ..schemas.result import ErrorInfo
from ..schemas.settings import Settings
from . import core

MAX_REPORTED = 20
ENVELOPE_BYTES = 4096
"""More than a job adds to the line it came from: shorter lines need no second look at their size."""
ESCAPED = 6
"""A character of 1 to 3 bytes may stand as a six-byte escape in the line."""


@dataclass(frozen=True, slots=True)
class LineError:
    """One line that is no valid row."""

    line: int
    custom_id: str
    error: ErrorInfo

    def __str__(self) -> str:
        return f"line {self.line}: {self.error.message} [{self.error.code}]"


@dataclass(slots=True)
class Checked:
    """What the whole input is. ``errors`` holds the first ``MAX_REPORTED``; ``invalid`` counts them all."""

    digest: str = ""
    size_bytes: int = 0
    rows: int = 0
    invalid: int = 0
    model: str | None = None
    """The model that rows name, if any does."""
    errors: list[LineError] = field(default_factory=list[LineError])
    duplicates: set[int] = field(default_factory=set[int])
    """Lines that are errors only because an earlier line has their custom_id."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a line must obey beyond its own form. ``models``: names a row may give; None: one, whichever."""

    settings: Settings
    models: frozenset[str] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Sampling for rows that do not say."""


class Lines(Protocol):
    """The one thing asked of an input."""

    def readline(self, limit: int, /) -> bytes:
        """Up to ``limit`` bytes, to the next newline at most; empty at the end."""
        ...


def read_lines(file: Lines, limit_bytes: int) -> Iterator[tuple[int, bytes | int]]:
    """(number, line) of each line that is not blank; of a line over the limit, its size."""
    number = 0
    while piece := file.readline(limit_bytes + 1):
        number += 1
        if len(piece) <= limit_bytes or piece.endswith(b"\n"):
            if line := piece.strip(b" \t\r\n"):
                yield number, (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            continue
        size = len(piece)
        while not piece.endswith(b"\n") and (piece := file.readline(1 << 20)):
            size += len(piece)
        yield number, size


def parse_row(number: int, line: bytes | int, rules: Rules) -> Row:
    """One row. Raises the BadInput that says what is wrong with its line, duplicates aside."""
    limit = rules.settings.max_payload_bytes
    if isinstance(line, int):
        raise PayloadTooLarge(size_bytes=line, limit_bytes=limit)
    row = parse_line(line, number, rules.defaults)
    model = row.request.model
    if model is not None and rules.models is not None and model not in rules.models:
        served = " or ".join(sorted(repr(name) for name in rules.models))
        raise ModelNotFound(
            f"model {model!r} is not the one of this run ({served}); change the line, or use --model {model}"
        )
    if len(line) + ENVELOPE_BYTES > limit:
        core.check_payload(
            core.job_of_row(row, "job_size", "m" * 256, Priority.BATCH, rules.settings, 0.0), limit
        )
    return row


def check(file: BinaryIO, rules: Rules) -> Checked:
    """Read the input to its end. Errors are collected; an empty input has ``rows == invalid == 0``."""
    found = Checked()
    hashing = _Hashing(file)
    with _Seen() as seen:
        for number, line in read_lines(hashing, line_limit(rules.settings)):
            try:
                row = parse_row(number, line, _with_model(rules, found.model))
                if found.model is None and rules.models is None:
                    found.model = row.request.model
                if (first := seen.add(row.custom_id, number)) is not None:
                    found.duplicates.add(number)
                    raise DuplicateCustomId(f"custom_id {row.custom_id!r} is that of line {first} already")
                found.rows += 1
            except BadInput as exc:
                found.invalid += 1
                if len(found.errors) < MAX_REPORTED:
                    found.errors.append(line_error(number, line, exc))
    found.digest, found.size_bytes = hashing.digest.hexdigest(), hashing.size_bytes
    return found


def line_error(number: int, line: bytes | int, exc: BadInput) -> LineError:
    """The error with what its line says of itself."""
    custom_id = claimed_custom_id(line) if isinstance(line, bytes) else None
    return LineError(number, custom_id or default_custom_id(number), ErrorInfo.of(exc))


def duplicate_error(number: int, row: Row) -> LineError:
    """The error of a line in ``Checked.duplicates``."""
    message = f"custom_id {row.custom_id!r} is that of an earlier line already"
    return LineError(number, row.custom_id, ErrorInfo(code=DuplicateCustomId.code, message=message))


def line_limit(settings: Settings) -> int:
    """Longer lines cannot be valid and are not held in memory."""
    return ESCAPED * settings.max_payload_bytes + ENVELOPE_BYTES


def _with_model(rules: Rules, model: str | None) -> Rules:
    if rules.models is not None or model is None:
        return rules
    return replace(rules, models=frozenset({model}))


class _Hashing:
    """A file that remembers the hash of what was read from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size_bytes = 0

    def readline(self, limit: int) -> bytes:
        piece = self._file.readline(limit)
        self.digest.update(piece)
        self.size_bytes += len(piece)
        return piece


class _Seen:
    """custom_id → the first line that has it. In memory while small, in an unlinked file when large."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)  # "": a private temporary file
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("CREATE TABLE seen (id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID")
        self._db.execute("BEGIN")

    def add(self, custom_id: str, line: int) -> int | None:
        """None if it is new, else the line that had it first."""
        cursor = self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (custom_id, line))
        if cursor.rowcount:
            return None
        return int(self._db.execute("SELECT line FROM seen WHERE id = ?", (custom_id,)).fetchone()[0])

    def __enter__(self) -> _Seen:
        return self

    def __exit__(self, *exc: object) -> None:
        self._db.close()
