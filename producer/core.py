"""Builds and checks jobs, reads replies. No I/O, so that both clients and the command line share it."""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, cast

from ..schemas import keys
from ..schemas.errors import (
    InvalidRequest,
    JobFailed,
    JobNotFound,
    Misconfigured,
    ModelNotFound,
    PayloadTooLarge,
    WaitTimeout,
)
from ..schemas.events import End
from ..schemas.grammar import GRAMMAR_FIELDS, with_grammar
from ..schemas.job import (
    DEFAULT_TENANT,
    JOB_ID_PATTERN,
    Job,
    JobState,
    Message,
    Priority,
    idempotent_job_id,
    new_job_id,
)
from ..schemas.result import ErrorInfo, Result
from ..schemas.sampling import SamplingParams
from ..schemas.settings import Settings, load_settings
from ..schemas.status import JobStatus, WorkerInfo
from ..schemas.tools import TOOL_FIELDS, Toolbox, toolbox
from ..schemas.wire import kind_of, shown

if TYPE_CHECKING:
    from ..schemas.batch_lines import Row
    from ..schemas.openai import Chunks

log = logging.getLogger(__name__)

EMBEDDED = "embedded:"
UNDECIDED = "undecided"
MODEL_BYTES = 1024
"""Kept free in a draft's payload for the model's name."""
POLL_FIRST_S, POLL_GROWTH, POLL_MAX_S = 0.01, 1.3, 0.25
"""How a client waits for a result."""
SAY_AFTER_S = 5.0
"""How long it waits before it asks whether the job's worker is in trouble."""


@dataclass(frozen=True, slots=True)
class Submission:
    """What a caller of ``submit`` said, before it is checked."""

    prompt: str | None = None
    prompt_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool = False
    priority: Priority | str = Priority.NORMAL
    tenant: str | None = None
    deadline_s: float | None = None
    idempotency_key: str | None = None
    custom_id: str | None = None
    metadata: Mapping[str, str] | None = None
    retry_of: str | None = None
    webhook: str | None = None


_KINDS: tuple[tuple[str, Any, str], ...] = (
    ("prompt_ids", Sequence, "a list of token ids (of an array: its tolist())"),
    ("deadline_s", (int, float), "a number of seconds"),
    ("tenant", str, "a string"),
    ("idempotency_key", str, "a string"),
    ("metadata", Mapping, "a mapping of strings to strings"),
    ("webhook", str, "a URL"),
)
"""Field, its type, and what that is called."""


def build_job(
    given: Submission, model: str, sampling: Mapping[str, Any], settings: Settings, now: float
) -> Job:
    """A valid job. Raises InvalidRequest naming the field.

    With an idempotency key the id follows from tenant and key; otherwise it is new.
    """
    _check_kinds(given)
    tenant = settings.tenant or DEFAULT_TENANT if given.tenant is None else given.tenant
    lives_s = min(settings.job_ttl_s, given.deadline_s or settings.job_ttl_s)
    key = given.idempotency_key
    fields: dict[str, Any] = {
        "id": idempotent_job_id(tenant, key) if key is not None else new_job_id(),
        "model": model,
        "prompt": given.prompt,
        "prompt_ids": None if given.prompt_ids is None else list(given.prompt_ids),
        "messages": None if given.messages is None else _messages(given.messages),
        "sampling": sampling_params(sampling),
        "tools": _toolbox(given),
        "priority": given.priority,
        "tenant": tenant,
        "stream": given.stream,
        "submitted_at": now,
        "expires_at": now + lives_s,
        "custom_id": given.custom_id,
        "idempotency_key": key,
        "metadata": dict(given.metadata or {}),
        "retry_of": given.retry_of,
        "webhook": given.webhook,
    }
    return Job.from_python(fields)


def _check_kinds(given: Submission) -> None:
    """Of what is worked with before it is a record: callers' types are a promise nobody checked."""
    for name, kind, wanted in _KINDS:
        value = getattr(given, name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool | bytes)):
            raise InvalidRequest(f"{name} is {kind_of(value)}, not {wanted}", param=name)
    if isinstance(given.prompt_ids, str):
        raise InvalidRequest("prompt_ids is a string; give the text as prompt", param="prompt_ids")
    if given.deadline_s is not None and not given.deadline_s > 0:
        raise InvalidRequest(f"deadline_s is {given.deadline_s:g} and must be above 0", param="deadline_s")


def _toolbox(given: Submission) -> Toolbox | None:
    return toolbox({name: getattr(given, name) for name in TOOL_FIELDS})


def _messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    from ..schemas.openai import parse_messages  # a quarter of our own import time, for those who chat

    return parse_messages(messages)


def draft_job(given: Submission, sampling: Mapping[str, Any], settings: Settings, now: float) -> Job:
    """A job that is valid and fits a message, but for its model. Raises InvalidRequest, PayloadTooLarge."""
    job = build_job(given, UNDECIDED, sampling, settings, now)
    check_payload(job, settings.max_payload_bytes - MODEL_BYTES)
    return job


def client_settings(broker: str | Settings | None, given: Mapping[str, str | None]) -> Settings:
    """A client's arguments as settings. Raises Misconfigured."""
    if not isinstance(broker, Settings):
        return load_settings(broker_url=broker, **given)
    extra = [name for name, value in given.items() if value is not None]
    if extra:
        raise Misconfigured(f"give {extra[0]} within the settings, or give a URL instead of settings")
    return broker


def sampling_params(given: Mapping[str, Any]) -> SamplingParams:
    """Keyword arguments as SamplingParams; None means "not given", ``stop`` may be one string.

    Raises InvalidRequest for a name that is no sampling parameter.
    """
    kept = with_grammar({name: value for name, value in given.items() if value is not None})
    unknown = [name for name in kept if name not in SamplingParams.model_fields]
    if unknown:
        known = ", ".join(sorted({*SamplingParams.model_fields, *GRAMMAR_FIELDS}))
        raise InvalidRequest(f"unknown parameter {unknown[0]!r}; there are {known}", param=unknown[0])
    for name in ("stop", "stop_token_ids", "bad_words", "allowed_token_ids", "dry_sequence_breakers"):
        value = kept.get(name)
        if isinstance(value, str | int):
            kept[name] = (value,)
        elif isinstance(value, Sequence | Set) and not isinstance(value, bytes):  # others are refused below
            kept[name] = tuple(cast("Iterable[Any]", value))
    return SamplingParams.from_python(kept)


def job_of_row(row: Row, job_id: str, model: str, priority: Priority, settings: Settings, now: float) -> Job:
    """The job of one line of a bulk input."""
    request = row.request
    return Job(
        id=job_id,
        model=model,
        prompt=request.prompt,
        prompt_ids=request.prompt_ids,
        messages=request.messages,
        sampling=request.sampling,
        tools=request.tools,
        endpoint=request.endpoint,
        priority=priority,
        tenant=settings.tenant,
        submitted_at=now,
        expires_at=now + settings.job_ttl_s,
        custom_id=row.custom_id,
        metadata=request.metadata,
    )


def check_payload(job: Job, limit_bytes: int) -> None:
    """Raises PayloadTooLarge for a message over the limit, InvalidRequest for one that cannot be written."""
    try:
        size = len(job.to_json().encode())
    except ValueError as exc:  # half a surrogate pair in a Python string
        where = _not_unicode(job)
        raise InvalidRequest(
            f"{where} is not valid Unicode and cannot be sent as UTF-8; replace half surrogate pairs in it",
            param=where,
        ) from exc
    if size > limit_bytes:
        raise PayloadTooLarge(size_bytes=size, limit_bytes=limit_bytes)


def _not_unicode(job: Job) -> str:
    for name in Job.model_fields:
        try:
            job.model_dump_json(include={name})
        except ValueError:
            return name
    return "request"


def pick_model(wanted: str | None, known: Collection[str], settings: Settings) -> str:
    """The model asked for, the setting, or the only one there is. Raises ModelNotFound."""
    if wanted is not None and not isinstance(wanted, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # a caller's promise
        raise InvalidRequest(f"model is {kind_of(wanted)}, not a string", param="model")
    name = wanted or settings.model
    if name is not None:
        if name in known:
            return name
        directory = PurePath(name).name if name.startswith(("/", ".", "~")) else ""
        if directory in known:  # workers name a model directory by its last part
            return directory
        serving = (
            f"known models: {', '.join(sorted(known))}" if known else "no worker has announced any model"
        )
        raise ModelNotFound(
            f"model '{shown(name)}' is not served here ({serving}); "
            f"wait, if it is starting, or start it: {start_command(name, settings)}"
        )
    if len(known) == 1:
        return next(iter(known))
    if not known:
        raise ModelNotFound(
            "no worker has announced any model; wait, if one is starting, or start one: "
            f"{start_command('smollm2-135m', settings)}"
        )
    raise ModelNotFound(f"say which model: {', '.join(sorted(known))} (--model, model=, or GRISTMILL_MODEL)")


def in_trouble(workers: Iterable[WorkerInfo]) -> str | None:
    """One line for whoever waits while the workers have trouble of their own; None if they have none."""
    for info in workers:
        if info.trouble is not None:
            return f"still waiting: worker {info.pid} on {info.host} says: {shown(info.trouble)}"
    return None


def say_trouble(status: JobStatus | None, workers: Mapping[str, WorkerInfo]) -> bool:
    """Whether the job's worker is in trouble, which is then logged."""
    worker = None if status is None else workers.get(status.worker or "")
    sentence = None if worker is None else in_trouble([worker])
    if sentence is not None:
        log.warning("%s", sentence)
    return sentence is not None


def nobody_alive(model: str, settings: Settings) -> str:
    """The warning for a job that is accepted and has nobody to run it."""
    return (
        f"no worker for {model} is running; the job waits up to {settings.job_ttl_s / 86_400:g} days. "
        f"Start one: {start_command(model, settings)}"
    )


def start_command(model: str, settings: Settings) -> str:
    """What to type so that somebody serves ``model``. A broker URL may hold a password: it is not shown."""
    model = shlex.quote(shown(model))
    if settings.broker.startswith(EMBEDDED):
        return f"gristmill up --model {model}"
    return f'gristmill-worker run --model {model} --broker "$GRISTMILL_BROKER_URL"'


def openai_chunks(job_id: str, job: Job | None, include_usage: bool) -> Chunks:
    """What renders a job's stream in OpenAI's form. Raises InvalidRequest: only what was asked tells how."""
    from ..schemas.openai import Chunks

    if job is None:
        raise InvalidRequest(
            f"job {job_id} was not submitted by this handle, so that its request is not known; "
            "use stream(), or the handle that submit() returned",
            param="job_id",
        )
    return Chunks(job, include_usage=include_usage)


def raise_unless_succeeded(result: Result) -> Result:
    """The result of a job that succeeded. Raises JobFailed for the other three final states."""
    if result.state is JobState.SUCCEEDED:
        return result
    error = failure_of(result)
    raise JobFailed(result.job_id, error.code, error.message)


def raise_unless_good_end(job_id: str, end: End) -> None:
    """``raise_unless_succeeded`` for the last entry of a log."""
    if end.state is not JobState.SUCCEEDED:
        error = end.error or ended_early(end.state)
        raise JobFailed(job_id, error.code, error.message)


def failure_of(result: Result) -> ErrorInfo:
    """Why a job did not succeed."""
    return result.error or ended_early(result.state)


def ended_early(state: JobState) -> ErrorInfo:
    """What is said of a job that was cancelled or expired."""
    return ErrorInfo(code=state.value, message=f"the job was {state.value} before it was finished")


def unknown_job(job_id: str) -> JobNotFound:
    """The error for an id that nobody knows."""
    return JobNotFound(f"job {job_id} is unknown here; is this the broker it was sent to?")


def not_ended(job_id: str, timeout_s: float | None) -> WaitTimeout:
    """The error for somebody whose patience ran out."""
    return WaitTimeout(f"job {job_id} has not ended after {timeout_s:g} s; it goes on, ask again later")


def check_job_id(job_id: str) -> str:
    """Raises InvalidRequest unless it looks like a job id: it becomes part of keys and file names."""
    if not isinstance(job_id, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # a caller's promise
        raise InvalidRequest(f"job_id is {kind_of(job_id)}, not a string", param="job_id")
    if re.fullmatch(JOB_ID_PATTERN, job_id) is None:
        raise InvalidRequest(f"{job_id[:80]!r} is not a job id", param="job_id")
    return job_id


def status_of(result: Result) -> JobStatus:
    """The status of a job whose state is gone and whose result is left."""
    timings = result.timings
    return JobStatus(
        job_id=result.job_id,
        state=result.state,
        model=result.model,
        submitted_at=timings.submitted_at,
        started_at=timings.started_at,
        finished_at=timings.finished_at,
        attempts=result.attempts,
        tokens=result.usage.completion_tokens,
        finish_reason=result.finish_reason,
        usage=result.usage,
        error=result.error,
        result=keys.result_object(result.job_id),
    )


def local_time(at: float) -> str:
    """Unix seconds as a person reads them, with the zone."""
    return datetime.fromtimestamp(at).astimezone().isoformat(sep=" ", timespec="milliseconds")
