"""Follow one job: its log first, then live, without a gap or a repetition, to its end.

``Replica`` knows what the log says and what the caller was shown, ``_protocol`` decides what comes next;
neither does any I/O. ``follow`` and ``follow_async`` carry out what ``_protocol`` asks for.
``schemas/README.md`` describes the same protocol for other languages.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..backends.state import LOG_PAGE, AsyncState, BatchStirred, Entry, Resubscribed, State
from ..schemas.errors import (
    BrokerUnavailable,
    GristmillError,
    JobNotFound,
    StoreUnavailable,
    WaitTimeout,
)
from ..schemas.events import EntryId
from ..schemas.result import Result
from ..schemas.status import JobStatus
from .replica import BEGINNING, Chunk, Final, Item, Replica

IDLE_S = 15.0
"""Silence after which the log and the job's state are looked at."""
OUTAGE_S = 60.0
"""How long a state server may be away before the follower gives up."""
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 2.0


# ---- what to do next


@dataclass(frozen=True, slots=True)
class _Subscribe:
    """To the job's channel, and wait for the confirmation. Answer: None."""


@dataclass(frozen=True, slots=True)
class _ReadLog:
    """One page of it. Answer: entries."""

    after: EntryId | None


@dataclass(frozen=True, slots=True)
class _Next:
    """The channel's next message. Answer: an entry, Resubscribed, or None after ``timeout_s``."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class _Status:
    """Answer: JobStatus or None."""

    silence: bool
    """It is asked because nothing comes."""


@dataclass(frozen=True, slots=True)
class _Joined:
    """Has this row's line joined its batch? Answer: bool."""


@dataclass(frozen=True, slots=True)
class _Fetch:
    """Answer: the result's JSON, or None."""


@dataclass(frozen=True, slots=True)
class _Sleep:
    """Answer: None."""

    seconds: float


_Ask: TypeAlias = _Subscribe | _ReadLog | _Next | _Status | _Joined | _Fetch | _Sleep
_Steps: TypeAlias = Generator[_Ask | Item, Any, None]


def _protocol(
    job_id: str, last: EntryId | None, timeout_s: float | None, idle_s: float, clock: Callable[[], float]
) -> _Steps:
    """Subscribe, read the log, go on live; after a break of the connection do the same again."""
    replica = Replica(last)
    deadline = float("inf") if timeout_s is None else clock() + timeout_s
    away_since: float | None = None
    pause_s = RECONNECT_MIN_S
    while True:
        try:
            yield _Subscribe()
            yield from _catch_up(replica)
            if replica.end is None and (not replica.running or (yield _Joined())):
                yield from _look_up(job_id, replica, silence=replica.after is None)
            away_since, pause_s = None, RECONNECT_MIN_S
            while replica.end is None:
                yield from _live(job_id, replica, deadline, idle_s, clock)
            yield from _conclude(job_id, replica)
            return
        except BrokerUnavailable:
            away_since = clock() if away_since is None else away_since
            if clock() >= min(deadline, away_since + OUTAGE_S):
                raise
            yield _Sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, RECONNECT_MAX_S)


def _catch_up(replica: Replica) -> _Steps:
    """Read the log from where we are to its end, or to the job's."""
    while replica.end is None:
        entries: list[Entry] = yield _ReadLog(replica.after)
        yield from replica.read(entries)
        if len(entries) < LOG_PAGE:
            break
    yield from replica.caught_up()


def _live(
    job_id: str, replica: Replica, deadline: float, idle_s: float, clock: Callable[[], float]
) -> _Steps:
    """One message, or the lack of one. A row's log goes with its end: its follower has to ask for that even
    while text must come, which may have been missed.
    """
    over = False
    message: Entry | Resubscribed | BatchStirred | None = yield _Next(
        max(0.0, min(idle_s, deadline - clock()))
    )
    pieces = replica.live(*message) if isinstance(message, tuple) else None
    if pieces is not None:
        yield from pieces
    elif isinstance(message, BatchStirred):
        over = yield _Joined()
    else:  # a gap, a new attempt, a new connection, or a long silence
        yield from _catch_up(replica)
        again = isinstance(message, Resubscribed)
        over = message is None or (again and (not replica.running or (yield _Joined())))
    if replica.end is None and clock() >= deadline:
        raise WaitTimeout(f"job {job_id} has not ended yet; it goes on, follow it from {replica.after or 0}")
    if replica.end is None and over:
        yield from _look_up(job_id, replica, silence=message is None)


def _look_up(job_id: str, replica: Replica, *, silence: bool) -> _Steps:
    """Nothing comes, or its log may be over: is the job still to end? Queued or running it is, whoever runs
    it now or next. A row has no end in its log, which goes when the row's line joins the batch.
    """
    status: JobStatus | None = yield _Status(silence)
    if status is not None and not status.state.final:
        return
    yield from _catch_up(replica)  # it may have ended while we asked
    if replica.end is not None:
        return
    body: str | bytes | None = yield _Fetch()
    if body is None:
        raise JobNotFound(f"job {job_id} is unknown here: it expired, or its result's time is over")
    yield from replica.snapshot(Result.from_json(body))


def _conclude(job_id: str, replica: Replica) -> _Steps:
    assert replica.end is not None
    if not replica.complete:
        body: str | bytes | None = yield _Fetch()
        if body is None:
            raise StoreUnavailable(
                f"job {job_id} has ended; a part of its log is lost and its result cannot be read here"
            )
        yield from replica.snapshot(Result.from_json(body))
    yield Final(replica.after or BEGINNING, replica.end)


# ---- doing it


def follow(
    state: State,
    job_id: str,
    last: EntryId | None = None,
    *,
    fetch: Callable[[str], str | bytes | None] | None = None,
    timeout_s: float | None = None,
    idle_s: float = IDLE_S,
    on_silence: Callable[[], object] = lambda: None,
) -> Iterator[Item]:
    """Yield a job's pieces as they are made, then one Final. Attach early, late, or again from ``last``.

    ``fetch`` finds the result by job id where the log is gone; by default only the state server is asked.
    ``on_silence`` is called when nothing has come for ``idle_s``, again and again.
    Raises JobNotFound, WaitTimeout after ``timeout_s`` in all, BrokerUnavailable after an outage of
    ``OUTAGE_S``, StoreUnavailable. A failed job is no exception here: the Final says so.
    """
    steps = _protocol(job_id, last, timeout_s, idle_s, time.monotonic)
    with ExitStack() as stack:
        subscription = None
        answer: Any = None
        error: GristmillError | None = None
        while True:
            try:
                step = steps.send(answer) if error is None else steps.throw(error)
            except StopIteration:
                return
            answer = error = None
            try:
                match step:
                    case Chunk() | Final():
                        yield step
                    case _Next(seconds):
                        assert subscription is not None
                        answer = subscription.get(seconds)
                    case _ReadLog(after):
                        answer = state.read_log(job_id, after)
                    case _Subscribe():
                        stack.close()
                        subscription = stack.enter_context(state.subscribe(job_id))
                    case _Status(silence):
                        answer = state.status(job_id)
                        if silence:
                            on_silence()
                    case _Joined():
                        answer = state.row_ended(job_id)
                    case _Fetch():
                        answer = (fetch or state.result)(job_id)
                    case _Sleep(seconds):
                        time.sleep(seconds)
            except BrokerUnavailable as exc:
                error = exc


async def follow_async(
    state: AsyncState,
    job_id: str,
    last: EntryId | None = None,
    *,
    fetch: Callable[[str], Awaitable[str | bytes | None]] | None = None,
    timeout_s: float | None = None,
    idle_s: float = IDLE_S,
    on_silence: Callable[[], Awaitable[object]] | None = None,
) -> AsyncGenerator[Item]:
    """``follow`` for asyncio. Close it (``contextlib.aclosing``) if you leave before the end."""
    steps = _protocol(job_id, last, timeout_s, idle_s, time.monotonic)
    async with AsyncExitStack() as stack:
        subscription = None
        answer: Any = None
        error: GristmillError | None = None
        while True:
            try:
                step = steps.send(answer) if error is None else steps.throw(error)
            except StopIteration:
                return
            answer = error = None
            try:
                match step:
                    case Chunk() | Final():
                        yield step
                    case _Next(seconds):
                        assert subscription is not None
                        answer = await subscription.get(seconds)
                    case _ReadLog(after):
                        answer = await state.read_log(job_id, after)
                    case _Subscribe():
                        await stack.aclose()
                        subscription = await stack.enter_async_context(state.subscribe(job_id))
                    case _Status(silence):
                        answer = await state.status(job_id)
                        if silence and on_silence is not None:
                            await on_silence()
                    case _Joined():
                        answer = await state.row_ended(job_id)
                    case _Fetch():
                        answer = await (fetch or state.result)(job_id)
                    case _Sleep(seconds):
                        await asyncio.sleep(seconds)
            except BrokerUnavailable as exc:
                error = exc
