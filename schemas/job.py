"""Job: one prompt to complete, as it travels through the queue, and the states it may be in."""

from __future__ import annotations

import hashlib
import secrets
import time
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from .errors import InvalidRequest
from .sampling import SamplingParams
from .tools import PastCall, Toolbox, check_fit
from .webhook import WebhookUrl
from .wire import WIRE_VERSION, Bool, Count, Float, Record

JOB_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}(\.([0-9]{1,10}|s[0-9]{1,10}(-[0-9a-f]{8})?))?$"
"""Also of a batch's rows and segments: see ``batch.py``."""
TENANT_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
DEFAULT_TENANT = "default"
DEFAULT_JOB_TTL_S = 14 * 86_400.0

YEAR_10000 = 253_402_300_800.0

UnixTime = Annotated[Float, Field(ge=0.0, lt=YEAR_10000)]
"""Seconds. Beyond the bound neither a date nor a key's expiry could be made of it."""
JobId = Annotated[str, StringConstraints(pattern=JOB_ID_PATTERN)]
Tenant = Annotated[str, StringConstraints(pattern=TENANT_PATTERN)]


class JobState(StrEnum):
    """Where a job stands. The wire carries the lower-case value."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def final(self) -> bool:
        """A final state never changes: retry and requeue make a new job."""
        return not NEXT[self]


FINAL = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})

NEXT: dict[JobState, frozenset[JobState]] = {
    # In the broker, owned by nobody. It can only succeed by running first.
    JobState.QUEUED: frozenset({JobState.RUNNING, *(FINAL - {JobState.SUCCEEDED})}),
    # One worker holds the lease; queued again if that runs out.
    JobState.RUNNING: frozenset({JobState.QUEUED, *FINAL}),
    **dict.fromkeys(FINAL, frozenset[JobState]()),
}


class Priority(StrEnum):
    """The class of a job; earlier members are served strictly first."""

    INTERACTIVE = "interactive"
    NORMAL = "normal"
    BATCH = "batch"

    @property
    def rank(self) -> int:
        """0 is the most urgent."""
        return _RANKS[self]


_RANKS = {priority: rank for rank, priority in enumerate(Priority)}


class Endpoint(StrEnum):
    """Which API's answer shape the result is rendered in."""

    NATIVE = "native"
    COMPLETIONS = "/v1/completions"
    CHAT = "/v1/chat/completions"


class Message(Record):
    """One turn of a conversation."""

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | tuple[dict[str, Any], ...] | None = None
    name: str | None = None
    tool_calls: tuple[PastCall, ...] | None = None
    """What the assistant called."""
    tool_call_id: str | None = None
    """With the role ``tool``: whose outcome the content is."""


class Job(Record):
    """One prompt to complete. Immutable: a change is a new record.

    Exactly one of ``prompt``, ``prompt_ids`` and ``messages`` is set. Times are unix seconds.
    """

    v: Literal[1] = WIRE_VERSION
    id: JobId
    model: Annotated[str, Field(min_length=1, max_length=256)]
    prompt: str | None = None
    prompt_ids: tuple[Count, ...] | None = None
    messages: tuple[Message, ...] | None = None
    sampling: SamplingParams = SamplingParams()
    tools: Toolbox | None = None
    """Functions that the model may call."""
    endpoint: Endpoint = Endpoint.NATIVE
    priority: Priority = Priority.NORMAL
    tenant: Tenant = DEFAULT_TENANT
    stream: Bool = False
    """Somebody reads along: tokens are published at once instead of every 16."""
    submitted_at: UnixTime
    expires_at: UnixTime
    custom_id: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    idempotency_key: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    retry_of: JobId | None = None
    copy_of: JobId | None = None
    """A row of the same segment that asks for the same: one answer may serve both."""
    metadata: dict[str, str] = Field(default_factory=dict[str, str], max_length=16)
    webhook: WebhookUrl | None = None
    """Where to send an event when it has ended."""

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [n for n in ("prompt", "prompt_ids", "messages") if getattr(self, n) is not None]
        if len(given) != 1:
            raise InvalidRequest(
                f"give exactly one of prompt, prompt_ids, messages (got {', '.join(given) or 'none'})",
                param=given[-1] if given else "prompt",
            )
        if not (self.prompt or self.prompt_ids or self.messages):
            raise InvalidRequest(f"{given[0]} is empty", param=given[0])
        return self

    @model_validator(mode="after")
    def _tools_fit(self) -> Self:
        check_fit(self.tools, self.sampling, chat=self.messages is not None)
        return self

    @model_validator(mode="after")
    def _expires_after_submission(self) -> Self:
        if self.expires_at <= self.submitted_at:
            raise ValueError("expires_at is not after submitted_at")
        return self

    @property
    def seed(self) -> int:
        """The request's seed, or one derived from the job id: the same on every attempt."""
        if self.sampling.seed is not None:
            return self.sampling.seed
        return int.from_bytes(hashlib.sha256(self.id.encode()).digest()[:8], "big")

    @property
    def batch_id(self) -> str | None:
        """Of the bulk run whose row it is: rows are called ``<batch>.<line>``. None: it stands alone."""
        batch, dot, _ = self.id.partition(".")
        return batch if dot else None


def new_job_id() -> str:
    """A fresh id that sorts by time: ``job_`` + 12 hex digits of milliseconds + 16 random ones."""
    return f"job_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"


def idempotent_job_id(tenant: str, key: str) -> str:
    """The same tenant and key give the same job, whoever submits and however often."""
    named = f"{tenant}\0{key}".encode(
        "utf-8", "surrogatepass"
    )  # half a pair is refused with its field's name
    return "job_" + hashlib.sha256(named).hexdigest()[:32]
