"""A bulk input, checked whole before anything is sent: each record is a row or an error with its line.

Memory does not depend on the input: rows go to a spool on disk, and lines that say the same as an earlier one
are found there, too.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ...schemas.batch import MAX_REPORTED, LineProblem
from ...schemas.batch_lines import MAX_CUSTOM_ID_CHARS, claimed_custom_id, default_custom_id, fields_of
from ...schemas.errors import (
    BadInput,
    DuplicateCustomId,
    FileTooLarge,
    InvalidRequest,
    ModelNotFound,
    PayloadTooLarge,
    TooManyTasks,
)
from ...schemas.result import ErrorInfo
from ...schemas.settings import Settings
from .molds import Made, Molds, content_of
from .records import Record, Shape
from .spool import Spool, Spooled
from .twins import Lines, Twins

ENVELOPE_BYTES = 4096
"""More than a job adds to the line it came from."""
ESCAPED = 6
"""A character of 1 to 3 bytes may stand as a six-byte escape in the line."""
CODES = frozenset(
    [
        "invalid_json_line",
        "missing_required_parameter",
        "invalid_method",
        "url_mismatch",
        "duplicate_custom_id",
        "model_not_found",
        "empty_file",
        "too_many_tasks",
        "file_too_large",
        "context_length_exceeded",
        "invalid_schema",
        "invalid_request",
    ]
)
"""What a batch's record calls the problems of its input; any other one is an ``invalid_request``."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """One line that is no valid row."""

    line: int
    custom_id: str
    error: ErrorInfo

    @property
    def problem(self) -> LineProblem:
        """As a batch's record tells it."""
        code = self.error.code if self.error.code in CODES else InvalidRequest.code
        return LineProblem(code=code, message=self.error.message, param=self.error.param, line=self.line)

    def __str__(self) -> str:
        return f"line {self.line}: {self.error.message} [{self.problem.code}]"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a line must obey beyond its own form."""

    settings: Settings
    models: frozenset[str] | None = None
    """Names that a row may give; None: one, whichever."""
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Sampling for rows that do not say."""
    shape: Shape = field(default_factory=Shape)
    dedupe: bool = False
    """Find rows that ask for the same, to have them computed once."""
    max_errors: int = MAX_REPORTED
    max_rows: int = 10_000_000
    max_bytes: int = 1 << 40


@dataclass(slots=True)
class Checked:
    """What the whole input is. ``errors`` holds the first ``max_errors``; ``invalid`` counts them all."""

    digest: str = ""
    rows: int = 0
    invalid: int = 0
    prompt_tokens: float = 0.0
    """Estimates, like ``output_tokens``."""
    output_tokens: float = 0.0
    model: str | None = None
    """The model that rows name, if any does …"""
    model_line: int = 0
    """… and the first line that does."""
    endpoint: str | None = None
    """The first row's."""
    errors: list[Refusal] = field(default_factory=list[Refusal])
    duplicates: Lines = field(default_factory=Lines)
    """Rows, by their place in the spool, that are errors only because an earlier one has their custom_id."""
    copies: int = 0
    """With ``dedupe``: rows that ask for what an earlier one asks for."""


def line_limit(settings: Settings) -> int:
    """Longer lines cannot be valid and are not held in memory."""
    return ESCAPED * settings.max_payload_bytes + ENVELOPE_BYTES


def check(records: Iterable[tuple[int, Record]], rules: Rules, spool: Spool, same: Twins | None) -> Checked:
    """Read the input to its end, rows into ``spool``, and what each asks for into ``same``.

    Errors are collected; an empty input has ``rows == invalid == 0``. Raises BadInput for an input that
    cannot be read, and FileTooLarge and TooManyTasks when it is known to be over its limit.
    """
    found = Checked()
    molds = Molds(rules.settings, rules.defaults)
    with Twins() as ids:
        for number, record in records:
            try:
                row = check_record(number, record, rules, molds, found)
            except BadInput as exc:
                _add_refused(refuse(number, record, exc), rules, found, spool)
            else:
                place = _add(number, row, found, spool)
                ids.add(row.custom_id.encode("utf-8", "surrogatepass"), place)
                if same is not None:
                    same.add(content_of(row.body), place)
            if spool.count > rules.max_rows:
                raise TooManyTasks(rows=rules.max_rows, line=number)
            if spool.size_bytes > rules.max_bytes:
                raise FileTooLarge(limit_bytes=rules.max_bytes, line=number)
        _refuse_duplicates(ids, rules, found, spool)
    found.digest = spool.digest
    return found


def check_record(number: int, record: Record, rules: Rules, molds: Molds, earlier: Checked) -> Made:
    """One row. Raises the BadInput that says what is wrong with its record, duplicates aside."""
    limit = rules.settings.max_payload_bytes
    if isinstance(record, BadInput):
        raise record
    if isinstance(record, int):
        raise PayloadTooLarge(size_bytes=record, limit_bytes=limit)
    if isinstance(record, dict):
        fields = rules.shape.fields(record)
    else:
        fields = fields_of(record)
        if rules.shape.active:
            fields = rules.shape.fields(fields)
    row = molds.make(number, fields)
    _check_model(row.model, rules, earlier)
    if len(row.body) + ENVELOPE_BYTES > limit:
        raise PayloadTooLarge(size_bytes=len(row.body) + ENVELOPE_BYTES, limit_bytes=limit)
    return row


def _check_model(model: str | None, rules: Rules, earlier: Checked) -> None:
    if model is None:
        return
    if rules.models is None and earlier.model not in (None, model):
        raise ModelNotFound(
            f"model {model!r} is not that of line {earlier.model_line} ({earlier.model!r}), "
            "and a file runs on one; change the line"
        )
    if rules.models is not None and model not in rules.models:
        served = " or ".join(sorted(repr(name) for name in rules.models))
        raise ModelNotFound(
            f"model {model!r} is not the one of this run ({served}); change the line, or use --model {model}"
        )


@contextmanager
def naming_the_line(found: Checked, asked: str | None) -> Generator[None]:
    """Around the look for a model: where a row named it, and nobody ``asked`` for one, say which."""
    try:
        yield
    except ModelNotFound as exc:
        if asked is not None or found.model is None:
            raise
        raise ModelNotFound(
            f"line {found.model_line} names a model that is not here: {exc.message}; "
            "or use --model, and name no other one in the lines"
        ) from exc


def _add(number: int, row: Made, found: Checked, spool: Spool) -> int:
    if found.model is None and row.model is not None:
        found.model, found.model_line = row.model, number
    found.endpoint = found.endpoint or row.endpoint
    found.rows += 1
    found.prompt_tokens += row.prompt_tokens
    found.output_tokens += row.output_tokens
    return spool.add(Spooled(number, row.custom_id, row.body, False, row.prompt_tokens, row.output_tokens))


def _add_refused(refusal: Refusal, rules: Rules, found: Checked, spool: Spool) -> None:
    found.invalid += 1
    if len(found.errors) < rules.max_errors:
        found.errors.append(refusal)
    error = refusal.error.model_dump_json().encode()
    spool.add(Spooled(refusal.line, refusal.custom_id, error, refused=True))


def refuse(number: int, record: Record, exc: BadInput) -> Refusal:
    """The error with what its record says of itself."""
    claimed = claimed_custom_id(record) if isinstance(record, bytes) else None
    if isinstance(record, dict) and isinstance(said := record.get("custom_id"), str):
        claimed = said if len(said) <= MAX_CUSTOM_ID_CHARS else None
    return Refusal(number, claimed or default_custom_id(number), ErrorInfo.of(exc))


def duplicate(line: int, custom_id: str, first: int | None = None) -> Refusal:
    """The refusal of a row in ``Checked.duplicates``."""
    where = "an earlier line" if first is None else f"line {first}"
    message = f"custom_id {custom_id!r} is that of {where} already"
    return Refusal(line, custom_id, ErrorInfo(code=DuplicateCustomId.code, message=message))


def _refuse_duplicates(ids: Twins, rules: Rules, found: Checked, spool: Spool) -> None:
    """The first errors stay those of the lowest lines."""
    lowest: list[tuple[int, int]] = []  # the last place first, as negative numbers
    for place, first in ids.pairs():
        found.duplicates.add(place)
        heapq.heappush(lowest, (-place, first))
        if len(lowest) > rules.max_errors:
            heapq.heappop(lowest)
    if not lowest:
        return
    firsts = {-place: first for place, first in lowest}
    lines, last = dict.fromkeys(firsts.values(), 0), max(firsts)
    found.rows -= found.duplicates.count
    found.invalid += found.duplicates.count
    for row in spool.rows():
        if row.ordinal in lines:
            lines[row.ordinal] = row.line
        if row.ordinal in firsts:
            found.errors.append(duplicate(row.line, row.custom_id, lines[firsts[row.ordinal]]))
        if row.ordinal == last:
            break
    found.errors = sorted(found.errors, key=lambda each: each.line)[: rules.max_errors]
