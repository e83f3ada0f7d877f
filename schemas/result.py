"""Result: what a job ends in. Its object in the result store is the commit point."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal, Self

from pydantic import Field, model_validator

from .errors import GristmillError
from .job import Endpoint, JobId, JobState
from .tools import ToolCall
from .wire import WIRE_VERSION, Answer, Bool, Float, Int


class FinishReason(StrEnum):
    """Why a choice ended. The first two are OpenAI's names."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    ERROR = "error"

    @property
    def state(self) -> JobState:
        """The final state of a job that ended for this reason."""
        return _STATE_OF[self]


_STATE_OF: dict[FinishReason, JobState] = {
    FinishReason.STOP: JobState.SUCCEEDED,
    FinishReason.LENGTH: JobState.SUCCEEDED,
    FinishReason.CANCELLED: JobState.CANCELLED,
    FinishReason.EXPIRED: JobState.EXPIRED,
    FinishReason.ERROR: JobState.FAILED,
}


class ErrorInfo(Answer):
    """A failure as users see it: ``code`` is stable, ``message`` has the numbers and the next step."""

    code: str
    message: str
    param: str | None = None

    @classmethod
    def of(cls, exc: GristmillError) -> Self:
        """An error of ours as a record."""
        return cls(code=exc.code, message=exc.message, param=getattr(exc, "param", None))


class Usage(Answer):
    """Tokens, as users pay for them: each once, however many attempts it took."""

    prompt_tokens: Int = Field(default=0, ge=0)
    completion_tokens: Int = Field(default=0, ge=0)
    cached_tokens: Int = Field(default=0, ge=0)

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


class Timings(Answer):
    """Unix seconds by the worker's clock; ``submitted_at`` by the submitter's."""

    submitted_at: Float
    started_at: Float | None = None
    """The first attempt's claim."""
    first_token_at: Float | None = None
    finished_at: Float

    @property
    def queue_s(self) -> float | None:
        """Seconds from submission to the first claim."""
        return None if self.started_at is None else max(0.0, self.started_at - self.submitted_at)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from submission to the first token."""
        return None if self.first_token_at is None else max(0.0, self.first_token_at - self.submitted_at)

    @property
    def e2e_s(self) -> float:
        """Seconds from submission to the end."""
        return max(0.0, self.finished_at - self.submitted_at)


class TopLogprob(Answer):
    """A token that the model thought likely."""

    id: Int
    token: str
    """Its text; U+FFFD where it is no whole character: then ``raw`` has its bytes."""
    logprob: Float | None = None
    """None for the first token of a prompt alone: nothing stands before it."""
    raw: str | None = None
    """Its bytes in hexadecimal, if the text does not say."""
    special: Bool = False
    """One of the tokenizer's special tokens: no part of a text by itself."""


class TokenLogprob(TopLogprob):
    """A token of the output or the prompt, and what else was likely in its place, the likeliest first."""

    top: tuple[TopLogprob, ...] = ()


class Choice(Answer):
    """One completion of the prompt."""

    index: Int = 0
    text: str = ""
    finish_reason: FinishReason
    stop_reason: str | Int | None = None
    """The stop string or the stop token id that matched; None for the end token."""
    echo: Bool = False
    """The text begins with the prompt's."""
    token_ids: tuple[Int, ...] | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of each token of the output, as far as they have text; None: not asked for."""
    closed: Bool | None = None
    """With a grammar, when the budget of tokens ran out: whether the text was completed all the same."""
    tool_calls: tuple[ToolCall, ...] | None = None
    """The calls in the text, if there are any and the request brought tools."""


class Crash(Answer):
    """Something died while it ran this job."""

    code: str
    """``engine_died``, ``engine_stalled``, …; ``worker_lost`` if nobody was left to say."""
    message: str = ""
    worker: str = ""
    alone: bool = False
    """No other job was running: this one is the cause. Only these count as failed attempts."""
    tokens: Int = 0
    """Of output, when it happened."""
    at: Float
    """Unix seconds."""


class Result(Answer):
    """How a job ended. Written once, create-only; the text equals what a follower was shown."""

    v: Literal[1] = WIRE_VERSION
    job_id: JobId
    model: str
    state: JobState
    endpoint: Endpoint = Endpoint.NATIVE
    choices: tuple[Choice, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Of each token of the prompt; None: not asked for."""
    usage: Usage = Usage()
    timings: Timings
    error: ErrorInfo | None = None
    attempts: Int = Field(default=1, ge=0)
    """How often the job was claimed; 0: it ended without a claim."""
    seed: Int | None = None
    fingerprint: str | None = None
    """Of what answered: the model's files and how they were run. None: nobody did, or its worker is gone."""
    custom_id: str | None = None
    retry_of: JobId | None = None
    metadata: dict[str, str] = Field(default_factory=dict[str, str])
    crashes: tuple[Crash, ...] = ()
    """What died with it on the way, the last ones if there were many."""

    @model_validator(mode="after")
    def _final_and_explained(self) -> Self:
        if not self.state.final:
            raise ValueError(f"a result has a final state, not {self.state}")
        if (self.state is JobState.FAILED) != (self.error is not None):
            raise ValueError("a failed result has an error, and only a failed one")
        return self

    @property
    def text(self) -> str:
        """The first choice's text; empty when there is none."""
        return self.choices[0].text if self.choices else ""

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ended as it did: the first choice's reason, of those that led to ``state``."""
        reasons = [choice.finish_reason for choice in self.choices]
        first = reasons[0] if reasons else None
        return next((reason for reason in reasons if reason.state is self.state), first)
