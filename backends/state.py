"""State: a job's log, its state and attempt, and the registry of workers, in Redis. START HERE.

Every change is one script in ``lua/``. The attempt number is the only right to write: ``claim`` hands it
out, and ``publish`` refuses whoever holds an older one. Scripts that touch many jobs (``publish``,
``cancelled``) or the registry need one server, or a primary with replicas; a Redis Cluster would need a call
per slot.

Every method raises BrokerUnavailable while the server does not answer or refuses to write, and Misconfigured
where only a change of settings helps (never in the writes of a running job).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self, TypeVar

import redis
import redis.asyncio
from redis.exceptions import NoScriptError

from ..schemas import keys
from ..schemas.batch import BatchEvent, row_of, unpack_lines
from ..schemas.errors import BrokerUnavailable, JobNotFound, Misconfigured
from ..schemas.events import End, EntryId
from ..schemas.job import Job, JobState
from ..schemas.settings import Settings
from ..schemas.status import JobStatus, ModelInfo, WorkerInfo
from . import batch_calls, calls
from .batches import PAGE, Batches
from .calls import BatchStirred, Call, Claim, Due, Entry, Final, Resubscribed, Write
from .embedded import Embedded
from .redis import connect, connect_async, redis_errors
from .script import Script, run_script

__all__ = [
    "AsyncState",
    "AsyncSubscription",
    "BatchStirred",
    "Claim",
    "Clock",
    "Due",
    "Entry",
    "Final",
    "JobStatus",
    "ModelInfo",
    "Resubscribed",
    "State",
    "Subscription",
    "WorkerInfo",
    "Write",
    "open_async_state",
    "open_state",
]

T = TypeVar("T")
LOG_PAGE = 1000
Clock = Callable[[], float]
"""Unix seconds."""
_WHERE = "state server"


class State:
    """For threads: one object for the whole process. ``clock`` replaces the server's in tests of time."""

    def __init__(
        self,
        client: redis.Redis,
        settings: Settings,
        embedded: Embedded | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._client, self._settings, self._embedded = client, settings, embedded
        self._clock = clock
        self.batches = Batches(
            self._run, lambda channel: Subscription(client, channel, settings.connect_timeout_s)
        )

    # ---- a job's life

    def submit(self, job: Job) -> bool:
        """Record the job as queued. False: it is known already.

        Raises IdempotencyConflict if it is known with another body.
        """
        return self._run(calls.submit(job))

    def claim(
        self,
        job_id: str,
        worker_id: str,
        expires_at: float,
        webhook: str | None = None,
        submitted_at: float | None = None,
    ) -> Claim | Final:
        """Begin an attempt, and fence all earlier ones; or learn that the job is final. What is said besides
        is the message's: it counts if the server has lost the job's record.

        Repeated after a lost reply it begins yet another attempt, which is harmless.
        """
        return self._run(calls.claim(job_id, worker_id, expires_at, webhook, submitted_at))

    def publish(self, writes: Sequence[Write]) -> set[str]:
        """Append to the logs of many jobs and tell their followers, in one call. Returns the jobs refused.

        A refusal is for good: a newer attempt stands in the state, or the job is final, or the server lost
        the state or the end of the log (this attempt's right went with it, and the next attempt continues
        from what is left). Entries that stand in the log already are skipped, so a call may be repeated after
        any error.
        """
        return self._run(calls.publish(writes)) if writes else set()

    def finish(
        self,
        job_id: str,
        end: End,
        inline_result: str | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> bool:
        """Make the job final, and queue the event for its webhook in the same step; its result object must be
        durable. ``about``: see calls.finish. False: it was final already.
        """
        return self._run(calls.finish(job_id, end, inline_result, self._settings.result_ttl_s, about))

    def release(self, job_id: str, attempt: int) -> bool:
        """Hand a running job back. False: it is not this attempt's any more."""
        return self._run(calls.release(job_id, attempt))

    def cancel(self, job_id: str, model: str | None = None) -> JobState:
        """Ask a job, or a batch's row, to stop; returns the state as it is now. Raises JobNotFound."""
        try:
            return self._run(calls.cancel(job_id, model))
        except JobNotFound:
            if (row := row_of(job_id)) is None or (status := self.batches.row(job_id)) is None:
                raise
            self.batches.cancel_row(*row)
            return status.state

    def cancelled(self, job_ids: Sequence[str]) -> set[str]:
        """Those of ``job_ids`` that were asked to stop."""
        return self._run(calls.cancelled(job_ids)) if job_ids else set()

    def status(self, job_id: str) -> JobStatus | None:
        """Of a job, or of a batch's row. None: nothing is known under this id (any more)."""
        return self._run(calls.status(job_id)) or self.batches.row(job_id)

    def states(self, job_ids: Sequence[str]) -> list[JobState | None]:
        """The states of many jobs in one call, in order; a few thousand at a time. None: unknown."""
        return self._run(calls.states(job_ids)) if job_ids else []

    def row_ended(self, job_id: str) -> bool:
        """Whether this is a batch's row whose line has joined the batch. Cheap."""
        row = row_of(job_id)
        return row is not None and self._run(batch_calls.row_ended(*row))

    def read_log(self, job_id: str, after: EntryId | None = None, count: int = LOG_PAGE) -> list[Entry]:
        """Up to ``count`` entries after ``after`` (None: from the first)."""
        return self._run(calls.read_log(job_id, after, count))

    def result(self, job_id: str) -> str | None:
        """The result's JSON, if it was small enough to be kept here."""
        return self._run(calls.result(job_id))

    def subscribe(self, job_id: str) -> Subscription:
        """Live entries of a job: a context manager; what is published after entering it is not missed."""
        timeout_s = self._settings.connect_timeout_s
        return Subscription(self._client, keys.log(job_id), timeout_s, calls.told_beside(job_id))

    # ---- jobs that nobody runs

    def due(self, limit: int) -> tuple[float, list[Due]]:
        """The server's time, and jobs that were to have ended by then, or were cancelled."""
        return self._run(calls.due(limit))

    def look(self, job_ids: Sequence[str]) -> tuple[float, list[Due]]:
        """The same of the jobs named, due or not."""
        return self._run(calls.due(0, job_ids))

    def defer(self, job_id: str, until: float) -> None:
        """See calls.defer."""
        self._run(calls.defer(job_id, until))

    def not_due(self, job_ids: Sequence[str]) -> None:
        """Nobody need look at these: they have ended, or nothing is known of them."""
        if job_ids:
            self._run(calls.not_due(job_ids))

    def lead(self, token: str, ttl_s: float) -> bool:
        """Become or stay the leader of the keepers for ``ttl_s``; 0: no longer. False: another one leads."""
        return self._run(calls.lead(token, ttl_s))

    def tidy(self) -> int:
        """Forget workers whose heartbeat ended. Returns how many."""
        return self._run(calls.tidy())

    def wakings(self) -> Subscription:
        """What wakes the keepers: a job that was cancelled."""
        return Subscription(self._client, keys.KEEPER, self._settings.connect_timeout_s)

    # ---- workers and models

    def register(self, worker_id: str, info: WorkerInfo, ttl_s: float) -> None:
        """A heartbeat: alive for ``ttl_s`` from now."""
        self._run(calls.register(worker_id, info, ttl_s, time.time()))

    def unregister(self, worker_id: str) -> None:
        """Leave at once. The models stay known."""
        self._run(calls.unregister(worker_id))

    def announce(self, model: str, queues: Sequence[str]) -> bool:
        """Make a model known before its first worker is there. False: it is known already."""
        return self._run(calls.announce(model, ModelInfo(queues=tuple(queues), seen_at=time.time())))

    def models(self) -> dict[str, ModelInfo]:
        """Every model that some worker ever announced here."""
        return self._run(calls.models())

    def workers(self) -> dict[str, WorkerInfo]:
        """Who is alive, by worker id."""
        ids = self._run(calls.worker_ids())
        return self._run(calls.workers(ids)) if ids else {}

    def alive(self, model: str) -> list[WorkerInfo]:
        """Live workers that serve ``model``."""
        return [info for info in self.workers().values() if model in info.models]

    def cancellations(self, model: str, stop: threading.Event, poll_s: float = 0.25) -> Iterator[str]:
        """Job ids as their cancellation is announced, until ``stop`` is set.

        What is announced while the connection is broken is missed: ``cancelled`` tells.
        """
        with Subscription(self._client, keys.control(model), self._settings.connect_timeout_s) as channel:
            while not stop.is_set():
                message = channel.get_raw(poll_s)
                if message is not None and (job_id := calls.parse_cancellation(message)) is not None:
                    yield job_id

    # ---- the connection

    def ping(self) -> None:
        """Raises BrokerUnavailable unless the server answers."""
        self._run(Call(("PING",), bool))

    def revive(self) -> None:
        """Start the embedded server again if its supervisor was killed; does nothing to any other server.

        Raises BrokerUnavailable, Misconfigured.
        """
        if self._embedded is not None:
            self._embedded.start()

    def close(self) -> None:
        """Close the connections, and leave the embedded server if it was opened here."""
        with redis_errors(_WHERE):
            self._client.close()
        if self._embedded is not None:
            self._embedded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _run(self, call: Call[T]) -> T:
        client: Any = self._client
        with redis_errors(_WHERE, always_transient=call.mid_job):
            if call.script is None:
                reply = client.execute_command(*call.args)
            else:
                reply = run_script(client, call.script, *call.args, *self._time(call.script), keys=call.keys)
        return call.parse(reply)

    def _time(self, script: Script) -> tuple[str | int, ...]:
        if not script.timed:
            return ()
        return ("",) if self._clock is None else (round(self._clock() * 1000),)


class Subscription:
    """One channel, and ``beside`` it others that tell of the same. Entering it waits for the server's
    confirmation: of all at once, so that nothing comes in between.
    """

    def __init__(
        self, client: redis.Redis, channel: str, confirm_timeout_s: float, beside: Sequence[str] = ()
    ) -> None:
        self._channel, self._beside, self._confirm_timeout_s = channel, beside, confirm_timeout_s
        self._pubsub: Any = client.pubsub()  # pyright: ignore[reportUnknownMemberType]  (**kwargs)

    def __enter__(self) -> Self:
        try:
            with redis_errors(_WHERE):
                self._pubsub.subscribe(self._channel, *self._beside)
                confirmed = [
                    self._pubsub.get_message(timeout=self._confirm_timeout_s)
                    for _ in (self._channel, *self._beside)
                ]
            if None in confirmed:
                raise BrokerUnavailable(f"{_WHERE}: no confirmation within {self._confirm_timeout_s:g} s")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        with suppress(BrokerUnavailable), redis_errors(_WHERE):
            self._pubsub.close()

    def get(self, timeout_s: float) -> Entry | Resubscribed | BatchStirred | None:
        """The next entry; Resubscribed after a break; None: nothing within ``timeout_s``."""
        message = self.get_raw(timeout_s)
        return None if message is None else calls.parse_message(message, self._channel)

    def get_raw(self, timeout_s: float) -> dict[str, Any] | None:
        """The next message as redis-py gives it."""
        with redis_errors(_WHERE):
            return self._pubsub.get_message(timeout=timeout_s)


class AsyncState:
    """What a client needs of State, for asyncio. Belongs to one event loop."""

    def __init__(
        self, client: redis.asyncio.Redis, settings: Settings, embedded: Embedded | None = None
    ) -> None:
        self._client, self._settings, self._embedded = client, settings, embedded

    async def submit(self, job: Job) -> bool:
        """See State.submit."""
        return await self._run(calls.submit(job))

    async def cancel(self, job_id: str, model: str | None = None) -> JobState:
        """See State.cancel."""
        try:
            return await self._run(calls.cancel(job_id, model))
        except JobNotFound:
            if (row := row_of(job_id)) is None or (status := await self._row(*row)) is None:
                raise
            await self._run(batch_calls.cancel_row(*row))
            return status.state

    async def status(self, job_id: str) -> JobStatus | None:
        """See State.status."""
        status, row = await self._run(calls.status(job_id)), row_of(job_id)
        return status if status is not None or row is None else await self._row(*row)

    async def _row(self, batch_id: str, line: int) -> JobStatus | None:
        """See Batches.row."""
        where = await self._run(batch_calls.row(batch_id, line))
        if where is None or not where.ended:
            return None if where is None else where.status
        start = 0
        while page := await self._run(batch_calls.objects(batch_id, start, PAGE)):
            for held in page:
                if line in unpack_lines(held.lines):
                    return batch_calls.ended_as(where.status, held, line)
            start += len(page)
        return where.status

    async def row_ended(self, job_id: str) -> bool:
        """See State.row_ended."""
        row = row_of(job_id)
        return row is not None and await self._run(batch_calls.row_ended(*row))

    async def read_log(self, job_id: str, after: EntryId | None = None, count: int = LOG_PAGE) -> list[Entry]:
        """See State.read_log."""
        return await self._run(calls.read_log(job_id, after, count))

    async def result(self, job_id: str) -> str | None:
        """See State.result."""
        return await self._run(calls.result(job_id))

    def subscribe(self, job_id: str) -> AsyncSubscription:
        """See State.subscribe; an asynchronous context manager."""
        timeout_s = self._settings.connect_timeout_s
        return AsyncSubscription(self._client, keys.log(job_id), timeout_s, calls.told_beside(job_id))

    async def batch_events(
        self, batch_id: str, after: EntryId | None, count: int
    ) -> Sequence[tuple[EntryId, BatchEvent]]:
        """See Batches.read_events."""
        return await self._run(batch_calls.read_events(batch_id, after, count))

    def subscribe_batch(self, batch_id: str) -> AsyncSubscription:
        """See Batches.subscribe; only to be woken by."""
        return AsyncSubscription(self._client, keys.batch_events(batch_id), self._settings.connect_timeout_s)

    async def models(self) -> dict[str, ModelInfo]:
        """See State.models."""
        return await self._run(calls.models())

    async def workers(self) -> dict[str, WorkerInfo]:
        """See State.workers."""
        ids = await self._run(calls.worker_ids())
        return await self._run(calls.workers(ids)) if ids else {}

    async def alive(self, model: str) -> list[WorkerInfo]:
        """See State.alive."""
        return [info for info in (await self.workers()).values() if model in info.models]

    async def ping(self) -> None:
        """See State.ping."""
        await self._run(Call(("PING",), bool))

    async def close(self) -> None:
        """See State.close."""
        with redis_errors(_WHERE):
            await self._client.aclose()
        if self._embedded is not None:
            self._embedded.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def _run(self, call: Call[T]) -> T:
        client: Any = self._client
        with redis_errors(_WHERE, always_transient=call.mid_job):
            if call.script is None:
                reply = await client.execute_command(*call.args)
            else:
                rest = (len(call.keys), *call.keys, *call.args, *([""] if call.script.timed else ()))
                try:
                    reply = await client.evalsha(call.script.sha, *rest)
                except NoScriptError:
                    reply = await client.eval(call.script.text, *rest)
        return call.parse(reply)


class AsyncSubscription:
    """Subscription for asyncio."""

    def __init__(
        self, client: redis.asyncio.Redis, channel: str, confirm_timeout_s: float, beside: Sequence[str] = ()
    ) -> None:
        self._channel, self._beside, self._confirm_timeout_s = channel, beside, confirm_timeout_s
        self._pubsub: Any = client.pubsub()  # pyright: ignore[reportUnknownMemberType]  (**kwargs)

    async def __aenter__(self) -> Self:
        try:
            with redis_errors(_WHERE):
                await self._pubsub.subscribe(self._channel, *self._beside)
                confirmed = [
                    await self._pubsub.get_message(timeout=self._confirm_timeout_s)
                    for _ in (self._channel, *self._beside)
                ]
            if None in confirmed:
                raise BrokerUnavailable(f"{_WHERE}: no confirmation within {self._confirm_timeout_s:g} s")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc: object) -> None:
        with suppress(BrokerUnavailable), redis_errors(_WHERE):
            await self._pubsub.aclose()

    async def get(self, timeout_s: float) -> Entry | Resubscribed | BatchStirred | None:
        """See Subscription.get."""
        message = await self.get_raw(timeout_s)
        return None if message is None else calls.parse_message(message, self._channel)

    async def get_raw(self, timeout_s: float) -> dict[str, Any] | None:
        """See Subscription.get_raw."""
        with redis_errors(_WHERE):
            return await self._pubsub.get_message(timeout=timeout_s)


def open_state(settings: Settings) -> State:
    """Connect to the state server, or start or join the embedded one. Sends nothing to a remote server yet.

    Raises Misconfigured (no URL that could hold state, a bad one) or BrokerUnavailable (embedded, and it does
    not start).
    """
    url = state_url(settings)
    embedded = Embedded(url.removeprefix("embedded:")).start() if url.startswith("embedded:") else None
    return State(connect(embedded.url if embedded else url, settings), settings, embedded)


async def open_async_state(settings: Settings) -> AsyncState:
    """``open_state`` for asyncio."""
    url = state_url(settings)
    embedded = None
    if url.startswith("embedded:"):
        embedded = await asyncio.to_thread(Embedded(url.removeprefix("embedded:")).start)
    return AsyncState(connect_async(embedded.url if embedded else url, settings), settings, embedded)


def state_url(settings: Settings) -> str:
    """Where logs and states live: ``state_url``, or the broker if that is a Redis. Raises Misconfigured."""
    url = settings.state_url or settings.broker
    if url.startswith("sqs:"):
        raise Misconfigured(
            "GRISTMILL_STATE_URL: logs and job states need a Redis or Valkey besides an SQS broker; "
            "set it to redis://host:6379/0"
        )
    return url
