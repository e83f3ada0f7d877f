"""What Batches says to Redis and how it reads the answers. No I/O.

Field names of the hash ``gm:{batch}:batch``, all values text:

``spec``                       the ``Batch`` as its client opened it, JSON
``model status``               a BatchStatus
``closing``                    ``expired`` once its time is up, until it is final
``paused reason``              there if it is paused; an ErrorInfo, JSON
``total completed failed``     rows
``prompt_tokens completion_tokens cached_tokens``   of accepted rows
``segments unvalidated``       how many; how many of them were not looked at
``asked``                      how often a segment asked for a message
``validated planned_tokens problems``   rows, tokens, problems found by validation
``webhook webhook_every webhook_told``   where events go; percent of the rows between two, told so far
``stop_after``                 failed rows at which it cancels itself, or nothing
``created_at expires_at in_progress_at …``   unix seconds
``until``                      ms: when all its keys go
``finalizer finalizer_until``  who makes it final, and for how long nobody else may
``trouble trouble_at``         what keeps it from becoming final, an ErrorInfo, JSON; unix seconds
``joined``                     the last objects that joined without a segment
``output error_output manifest``   names in the result store

A segment's state hash has ``state attempt attempts worker`` as a job's, ``validated`` and ``joined``. Once it
was validated, ``attempts`` counts anew.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..schemas import keys
from ..schemas.batch import (
    Batch,
    BatchEvent,
    BatchStatus,
    LineProblem,
    LineSet,
    Phase,
    RequestCounts,
    ResultObject,
    SegmentInfo,
    batch_event_from_json,
    batch_of,
    unpack_lines,
)
from ..schemas.errors import IdempotencyConflict, JobNotFound
from ..schemas.events import EntryId
from ..schemas.job import JobState, Priority
from ..schemas.result import ErrorInfo, Usage
from ..schemas.status import JobStatus
from .calls import EXPIRY_GRACE_S, Call, Entry, Resubscribed, output_tokens, parse_entries
from .outbox_script import with_outbox
from .script import Script, lua

BatchEntry = tuple[EntryId, BatchEvent]

_LOG_ENTRIES = 32
_NAMES = {
    "batch": keys.batch("%s"),
    "rows": keys.batch_rows("%s"),
    "objects": keys.batch_objects("%s"),
    "segments": keys.batch_segments("%s"),
    "unsent": keys.batch_unsent("%s"),
    "stopped": keys.batch_stopped("%s"),
    "errors": keys.batch_errors("%s"),
    "events": keys.batch_events("%s"),
    "state": keys.state("%s"),
    "log": keys.log("%s"),
    "worker": keys.worker("%s"),
    "control": keys.control("%s"),
    "batches": keys.BATCHES,
    "due": keys.BATCHES_DUE,
    "keeper": keys.KEEPER,
}


def _script(name: str) -> Script:
    common = lua("batch_common")
    for placeholder, key in _NAMES.items():
        common = common.replace(f"'{{{placeholder}}}'", f"'{key}'")
    return Script.of(lua("clock") + with_outbox(common + lua(name)), timed=True)


OPEN, GET, CLAIM, BEGIN_ROWS, VALIDATED = map(
    _script, ("batch_open", "batch_get", "batch_claim", "batch_begin_rows", "batch_validated")
)
BEGIN, ACCEPT, SPLIT, RELEASE, END_SEGMENT = map(
    _script, ("batch_begin", "batch_accept", "batch_split", "batch_release", "batch_end_segment")
)
STANDING, CANCEL, CANCEL_ROW, PAUSE, EXPIRE = map(
    _script, ("batch_standing", "batch_cancel", "batch_cancel_row", "batch_pause", "batch_expire")
)
BEGIN_FINALIZE, COMPLETE, ROW, DELETE, SENT = map(
    _script, ("batch_begin_finalize", "batch_complete", "batch_row", "batch_delete", "batch_sent")
)
SILENT, ASK, TROUBLE = map(_script, ("batch_silent", "batch_ask", "batch_trouble"))
LIST, DEFER = Script.of(lua("batch_list")), Script.of(lua("batch_defer"))
DUE = Script.of(lua("clock") + lua("batch_due"), timed=True)


@dataclass(frozen=True, slots=True)
class SegmentClaim:
    """The right to run an attempt at a segment. Unix seconds by the server's clock."""

    attempt: int
    attempts: int
    """At this phase, this one included."""
    now: float
    phase: Phase
    batch: Batch
    """As it was opened: counts are not those of now."""
    expires_at: float
    info: SegmentInfo
    ended: LineSet
    """Rows that have their line in an accepted object, as far as they can be the segment's."""
    stopped: frozenset[int]
    """Lines that were cancelled one by one."""


@dataclass(frozen=True, slots=True)
class NoClaim:
    """Nothing to run. The message may go in each case."""

    why: str
    """``unknown``: no such batch or segment; ``over``: it needs nothing more; ``paused``: it gets another
    message.
    """


@dataclass(frozen=True, slots=True)
class Accepted:
    """The objects joined; where the batch stands now."""

    completed: int
    failed: int
    standing: Standing


@dataclass(frozen=True, slots=True)
class Refused:
    """Nothing changed: these lines have ended before. Write the objects without them, and accept those."""

    lines: frozenset[int]


@dataclass(frozen=True, slots=True)
class Standing:
    """What whoever runs a batch's rows must know."""

    status: BatchStatus | None
    """None: nothing is known of it any more."""
    closing: bool = False
    """Its time is up."""
    paused: bool = False
    stopped: frozenset[int] = frozenset()
    """Lines that were cancelled one by one."""

    @property
    def over(self) -> bool:
        """Nothing more of it is to run."""
        return self.closing or self.status not in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)


@dataclass(frozen=True, slots=True)
class DueBatch:
    """A batch that a keeper must look at. Unix seconds by the server's clock."""

    id: str
    status: BatchStatus | None
    """None: nothing is known of it any more."""
    closing: bool
    """Its time is up: once nobody runs rows of it, it is made final as expired."""
    paused: bool
    unvalidated: int
    """Segments."""
    left: int
    """Rows that have not ended."""
    unsent: int
    """Segments that need a message."""
    running: int
    """Segments that live workers run, told only of a batch that is to stop: they are about to hand in what
    they have.
    """
    expires_at: float
    model: str


# ---- a batch's life


def open_batch(batch: Batch, segments: Sequence[SegmentInfo]) -> Call[bool]:
    def parse(reply: int) -> bool:
        if reply < 0:
            raise IdempotencyConflict(f"batch {batch.id} was opened before with another description")
        return reply == 1

    parts = [part for info in segments for part in (info.id, info.to_json())]
    args = (
        batch.id,
        batch.to_json(),
        batch.model,
        repr(batch.completion_window_s),
        round((EXPIRY_GRACE_S + batch.options.retention_s) * 1000),
        batch.request_counts.total,
        _stop_after(batch),
        len(segments),
        *parts,
    )
    return Call(args, parse, OPEN)


def _stop_after(batch: Batch) -> int | str:
    """Failed rows at which it ends, whichever option says fewer."""
    options, total = batch.options, batch.request_counts.total
    limits = [] if options.stop_after_failed is None else [options.stop_after_failed]
    if options.stop_after_share is not None:
        limits.append(max(1, round(options.stop_after_share * total)))
    return min(limits, default="")


def get(batch_id: str) -> Call[Batch | None]:
    return Call((batch_id,), _parse_batch, GET)


_TIMES = tuple(name for name in Batch.model_fields if name.endswith("_at"))
_FILES = ("output", "error_output", "manifest")
_COUNTS = ("problems", "planned_tokens", "validated", "segments")


def _parse_batch(reply: list[Any]) -> Batch | None:
    flat, problems = reply
    texts = {name.decode(): value.decode() for name, value in zip(flat[::2], flat[1::2], strict=True)}
    if "spec" not in texts:
        return None

    def number(name: str) -> int:
        return int(texts.get(name, 0))

    now: dict[str, Any] = {name: float(texts[name]) for name in _TIMES if name in texts}
    now |= {name: texts[name] for name in _FILES if name in texts}
    now |= {name: number(name) for name in _COUNTS}
    now["status"] = BatchStatus(texts["status"])
    now["paused"] = "paused" in texts
    now["reason"] = ErrorInfo.from_json(texts["reason"]) if "reason" in texts else None
    now["trouble"] = ErrorInfo.from_json(texts["trouble"]) if "trouble" in texts else None
    now["request_counts"] = RequestCounts(
        total=number("total"), completed=number("completed"), failed=number("failed")
    )
    now["usage"] = Usage(**{name: number(name) for name in Usage.model_fields})
    now["errors"] = tuple(LineProblem.from_json(problem) for problem in problems)
    return Batch.from_json(texts["spec"]).model_copy(update=now)


def list_batches(after: str | None, limit: int) -> Call[list[str]]:
    return Call((after or "", limit), _texts, LIST, (keys.BATCHES,))


def forget(batch_ids: Sequence[str]) -> Call[object]:
    """Take batches off the list whose records have gone."""
    return Call(("ZREM", keys.BATCHES, *batch_ids), bool)


def exists(batch_id: str) -> Call[bool]:
    return Call(("EXISTS", keys.batch(batch_id)), bool)


def begin(batch: Batch, retention_s: float) -> Call[BatchStatus | None]:
    fails = "1" if batch.options.on_invalid == "fail" else ""
    return Call((batch.id, fails, round(retention_s * 1000)), _status, BEGIN)


def cancel(batch_id: str, reason: ErrorInfo | None) -> Call[BatchStatus]:
    return Call((batch_id, reason.to_json() if reason else ""), _known(batch_id), CANCEL)


def cancel_row(batch_id: str, line: int) -> Call[bool]:
    def parse(reply: int | None) -> bool:
        if reply is None:
            raise _unknown(batch_id)
        return reply == 1

    return Call((batch_id, line), parse, CANCEL_ROW)


def pause(batch_id: str, *, paused: bool) -> Call[BatchStatus]:
    return Call((batch_id, "1" if paused else ""), _known(batch_id), PAUSE)


def expire(batch_id: str) -> Call[bool]:
    return Call((batch_id,), bool, EXPIRE)


def delete(batch_id: str) -> Call[bool]:
    return Call((batch_id,), bool, DELETE)


def _status(reply: bytes | None) -> BatchStatus | None:
    return None if reply is None else BatchStatus(reply.decode())


def _known(batch_id: str) -> Any:
    def parse(reply: bytes | None) -> BatchStatus:
        if reply is None:
            raise _unknown(batch_id)
        return BatchStatus(reply.decode())

    return parse


def _unknown(batch_id: str) -> JobNotFound:
    return JobNotFound(f"batch {batch_id} is unknown here: its time is over, or it was never opened")


def _texts(reply: list[bytes]) -> list[str]:
    return [item.decode() for item in reply]


# ---- a segment's


def claim(segment_id: str, worker_id: str) -> Call[SegmentClaim | NoClaim]:
    def parse(reply: list[Any]) -> SegmentClaim | NoClaim:
        word = reply[0].decode()
        if len(reply) == 1:
            return NoClaim(word)
        _, attempt, attempts, now, spec, expires_at, made_of, bits, stopped = reply
        info = SegmentInfo.from_json(made_of)
        return SegmentClaim(
            attempt=int(attempt),
            attempts=attempts,
            now=float(now),
            phase=Phase(word),
            batch=Batch.from_json(spec),
            expires_at=float(expires_at),
            info=info,
            ended=LineSet(bits, info.first // 8),
            stopped=frozenset(map(int, stopped)),
        )

    return Call((batch_of(segment_id), segment_id, worker_id), parse, CLAIM)


def begin_rows(
    segment_id: str, attempt: int, worker_id: str, lines: Sequence[int]
) -> Call[list[list[Entry]] | None]:
    def parse(reply: list[Any] | None) -> list[list[Entry]] | None:
        return None if reply is None else [parse_entries(entries) if entries else [] for entries in reply]

    args = (batch_of(segment_id), segment_id, attempt, json.dumps(worker_id), *lines)
    return Call(args, parse, BEGIN_ROWS, mid_job=True)


def validated(
    segment_id: str,
    attempt: int,
    *,
    rows: int,
    tokens: int,
    problems: Sequence[LineProblem],
    count: int,
    told: int,
) -> Call[bool]:
    """``problems``: the first of ``count``; the record keeps ``told`` in all."""
    told_here = [problem.to_json() for problem in problems[:told]]
    args = (batch_of(segment_id), segment_id, attempt, rows, tokens, count, told, *told_here)
    return Call(args, bool, VALIDATED, mid_job=True)


def accept(
    batch_id: str, segment_id: str, attempt: int | str, objects: Sequence[ResultObject]
) -> Call[Accepted | Refused | None]:
    def parse(reply: list[Any]) -> Accepted | Refused | None:
        word, *rest = reply
        if word == b"fenced":
            return None
        if word == b"refused":
            return Refused(frozenset(rest))
        completed, failed, status, closing, paused = rest
        standing = Standing(BatchStatus(status.decode()), bool(closing), bool(paused))
        return Accepted(completed, failed, standing)

    args: list[str | bytes | int] = [batch_id, segment_id, attempt, len(objects)]
    for each in objects:
        lines = unpack_lines(each.lines)
        usage = each.usage
        tokens = usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens
        args += [
            each.name,
            each.to_json(),
            each.kind,
            each.rows,
            *tokens,
            struct.pack(f">{len(lines)}I", *lines),
        ]
    return Call(tuple(args), parse, ACCEPT, mid_job=True)


def split(segment_id: str, attempt: int, kept: SegmentInfo, given: SegmentInfo) -> Call[bool]:
    args = (batch_of(segment_id), segment_id, attempt, kept.to_json(), given.id, given.to_json())
    return Call(args, bool, SPLIT, mid_job=True)


def release(segment_id: str, attempt: int, running: Sequence[int], *, unsent: bool) -> Call[bool]:
    args = (batch_of(segment_id), segment_id, attempt, "1" if unsent else "", *running)
    return Call(args, bool, RELEASE, mid_job=True)


def end_segment(segment_id: str, attempt: int) -> Call[bool]:
    return Call((batch_of(segment_id), segment_id, attempt), bool, END_SEGMENT, mid_job=True)


def standing(batch_id: str) -> Call[Standing]:
    def parse(reply: list[Any]) -> Standing:
        status, closing, paused, stopped = reply
        lines = frozenset(map(int, stopped))
        return Standing(_status(status), closing is not None, paused is not None, lines)

    return Call((batch_id,), parse, STANDING)


def unsent(batch_id: str, limit: int) -> Call[dict[str, int]]:
    def parse(reply: list[bytes]) -> dict[str, int]:
        return {name.decode(): int(mark) for name, mark in zip(reply[::2], reply[1::2], strict=True)}

    return Call(("ZRANGE", keys.batch_unsent(batch_id), 0, limit - 1, "WITHSCORES"), parse)


def sent(batch_id: str, marks: Mapping[str, int]) -> Call[int]:
    return Call((batch_id, *(part for each in marks.items() for part in each)), int, SENT)


def silent(batch_id: str) -> Call[dict[str, int]]:
    def parse(reply: list[bytes]) -> dict[str, int]:
        return {name.decode(): int(attempt) for name, attempt in zip(reply[::2], reply[1::2], strict=True)}

    return Call((batch_id,), parse, SILENT)


def ask(batch_id: str, attempts: Mapping[str, int]) -> Call[int]:
    return Call((batch_id, *(part for each in attempts.items() for part in each)), int, ASK)


def segments(batch_id: str) -> Call[list[SegmentInfo]]:
    def parse(reply: list[bytes]) -> list[SegmentInfo]:
        return [SegmentInfo.from_json(info) for info in reply]

    return Call(("HVALS", keys.batch_segments(batch_id)), parse)


# ---- for keepers

_DUE_FIELDS = (
    "status",
    "closing",
    "paused",
    "unvalidated",
    "total",
    "completed",
    "failed",
    "expires_at",
    "model",
)


def due(limit: int) -> Call[tuple[float, list[DueBatch]]]:
    def parse(reply: list[Any]) -> tuple[float, list[DueBatch]]:
        now_ms, *rows = reply
        return now_ms / 1000, [_due(*row) for row in rows]

    templates = ("batch", "unsent", "segments", "state", "worker")
    args = (limit, *(_NAMES[name] for name in templates), len(_DUE_FIELDS), *_DUE_FIELDS)
    return Call(args, parse, DUE, (keys.BATCHES_DUE,))


def _due(batch_id: bytes, values: list[bytes | None], waiting: int, running: int) -> DueBatch:
    texts = {n: v.decode() for n, v in zip(_DUE_FIELDS, values, strict=True) if v is not None}
    ended = int(texts.get("completed", 0)) + int(texts.get("failed", 0))
    return DueBatch(
        id=batch_id.decode(),
        status=BatchStatus(texts["status"]) if "status" in texts else None,
        closing="closing" in texts,
        paused="paused" in texts,
        unvalidated=int(texts.get("unvalidated", 0)),
        left=int(texts.get("total", 0)) - ended,
        unsent=waiting,
        running=running,
        expires_at=float(texts.get("expires_at", 0)),
        model=texts.get("model", ""),
    )


def defer(batch_id: str, until: float, seen_at: float) -> Call[bool]:
    return Call((batch_id, round(seen_at * 1000), round(until * 1000)), bool, DEFER, (keys.BATCHES_DUE,))


def not_due(batch_ids: Sequence[str]) -> Call[object]:
    return Call(("ZREM", keys.BATCHES_DUE, *batch_ids), bool)


def begin_finalize(batch_id: str, token: str, lease_s: float) -> Call[BatchStatus | None]:
    return Call((batch_id, token, round(lease_s * 1000)), _status, BEGIN_FINALIZE)


def complete(
    batch_id: str,
    token: str,
    retention_s: float,
    *,
    output: str | None,
    error_output: str | None,
    manifest: str | None,
) -> Call[BatchStatus | None]:
    files = (output or "", error_output or "", manifest or "")
    return Call((batch_id, token, round(retention_s * 1000), *files), _status, COMPLETE)


def trouble(batch_id: str, what: ErrorInfo) -> Call[bool]:
    return Call((batch_id, what.to_json()), bool, TROUBLE)


def objects(batch_id: str, start: int, count: int) -> Call[list[ResultObject]]:
    def parse(reply: list[bytes]) -> list[ResultObject]:
        return [ResultObject.from_json(body) for body in reply]

    return Call(("LRANGE", keys.batch_objects(batch_id), start, start + count - 1), parse)


def object_count(batch_id: str) -> Call[int]:
    return Call(("LLEN", keys.batch_objects(batch_id)), int)


def ended(batch_id: str) -> Call[LineSet]:
    return Call(("GET", keys.batch_rows(batch_id)), lambda reply: LineSet(reply or b""))


# ---- one row


def row_ended(batch_id: str, line: int) -> Call[bool]:
    return Call(("GETBIT", keys.batch_rows(batch_id), line), bool)


@dataclass(frozen=True, slots=True)
class RowStanding:
    """What is known of a row without its result."""

    ended: bool
    status: JobStatus
    """Of a row that has ended: as if it still ran; which object it is in tells how it ended."""


def row(batch_id: str, line: int) -> Call[RowStanding | None]:
    def parse(reply: list[Any] | None) -> RowStanding | None:
        if reply is None:
            return None
        _, ended, stopped, spec, expires_at, created_at, tail = reply
        batch, entries = Batch.from_json(spec), parse_entries(tail)
        status = JobStatus(
            job_id=f"{batch_id}.{line}",
            state=JobState.RUNNING if entries else JobState.QUEUED,
            model=batch.model,
            priority=Priority.BATCH,
            tenant=batch.tenant,
            submitted_at=float(created_at),
            expires_at=float(expires_at),
            attempt=entries[0][0].attempt if entries else 0,
            tokens=output_tokens(entries),
            cancel_requested=bool(stopped),
        )
        return RowStanding(bool(ended), status)

    return Call((batch_id, line, _LOG_ENTRIES), parse, ROW)


def ended_as(status: JobStatus, held: ResultObject, line: int) -> JobStatus:
    """Of a row that lies in ``held``."""
    state = JobState.SUCCEEDED if held.kind == "output" else JobState.FAILED
    for packed, early in ((held.cancelled, JobState.CANCELLED), (held.expired, JobState.EXPIRED)):
        if line in unpack_lines(packed):
            state = early
    return status.model_copy(update={"state": state, "result": held.name, "attempt": held.attempt})


# ---- events


def read_events(batch_id: str, after: EntryId | None, count: int) -> Call[list[BatchEntry]]:
    def parse(rows: list[tuple[bytes, dict[bytes, bytes]]]) -> list[BatchEntry]:
        return [(EntryId.parse(entry_id), batch_event_from_json(said[b"d"])) for entry_id, said in rows]

    start = "-" if after is None else f"({after}"
    return Call(("XRANGE", keys.batch_events(batch_id), start, "+", "COUNT", count), parse)


def parse_event_message(message: dict[str, Any]) -> BatchEntry | Resubscribed | None:
    """What came over a batch's channel. None: nothing that concerns a follower."""
    if message["type"] == "subscribe":
        return Resubscribed()
    if message["type"] != "message":
        return None
    entry_id, _, event = message["data"].partition(b" ")
    return EntryId.parse(entry_id), batch_event_from_json(event)
