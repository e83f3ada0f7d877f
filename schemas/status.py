"""What can be asked about a job, a worker and a model while they live."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .job import JobId, JobState, Priority
from .result import ErrorInfo, FinishReason, Usage
from .wire import WIRE_VERSION, Answer, Bool, Float, Int


class JobStatus(Answer):
    """Where a job stands. Times are unix seconds; ``started_at`` and ``finished_at`` by the state server.

    What the submitter said is None for a job whose record was lost and rebuilt by a worker.
    """

    v: Literal[1] = WIRE_VERSION
    job_id: JobId
    state: JobState
    model: str | None = None
    priority: Priority | None = None
    tenant: str | None = None
    submitted_at: Float | None = None
    expires_at: Float | None = None
    started_at: Float | None = None
    """The first claim."""
    finished_at: Float | None = None
    attempt: Int = 0
    """The number that may write; 0: never claimed."""
    attempts: Int = 0
    """How often it was claimed."""
    tokens: Int = 0
    """Tokens of output in the log so far."""
    worker: str | None = None
    cancel_requested: Bool = False
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: ErrorInfo | None = None
    result: str | None = None
    """Name of the object in the result store."""


class WorkerInfo(Answer):
    """What a worker says of itself with every heartbeat."""

    models: Annotated[tuple[str, ...], Field(min_length=1)]
    queues: tuple[str, ...] = ()
    host: str
    pid: Int
    version: str
    fingerprint: str | None = None
    """Of what answers there: workers with the same one answer the same."""
    max_model_len: Int | None = None
    trouble: str | None = None
    """Why finished jobs' results wait, or no jobs are taken, in words."""
    state: str = "ready"
    """``ready``, ``starting`` (its engine died, and the next one loads) or ``draining``."""
    in_hand: Int = 0
    """Jobs it has claimed, and which have not ended."""
    running: Int = 0
    """Sequences in the engine's last step …"""
    waiting: Int = 0
    """… and those that waited for a place in it."""
    seen_at: Float | None = None
    """Unix seconds of the heartbeat, by the worker's clock."""


class ModelInfo(Answer):
    """A model somebody serves or served: known, whether or not a worker is alive."""

    queues: tuple[str, ...] = ()
    max_model_len: Int | None = None
    seen_at: Float
    """Unix seconds of the last heartbeat, by that worker's clock."""
