"""AsyncClient: the calls of Client, to be awaited. A thin shell: what is decided is decided in ``core``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from itertools import islice
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ..schemas.events import EntryId
from ..schemas.job import Job, JobState, Priority
from ..schemas.result import Result
from ..schemas.settings import Settings
from ..schemas.status import JobStatus, ModelInfo, WorkerInfo
from . import core
from .core import Submission
from .link import Link

if TYPE_CHECKING:
    from ..backends.state import AsyncState
    from ..schemas.batch import Batch, BatchEvent, BatchStatus
    from ..schemas.batch_lines import OutputLine
    from ..schemas.dead import DeadLetter
    from ..schemas.webhook import WebhookDelivery, WebhookEndpoint
    from .batch.answers import Kind
    from .batches import Batches, BatchHandle, Source
    from .dead import Dead, DeadJob
    from .replica import Chunk, Item
    from .webhooks import Webhooks


T = TypeVar("T")
LINES_AT_ONCE = 200


class AsyncLink:
    """State by asyncio; message and result store, whose libraries know threads only, in a thread."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._link = Link(settings)
        self._lock = asyncio.Lock()
        self._state: AsyncState | None = None

    async def state(self) -> AsyncState:
        """Raises BrokerUnavailable, Misconfigured."""
        from ..backends.state import open_async_state

        async with self._lock:
            self._state = self._state or await open_async_state(self.settings)
            return self._state

    async def submit(self, job: Job) -> bool:
        """See Link.submit."""
        return await asyncio.to_thread(self._link.submit, job)

    async def result_body(self, job_id: str) -> str | bytes | None:
        """See Link.result_body."""
        return await (await self.state()).result(job_id) or await self.stored(job_id)

    async def stored(self, job_id: str) -> str | bytes | None:
        """See Link.stored_body."""
        return await asyncio.to_thread(self._link.stored_body, job_id)

    async def queue_is_paused(self, status: JobStatus) -> bool:
        """See Link.queue_is_paused."""
        return await asyncio.to_thread(self._link.queue_is_paused, status)

    async def dead(self, do: Callable[[Dead], T]) -> T:
        """Something done with the dead letters, in a thread."""
        from .dead import Dead

        return await asyncio.to_thread(lambda: do(Dead(self._link)))

    @property
    def batches(self) -> Batches:
        """What they are asked by, in threads."""
        from .batches import Batches

        return Batches(self._link)

    @property
    def webhooks(self) -> Webhooks:
        """What they are asked by, in threads."""
        from .webhooks import Webhooks

        return Webhooks(self._link)

    async def close(self) -> None:
        """Let go of what was opened."""
        state, self._state = self._state, None
        if state is not None:
            await state.close()
        await asyncio.to_thread(self._link.close)


class AsyncJobHandle:
    """See JobHandle."""

    def __init__(
        self, link: AsyncLink, job_id: str, warnings: Sequence[str] = (), job: Job | None = None
    ) -> None:
        self._link = link
        self.id = job_id
        self.warnings = tuple(warnings)
        self.job = job

    async def stream(
        self, last_id: EntryId | str | None = None, *, timeout_s: float | None = None
    ) -> AsyncIterator[Chunk]:
        """See JobHandle.stream."""
        from .replica import Chunk

        async with aclosing(await self._items(last_id, timeout_s)) as items:
            async for item in items:
                if isinstance(item, Chunk):
                    yield item
                else:
                    core.raise_unless_good_end(self.id, item.end)

    async def stream_openai(
        self, *, include_usage: bool = False, timeout_s: float | None = None
    ) -> AsyncIterator[dict[str, Any]]:
        """See JobHandle.stream_openai."""
        from .replica import Chunk

        chunks = core.openai_chunks(self.id, self.job, include_usage)
        async with aclosing(await self._items(None, timeout_s)) as items:
            async for item in items:
                if isinstance(item, Chunk):
                    for each in chunks.of(item):
                        yield each
                    continue
                core.raise_unless_good_end(self.id, item.end)
                if include_usage:
                    yield chunks.last(item.end.usage)

    async def _items(self, last_id: EntryId | str | None, timeout_s: float | None) -> AsyncGenerator[Item]:
        from .stream import follow_async

        last = EntryId.parse(last_id) if isinstance(last_id, str) else last_id
        state, fetch, said = await self._link.state(), self._link.result_body, False

        async def say_why() -> None:
            nonlocal said
            said = said or await self._say_why()

        return follow_async(state, self.id, last, fetch=fetch, timeout_s=timeout_s, on_silence=say_why)

    async def result(self, timeout_s: float | None = None, *, check: bool = True) -> Result:
        """See JobHandle.result."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause_s = core.POLL_FIRST_S
        say_at: float | None = time.monotonic() + core.SAY_AFTER_S
        while (result := await self._result_now()) is None:
            if say_at is not None and time.monotonic() >= say_at:
                say_at = None if await self._say_why() else time.monotonic() + core.SAY_AFTER_S
            left_s = pause_s if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                raise core.not_ended(self.id, timeout_s)
            await asyncio.sleep(min(pause_s, left_s))
            pause_s = min(core.POLL_MAX_S, core.POLL_GROWTH * pause_s)
        return core.raise_unless_succeeded(result) if check else result

    async def status(self) -> JobStatus:
        """See JobHandle.status."""
        status = await (await self._link.state()).status(self.id)
        if status is not None:
            return status
        body = await self._link.stored(self.id)
        if body is None:
            raise core.unknown_job(self.id)
        return core.status_of(Result.from_json(body))

    async def cancel(self) -> JobState:
        """See JobHandle.cancel."""
        state = await self._link.state()
        return await state.cancel(self.id, None if self.job is None else self.job.model)

    async def _say_why(self) -> bool:
        """See JobHandle._say_why."""
        state = await self._link.state()
        status = await state.status(self.id)
        return core.say_trouble(status, {} if status is None else await state.workers())

    async def _result_now(self) -> Result | None:
        status = await (await self._link.state()).status(self.id)
        if status is not None and not status.state.final:
            return None
        body = await self._link.result_body(self.id)
        if body is None:
            raise core.unknown_job(self.id)
        return Result.from_json(body)

    def __repr__(self) -> str:
        return f"AsyncJobHandle({self.id!r})"


class AsyncDead:
    """See Dead. In threads: handling the dead is no hot path."""

    def __init__(self, link: AsyncLink) -> None:
        self._link = link

    async def list(self, *, model: str | None = None, queue: str | None = None) -> Sequence[DeadLetter]:
        """See Dead.list; all of them at once."""
        return await self._link.dead(lambda dead: [*dead.list(model=model, queue=queue)])

    async def find(self, name: str, *, model: str | None = None, queue: str | None = None) -> DeadLetter:
        """See Dead.find."""
        return await self._link.dead(lambda dead: dead.find(name, model=model, queue=queue))

    async def show(self, name: str, *, model: str | None = None, queue: str | None = None) -> DeadJob:
        """See Dead.show."""
        return await self._link.dead(lambda dead: dead.show(name, model=model, queue=queue))

    async def requeue(self, letter: DeadLetter) -> Job:
        """See Dead.requeue."""
        return await self._link.dead(lambda dead: dead.requeue(letter))

    async def purge(self, letters: Sequence[DeadLetter]) -> int:
        """See Dead.purge."""
        return await self._link.dead(lambda dead: dead.purge(letters))


class AsyncBatchHandle:
    """See BatchHandle; the same calls, in threads."""

    def __init__(self, link: AsyncLink, handle: BatchHandle) -> None:
        self._link, self._handle = link, handle
        self.id, self.warnings = handle.id, handle.warnings

    async def status(self) -> Batch:
        """See BatchHandle.status."""
        return await asyncio.to_thread(self._handle.status)

    async def wait(self, timeout_s: float | None = None) -> Batch:
        """See BatchHandle.wait."""
        from .batches import pauses, still_running

        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for pause_s in pauses():
            batch = await self.status()
            if batch.status.final:
                return batch
            left_s = pause_s if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                break
            await asyncio.sleep(min(pause_s, left_s))
        raise still_running(self.id, timeout_s)

    async def follow(self, after: EntryId | str | None = None) -> AsyncIterator[tuple[EntryId, BatchEvent]]:
        """See BatchHandle.follow."""
        from .batch.following import follow_async

        last = EntryId.parse(after) if isinstance(after, str) else after
        state = await self._link.state()
        async with aclosing(follow_async(state, self.id, last, self.status)) as events:
            async for each in events:
                yield each

    async def lines(self, kind: Kind = "output") -> AsyncIterator[OutputLine]:
        """See BatchHandle.lines."""
        lines = self._handle.lines(kind)
        while page := await asyncio.to_thread(lambda: list(islice(lines, LINES_AT_ONCE))):
            for line in page:
                yield line

    async def download(self, output: str, errors: str | None = None) -> tuple[int, int]:
        """See BatchHandle.download."""
        return await asyncio.to_thread(self._handle.download, output, errors)

    async def cancel(self) -> BatchStatus:
        """See BatchHandle.cancel."""
        return await asyncio.to_thread(self._handle.cancel)

    async def pause(self) -> BatchStatus:
        """See BatchHandle.pause."""
        return await asyncio.to_thread(self._handle.pause)

    async def resume(self) -> BatchStatus:
        """See BatchHandle.resume."""
        return await asyncio.to_thread(self._handle.resume)

    async def retry(self) -> AsyncBatchHandle:
        """See BatchHandle.retry."""
        return AsyncBatchHandle(self._link, await asyncio.to_thread(self._handle.retry))

    def __repr__(self) -> str:
        return f"AsyncBatchHandle({self.id!r})"


class AsyncBatches:
    """See Batches."""

    def __init__(self, link: AsyncLink) -> None:
        self._link, self._batches = link, link.batches

    async def submit(self, source: Source, **asked: Any) -> AsyncBatchHandle:
        """See Batches.submit."""
        handle = await asyncio.to_thread(lambda: self._batches.submit(source, **asked))
        return AsyncBatchHandle(self._link, handle)

    def get(self, batch_id: str) -> AsyncBatchHandle:
        """See Batches.get."""
        return AsyncBatchHandle(self._link, self._batches.get(batch_id))

    async def list(self, after: str | None = None, limit: int = 20) -> list[Batch]:
        """See Batches.list."""
        return await asyncio.to_thread(self._batches.list, after, limit)


class AsyncWebhooks:
    """See Webhooks; the same calls, in threads."""

    def __init__(self, webhooks: Webhooks) -> None:
        self._webhooks = webhooks

    async def list(self, **wanted: Any) -> AsyncIterator[WebhookDelivery]:
        """See Webhooks.list."""
        found = self._webhooks.list(**wanted)
        while page := await asyncio.to_thread(lambda: list(islice(found, LINES_AT_ONCE))):
            for each in page:
                yield each

    async def get(self, event_id: str) -> WebhookDelivery:
        """See Webhooks.get."""
        return await asyncio.to_thread(self._webhooks.get, event_id)

    async def replay(self, event_ids: Sequence[str]) -> Sequence[str]:
        """See Webhooks.replay."""
        return await asyncio.to_thread(self._webhooks.replay, event_ids)

    async def endpoints(self) -> Sequence[WebhookEndpoint]:
        """See Webhooks.endpoints."""
        return await asyncio.to_thread(self._webhooks.endpoints)

    async def enable(self, url: str) -> tuple[bool, int]:
        """See Webhooks.enable."""
        return await asyncio.to_thread(self._webhooks.enable, url)

    async def test(self, url: str, timeout_s: float = 60.0) -> WebhookDelivery:
        """See Webhooks.test. Its thread waits until the end, also if nobody waits for it any more."""
        return await asyncio.to_thread(self._webhooks.test, url, timeout_s)


class AsyncClient:
    """See Client. Belongs to one event loop."""

    def __init__(
        self,
        broker: str | Settings | None = None,
        *,
        state_url: str | None = None,
        results_url: str | None = None,
        model: str | None = None,
        tenant: str | None = None,
    ) -> None:
        urls = {"state_url": state_url, "results_url": results_url, "model": model, "tenant": tenant}
        self.settings = core.client_settings(broker, urls)
        self._link = AsyncLink(self.settings)

    async def submit(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        prompt_ids: Sequence[int] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        model: str | None = None,
        stream: bool = False,
        priority: Priority | str = Priority.NORMAL,
        tenant: str | None = None,
        deadline_s: float | None = None,
        idempotency_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        webhook: str | None = None,
        **sampling: Any,
    ) -> AsyncJobHandle:
        """See Client.submit."""
        given = Submission(
            prompt=prompt,
            messages=messages,
            prompt_ids=prompt_ids,
            tools=tools,
            tool_choice=tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            stream=stream,
            priority=priority,
            tenant=tenant,
            deadline_s=deadline_s,
            idempotency_key=idempotency_key,
            metadata=metadata,
            webhook=webhook,
        )
        draft = core.draft_job(given, sampling, self.settings, time.time())
        state = await self._link.state()
        name = core.pick_model(model, await state.models(), self.settings)
        job = draft.model_copy(update={"model": name})
        await self._link.submit(job)
        warnings = [] if await state.alive(name) else [core.nobody_alive(name, self.settings)]
        return AsyncJobHandle(self._link, job.id, warnings, job)

    def get(self, job_id: str) -> AsyncJobHandle:
        """See Client.get."""
        return AsyncJobHandle(self._link, core.check_job_id(job_id))

    async def models(self) -> dict[str, ModelInfo]:
        """See Client.models."""
        return await (await self._link.state()).models()

    async def workers(self) -> dict[str, WorkerInfo]:
        """See Client.workers."""
        return await (await self._link.state()).workers()

    async def queue_is_paused(self, status: JobStatus) -> bool:
        """See Client.queue_is_paused."""
        return await self._link.queue_is_paused(status)

    @property
    def batches(self) -> AsyncBatches:
        """See Client.batches."""
        return AsyncBatches(self._link)

    @property
    def dead(self) -> AsyncDead:
        """See Client.dead."""
        return AsyncDead(self._link)

    @property
    def webhooks(self) -> AsyncWebhooks:
        """See Client.webhooks."""
        return AsyncWebhooks(self._link.webhooks)

    async def close(self) -> None:
        """Close the connections."""
        await self._link.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()
