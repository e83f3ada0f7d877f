"""Client: submit a job, follow it, take its result. START HERE.

client = Client()                       # GRISTMILL_BROKER_URL, …; or the embedded stack of `gristmill up`
job = client.submit("Once upon a time", max_tokens=64, stream=True)
for chunk in job.stream():
    print(chunk.text, end="", flush=True)
print(job.result().usage)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from ..schemas import keys
from ..schemas.events import EntryId
from ..schemas.job import Job, JobState, Priority
from ..schemas.result import Result
from ..schemas.settings import Settings
from ..schemas.status import JobStatus, ModelInfo, WorkerInfo
from . import core
from .core import Submission
from .link import Link

if TYPE_CHECKING:
    from .batches import Batches, BatchHandle, Source
    from .dead import Dead
    from .replica import Chunk, Item
    from .webhooks import Webhooks


class JobHandle:
    """One job that was submitted, here or anywhere: its id and a connection. Reads nothing before you ask."""

    def __init__(self, link: Link, job_id: str, warnings: Sequence[str] = (), job: Job | None = None) -> None:
        self._link = link
        self.id = job_id
        self.warnings = tuple(warnings)
        """What you should know and the job survives: nobody alive to run it, say."""
        self.job = job
        """As it was sent; None for a handle from ``Client.get``."""

    def stream(
        self, last_id: EntryId | str | None = None, *, timeout_s: float | None = None
    ) -> Iterator[Chunk]:
        """Text as it is made, from the beginning or from after ``last_id`` (a chunk's ``id``), to the end.

        Joined texts equal the result's text, whether you attach early, late or again. Raises JobFailed at the
        end of a job that did not succeed, JobNotFound, WaitTimeout after ``timeout_s`` in all.
        """
        from .replica import Chunk

        for item in self._items(last_id, timeout_s):
            if isinstance(item, Chunk):
                yield item
            else:
                core.raise_unless_good_end(self.id, item.end)

    def stream_openai(
        self, *, include_usage: bool = False, timeout_s: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """The same in OpenAI's form: a ``chat.completion.chunk`` (messages) or ``text_completion`` (a prompt)
        each, with ``include_usage`` one more with the usage.

        Tokens that log probabilities tell of are called ``token_id:…``: texts need the model's tokenizer.
        Raises what ``stream`` does; InvalidRequest unless this handle is from ``submit``; ResultChanged, see
        ``Chunks.of``.
        """
        from .replica import Chunk

        chunks = core.openai_chunks(self.id, self.job, include_usage)
        for item in self._items(None, timeout_s):
            if isinstance(item, Chunk):
                yield from chunks.of(item)
                continue
            core.raise_unless_good_end(self.id, item.end)
            if include_usage:
                yield chunks.last(item.end.usage)

    def _items(self, last_id: EntryId | str | None, timeout_s: float | None) -> Iterator[Item]:
        from .stream import follow

        last = EntryId.parse(last_id) if isinstance(last_id, str) else last_id
        fetch, said = self._link.result_body, False

        def say_why() -> None:
            nonlocal said
            said = said or self._say_why()

        return follow(self._link.state, self.id, last, fetch=fetch, timeout_s=timeout_s, on_silence=say_why)

    def result(self, timeout_s: float | None = None, *, check: bool = True) -> Result:
        """Wait for the end and return the result.

        Logs a warning, once, if its worker is in trouble: a result store that is away, say.
        Raises JobFailed for a job that did not succeed (not with ``check=False``), WaitTimeout after
        ``timeout_s`` (the job goes on), JobNotFound.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause_s = core.POLL_FIRST_S
        say_at: float | None = time.monotonic() + core.SAY_AFTER_S
        while (result := self._result_now()) is None:
            if say_at is not None and time.monotonic() >= say_at:
                say_at = None if self._say_why() else time.monotonic() + core.SAY_AFTER_S
            left_s = pause_s if deadline is None else deadline - time.monotonic()
            if left_s <= 0:
                raise core.not_ended(self.id, timeout_s)
            time.sleep(min(pause_s, left_s))
            pause_s = min(core.POLL_MAX_S, core.POLL_GROWTH * pause_s)
        return core.raise_unless_succeeded(result) if check else result

    def status(self) -> JobStatus:
        """Where the job stands now. Raises JobNotFound."""
        status = self._link.state.status(self.id)
        if status is not None:
            return status
        body = self._link.store.get(keys.result_object(self.id))
        if body is None:
            raise core.unknown_job(self.id)
        return core.status_of(Result.from_json(body))

    def cancel(self) -> JobState:
        """Ask for a stop; returns the state as it is now. What was generated so far stays in the result.

        Raises JobNotFound.
        """
        return self._link.state.cancel(self.id, None if self.job is None else self.job.model)

    def _say_why(self) -> bool:
        """Whether the job's worker is in trouble, which is then logged: once is enough."""
        status = self._link.state.status(self.id)
        return core.say_trouble(status, {} if status is None else self._link.state.workers())

    def _result_now(self) -> Result | None:
        status = self._link.state.status(self.id)
        if status is not None and not status.state.final:
            return None
        body = self._link.result_body(self.id)
        if body is None:
            raise core.unknown_job(self.id)
        return Result.from_json(body)

    def __repr__(self) -> str:
        return f"JobHandle({self.id!r})"


class Client:
    """Submits jobs and finds them again. Thread-safe; connects when it is first used.

    ``broker`` is a URL, or all settings at once. Arguments win over ``GRISTMILL_*``; with neither it joins
    the embedded stack under ``GRISTMILL_HOME``. Raises Misconfigured.
    """

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
        self._link = Link(self.settings)

    def submit(
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
    ) -> JobHandle:
        """Send one job; when this returns, the broker has it. ``sampling``: the fields of SamplingParams.

        Give ``prompt``, ``messages`` (OpenAI's form) or ``prompt_ids``. In answer to messages the model may
        call ``tools``, or must (``tool_choice``; OpenAI's forms): see ``tool_calls`` of the result's choices.
        After ``deadline_s`` the job ends as expired, with what it has by then. With the same
        ``idempotency_key`` the job exists once, however often it is sent. ``webhook``: a URL that is sent a
        signed event when the job has ended (README, "Webhooks"). Raises InvalidRequest,
        PayloadTooLarge, ModelNotFound, IdempotencyConflict, BrokerUnavailable.
        """
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
        draft = core.draft_job(given, sampling, self.settings, time.time())  # bad input costs no round trip
        name = core.pick_model(model, self._link.state.models(), self.settings)
        job = draft.model_copy(update={"model": name})
        self._link.submit(job)
        warnings = [] if self._link.state.alive(name) else [core.nobody_alive(name, self.settings)]
        return JobHandle(self._link, job.id, warnings, job)

    def get(self, job_id: str) -> JobHandle:
        """A handle on a job by its id. Raises InvalidRequest for what can be no id; looks nothing up."""
        return JobHandle(self._link, core.check_job_id(job_id))

    def models(self) -> dict[str, ModelInfo]:
        """Every model that a worker ever announced on this broker."""
        return self._link.state.models()

    def workers(self) -> dict[str, WorkerInfo]:
        """Who is alive and ready for work, by worker id."""
        return self._link.state.workers()

    def queue_is_paused(self, status: JobStatus) -> bool:
        """Whether the queue of a waiting job is paused; False if its status does not say which that is."""
        return self._link.queue_is_paused(status)

    def submit_batch(self, source: Source, **asked: Any) -> BatchHandle:
        """``batches.submit``."""
        return self.batches.submit(source, **asked)

    @property
    def batches(self) -> Batches:
        """Many requests as one: submit, get, list."""
        from .batches import Batches

        return Batches(self._link)

    @property
    def dead(self) -> Dead:
        """Messages that are not delivered again: list, show, requeue, purge."""
        from .dead import Dead

        return Dead(self._link)

    @property
    def webhooks(self) -> Webhooks:
        """Events sent to webhooks: list, get, replay, endpoints, enable, test."""
        from .webhooks import Webhooks

        return Webhooks(self._link)

    def close(self) -> None:
        """Close the connections."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
