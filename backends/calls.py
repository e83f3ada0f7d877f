"""What State and AsyncState say to Redis and how they read the answers. No I/O: both share every line of it.

Field names of the state hash ``gm:{job}:state``, all values text:

``state``                      queued, running, or a final state
``digest``                     of the body, for idempotency
``model priority tenant submitted_at``   as submitted (unix seconds, by the submitter's clock)
``expires_at``                 unix seconds by the server's clock
``attempt attempts``           the number that may write; how many there were
``worker``                     who runs it
``started_at finished_at``     first claim and end, by the server's clock
``webhook``                    where to send an event at its end, if anywhere
``echo``                       what a result repeats of the job, as JSON, if it said anything
``cancel``                     there if somebody asked for a stop
``end``                        the log's ``end`` event
``result``                     the result's JSON, if small
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Generic, NamedTuple, TypeVar

from ..schemas import keys
from ..schemas.batch import row_of
from ..schemas.errors import IdempotencyConflict, JobNotFound
from ..schemas.events import Candidate, Delta, End, EntryId, Event, event_from_json
from ..schemas.job import Job, JobState, Priority
from ..schemas.status import JobStatus, ModelInfo, WorkerInfo
from ..schemas.webhook import EventType, event_data
from .outbox_script import with_outbox
from .script import Script, lua

T = TypeVar("T")

Entry = tuple[EntryId, Event]

EXPIRY_GRACE_S = 86_400.0
"""How long a job's keys outlive its ``expires_at``: somebody must still find it, and end it as expired."""

_TAIL_ENTRIES = 32
_ECHOED = ("endpoint", "custom_id", "retry_of", "metadata")
# Not part of what was asked for: when, under which id, and who reads along.
_NOT_IN_DIGEST = {"id", "v", "submitted_at", "expires_at", "stream"}


def _script(name: str) -> Script:
    """A Lua file, behind ``outbox.lua`` if it tells of an end and ``clock.lua`` if it tells the time."""
    text = lua(name)
    if "put_event(" in text:
        text = with_outbox(text)
    timed = "clock()" in text
    return Script.of(lua("clock") + text if timed else text, timed=timed)


SUBMIT, CLAIM, PUBLISH, FINISH, RELEASE = map(_script, ("submit", "claim", "publish", "finish", "release"))
CANCEL, CANCELLED, STATUS = map(_script, ("cancel", "cancelled", "status"))
STATES, DUE, LEAD, TIDY = map(_script, ("states", "due", "lead", "tidy"))
REGISTER, UNREGISTER = map(_script, ("register", "unregister"))


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One round trip: a command, or a script with its keys. ``parse`` reads the raw (RESP2, bytes) reply."""

    args: tuple[str | bytes | int, ...]
    parse: Callable[[Any], T]
    script: Script | None = None
    keys: tuple[str, ...] = ()
    mid_job: bool = False
    """A write of a running job: whatever the server answers is BrokerUnavailable."""


class Write(NamedTuple):
    """One entry of a running job's log. ``seq`` counts 1, 2, 3, … within an attempt, without holes."""

    job_id: str
    attempt: int
    seq: int
    event: str
    owner: str | None = None
    """Whose attempt it is: a row's segment; None: the job's own."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to run an attempt, and where the job stands. Unix seconds by the server's clock."""

    attempt: int
    now: float
    expires_at: float
    entries: list[Entry]
    """The log before this attempt."""
    cancelled: bool
    attempts: int
    """How often the job was claimed, this one included."""
    known: bool = True
    """False: the server had no record of the job, not even of its submission. It may have ended long ago."""


@dataclass(frozen=True, slots=True)
class Final:
    """The job has ended: nothing to run."""

    state: JobState


class Resubscribed:
    """The connection to a channel was lost and is back: what was published meanwhile is only in the log."""


class BatchStirred:
    """Something happened to the batch of a row that is followed; perhaps the row's end has joined it."""


# ---- jobs


def submit(job: Job) -> Call[bool]:
    def parse(reply: int) -> bool:
        if reply < 0:
            key = f"idempotency key {job.idempotency_key!r}" if job.idempotency_key else f"job id {job.id}"
            raise IdempotencyConflict(
                f"{key} was used before with another request; send the same one, or another key"
            )
        return reply == 1

    fields = {
        "model": job.model,
        "priority": job.priority.value,
        "tenant": job.tenant,
        "submitted_at": repr(job.submitted_at),
    }
    if echo := _echo(job):
        fields["echo"] = echo
    if job.webhook is not None:
        fields["webhook"] = job.webhook
    pairs = [part for pair in fields.items() for part in pair]
    lives_s = repr(job.expires_at - job.submitted_at)
    args = (body_digest(job), lives_s, round(EXPIRY_GRACE_S * 1000), job.id, *pairs)
    return Call(args, parse, SUBMIT, (keys.state(job.id), keys.DUE))


def _echo(job: Job) -> str:
    """What a result repeats of its job, for who ends it without having read the message; "" if nothing."""
    said = job.model_dump(mode="json", include=set(_ECHOED), exclude_defaults=True)
    if job.sampling.seed is not None:
        said["seed"] = job.sampling.seed
    if job.sampling.n > 1:
        said["n"] = job.sampling.n
    return json.dumps(said, separators=(",", ":")) if said else ""


def body_digest(job: Job) -> str:
    """Equal for two submissions that ask for the same."""
    body = job.model_dump(mode="json", exclude=_NOT_IN_DIGEST, exclude_defaults=True)
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def claim(
    job_id: str,
    worker_id: str,
    expires_at: float,
    webhook: str | None = None,
    submitted_at: float | None = None,
) -> Call[Claim | Final]:
    def parse(reply: list[Any]) -> Claim | Final:
        state = JobState(reply[0].decode())
        if state.final:
            return Final(state)
        _, attempt, now, cancelled, attempts, known, entries, expires_at = reply
        return Claim(
            attempt=int(attempt),
            now=float(now),
            expires_at=float(expires_at),
            entries=parse_entries(entries),
            cancelled=bool(cancelled),
            attempts=attempts,
            known=bool(known),
        )

    grace_ms = round(EXPIRY_GRACE_S * 1000)
    sent = "" if submitted_at is None else repr(submitted_at)
    args = (worker_id, json.dumps(worker_id), repr(expires_at), grace_ms, job_id, webhook or "", sent)
    return Call(args, parse, CLAIM, (keys.state(job_id), keys.log(job_id), keys.DUE))


def publish(writes: Sequence[Write]) -> Call[set[str]]:
    # Entries of one attempt stand together, in order; two attempts of a job are two blocks.
    ordered = sorted(writes, key=lambda w: (w.job_id, w.attempt, w.seq))
    names: list[str] = []
    script_keys: list[str] = []
    args: list[str | int] = []
    for (job_id, attempt), block in groupby(ordered, key=lambda w: (w.job_id, w.attempt)):
        of_job = list(block)
        entries = [part for write in of_job for part in (write.seq, write.event)]
        names.append(job_id)
        script_keys += keys.state(of_job[0].owner or job_id), keys.log(job_id)
        args += attempt, len(entries) // 2, *entries

    def parse(reply: list[int]) -> set[str]:
        return {names[position - 1] for position in reply}

    return Call(tuple(args), parse, PUBLISH, tuple(script_keys), mid_job=True)


_EVENT_OF = {
    JobState.SUCCEEDED: EventType.JOB_COMPLETED,
    JobState.FAILED: EventType.JOB_FAILED,
    JobState.CANCELLED: EventType.JOB_CANCELLED,
    JobState.EXPIRED: EventType.JOB_EXPIRED,
}


def finish(
    job_id: str,
    end: End,
    inline_result: str | None,
    result_ttl_s: float,
    about: Mapping[str, Any] | None = None,
) -> Call[bool]:
    """``about``: what its webhook is told besides, if it has one."""
    assert end.state.final, f"job {job_id}: {end.state} is not a final state"
    event = (_EVENT_OF[end.state].value, _told(job_id, end, about or {}))
    args = (end.state.value, end.to_json(), round(result_ttl_s * 1000), inline_result or "", job_id, *event)
    return Call(args, bool, FINISH, (keys.state(job_id), keys.log(job_id), keys.DUE), mid_job=True)


def _told(job_id: str, end: End, about: Mapping[str, Any]) -> str:
    """What a webhook is told of a job's end: thin, as OpenAI's events are, and no text of the output."""
    usage = end.usage
    required = {
        "id": job_id,
        "status": end.state.value,
        "finish_reason": end.finish_reason.value if end.finish_reason else None,
        "usage": usage.model_dump() | {"total_tokens": usage.total_tokens},
    }
    error = end.error.model_dump(exclude_none=True) if end.error else None
    return event_data(required, {"error": error, "result": end.result, **about})


def release(job_id: str, attempt: int) -> Call[bool]:
    return Call((attempt,), bool, RELEASE, (keys.state(job_id), keys.log(job_id)), mid_job=True)


def cancel(job_id: str, model: str | None) -> Call[JobState]:
    def parse(reply: bytes | None) -> JobState:
        if reply is None:
            raise JobNotFound(f"job {job_id} is unknown here: it expired, or its result's time is over")
        return JobState(reply.decode())

    args = (job_id, keys.control(""), model or "", keys.KEEPER)
    return Call(args, parse, CANCEL, (keys.state(job_id), keys.DUE))


def cancelled(job_ids: Sequence[str]) -> Call[set[str]]:
    def parse(reply: list[int]) -> set[str]:
        return {job_ids[position - 1] for position in reply}

    return Call((), parse, CANCELLED, tuple(keys.state(job_id) for job_id in job_ids))


def states(job_ids: Sequence[str]) -> Call[list[JobState | None]]:
    def parse(reply: list[bytes | None]) -> list[JobState | None]:
        return [None if value is None else JobState(value.decode()) for value in reply]

    return Call((), parse, STATES, tuple(keys.state(job_id) for job_id in job_ids))


_STATUS_FIELDS = (
    "state",
    "model",
    "priority",
    "tenant",
    "submitted_at",
    "expires_at",
    "started_at",
    "finished_at",
    "attempt",
    "attempts",
    "worker",
    "cancel",
    "end",
)


def status(job_id: str) -> Call[JobStatus | None]:
    def parse(reply: list[Any]) -> JobStatus | None:
        values, tail = reply
        texts = {n: v.decode() for n, v in zip(_STATUS_FIELDS, values, strict=True) if v is not None}
        if "state" not in texts:
            return None
        return _status(job_id, texts, parse_entries(tail))

    return Call((_TAIL_ENTRIES, *_STATUS_FIELDS), parse, STATUS, (keys.state(job_id), keys.log(job_id)))


def _status(job_id: str, texts: dict[str, str], tail: list[Entry]) -> JobStatus:
    def seconds(name: str) -> float | None:
        return float(texts[name]) if name in texts else None

    end = End.from_json(texts["end"]) if "end" in texts else None
    return JobStatus(
        job_id=job_id,
        state=JobState(texts["state"]),
        model=texts.get("model"),
        priority=Priority(texts["priority"]) if "priority" in texts else None,
        tenant=texts.get("tenant"),
        submitted_at=seconds("submitted_at"),
        expires_at=seconds("expires_at"),
        started_at=seconds("started_at"),
        finished_at=seconds("finished_at"),
        attempt=int(texts.get("attempt", 0)),
        attempts=int(texts.get("attempts", 0)),
        tokens=end.usage.completion_tokens if end else output_tokens(tail),
        worker=texts.get("worker"),
        cancel_requested="cancel" in texts,
        finish_reason=end.finish_reason if end else None,
        usage=end.usage if end else None,
        error=end.error if end else None,
        result=end.result if end else None,
    )


def output_tokens(last_first: list[Entry]) -> int:
    """Tokens of output, by the last entry of each choice among the log's last ones."""
    ends: dict[int, int] = {}
    for _, event in last_first:
        if isinstance(event, Delta | Candidate):
            ends.setdefault(event.choice, event.offset + len(event.ids))
    return sum(ends.values())


# ---- jobs that nobody runs


@dataclass(frozen=True, slots=True)
class Due:
    """A job whose time has come, or that somebody asked to stop. Unix seconds."""

    job_id: str
    state: JobState | None
    """None: the server knows nothing of it any more."""
    owned: bool
    """A live worker runs it, and will end it."""
    cancelled: bool
    expires_at: float
    """By the server's clock."""
    submitted_at: float
    attempts: int
    model: str
    echo: dict[str, Any]
    """Those of endpoint, custom_id, retry_of, metadata, seed and n that the job has."""


_DUE_FIELDS = ("state", "cancel", "expires_at", "submitted_at", "attempts", "model", "echo")


def due(limit: int, job_ids: Sequence[str] = ()) -> Call[tuple[float, list[Due]]]:
    """Up to ``limit`` of them, the longest due first, or those named; and the server's time."""

    def parse(reply: list[Any]) -> tuple[float, list[Due]]:
        now_ms, *rows = reply
        return now_ms / 1000, [_due(*row) for row in rows]

    args = (limit, keys.state("%s"), keys.worker("%s"), len(_DUE_FIELDS), *_DUE_FIELDS, *job_ids)
    return Call(args, parse, DUE, (keys.DUE,))


def _due(job_id: bytes, owned: int, values: list[bytes | None]) -> Due:
    texts = {n: v.decode() for n, v in zip(_DUE_FIELDS, values, strict=True) if v is not None}
    return Due(
        job_id=job_id.decode(),
        state=JobState(texts["state"]) if "state" in texts else None,
        owned=bool(owned) and texts.get("state") == JobState.RUNNING,
        cancelled="cancel" in texts,
        expires_at=float(texts.get("expires_at", 0)),
        submitted_at=float(texts.get("submitted_at", 0)),
        attempts=int(texts.get("attempts", 0)),
        model=texts.get("model", ""),
        echo=json.loads(texts.get("echo", "{}")),
    )


def defer(job_id: str, until: float) -> Call[object]:
    """Look at it again then (unix seconds by the server's clock), unless it has ended by now."""
    return Call(("ZADD", keys.DUE, "XX", round(until * 1000), job_id), bool)


def not_due(job_ids: Sequence[str]) -> Call[object]:
    return Call(("ZREM", keys.DUE, *job_ids), bool)


def lead(token: str, ttl_s: float) -> Call[bool]:
    """``ttl_s`` 0: lead no longer."""
    return Call((token, round(ttl_s * 1000)), bool, LEAD, (keys.KEEPER,))


def tidy() -> Call[int]:
    return Call((), int, TIDY, (keys.WORKERS,))


# ---- logs and results


def read_log(job_id: str, after: EntryId | None, count: int) -> Call[list[Entry]]:
    start = "-" if after is None else f"({after}"
    return Call(("XRANGE", keys.log(job_id), start, "+", "COUNT", count), _parse_xrange)


def result(job_id: str) -> Call[str | None]:
    return Call(("HGET", keys.state(job_id), "result"), _optional_text)


def parse_entries(rows: list[Any]) -> list[Entry]:
    """Raw stream entries (from a script), ``[id, [field, value]]``."""
    return [(EntryId.parse(row[0]), event_from_json(row[1][1])) for row in rows]


def _parse_xrange(rows: list[tuple[bytes, dict[bytes, bytes]]]) -> list[Entry]:
    return [(EntryId.parse(entry_id), event_from_json(fields[b"d"])) for entry_id, fields in rows]


def told_beside(job_id: str) -> tuple[str, ...]:
    """Channels that tell of a job beside its log's: the end of a row is an event of its batch."""
    row = row_of(job_id)
    return () if row is None else (keys.batch_events(row[0]),)


def parse_message(message: dict[str, Any], log: str) -> Entry | Resubscribed | BatchStirred | None:
    """What came over a job's channels, of which ``log`` has its entries. None: nothing that concerns a
    follower.
    """
    if message["type"] == "subscribe":
        return Resubscribed()
    if message["type"] != "message":
        return None
    if message["channel"].decode() != log:
        return BatchStirred()
    entry_id, _, event = message["data"].partition(b" ")
    return EntryId.parse(entry_id), event_from_json(event)


def parse_cancellation(message: dict[str, Any]) -> str | None:
    """The job id of a cancellation announced on a control channel."""
    if message["type"] != "message":
        return None
    verb, _, job_id = message["data"].decode("utf-8", "replace").partition(" ")
    return job_id if verb == "cancel" else None


def _optional_text(reply: bytes | None) -> str | None:
    return None if reply is None else reply.decode()


# ---- workers and models


def register(worker_id: str, info: WorkerInfo, ttl_s: float, now: float) -> Call[object]:
    model = ModelInfo(queues=info.queues, max_model_len=info.max_model_len, seen_at=now).to_json()
    pairs = [part for name in info.models for part in (name, model)]
    args = (worker_id, round(ttl_s * 1000), info.to_json(), *pairs)
    return Call(args, bool, REGISTER, (keys.WORKERS, keys.worker(worker_id), keys.MODELS))


def announce(model: str, info: ModelInfo) -> Call[bool]:
    return Call(("HSETNX", keys.MODELS, model, info.to_json()), bool)


def unregister(worker_id: str) -> Call[object]:
    return Call((worker_id,), bool, UNREGISTER, (keys.WORKERS, keys.worker(worker_id)))


def models() -> Call[dict[str, ModelInfo]]:
    def parse(reply: dict[bytes, bytes]) -> dict[str, ModelInfo]:
        return {name.decode(): ModelInfo.from_json(body) for name, body in reply.items()}

    return Call(("HGETALL", keys.MODELS), parse)


def worker_ids() -> Call[list[str]]:
    return Call(("ZRANGE", keys.WORKERS, 0, -1), lambda reply: [worker_id.decode() for worker_id in reply])


def workers(ids: Sequence[str]) -> Call[dict[str, WorkerInfo]]:
    """Those of ``ids`` that are alive: the others' descriptions have expired."""

    def parse(reply: list[bytes | None]) -> dict[str, WorkerInfo]:
        return {
            worker_id: WorkerInfo.from_json(body)
            for worker_id, body in zip(ids, reply, strict=True)
            if body is not None
        }

    return Call(("MGET", *map(keys.worker, ids)), parse)
