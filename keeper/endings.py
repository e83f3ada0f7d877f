"""Endings: give a job that nobody runs its one final state, with the text it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..backends.sink import ResultSink
from ..backends.state import Claim, Entry, Final, State, Write
from ..schemas import logprobs
from ..schemas.events import Candidate, Delta, Done, Event, Started, decisive
from ..schemas.job import Endpoint
from ..schemas.logprobs import TokenLogprobs
from ..schemas.result import Choice, ErrorInfo, FinishReason, Result, Timings, Usage


@dataclass(frozen=True, slots=True)
class Ending:
    """What is known of a job that is to end, and why. ``echo``: see ``backends.calls.Due``."""

    job_id: str
    model: str
    submitted_at: float
    """Unix seconds; 0: not known."""
    expires_at: float
    reason: FinishReason
    error: ErrorInfo | None = None
    echo: dict[str, Any] = field(default_factory=dict[str, Any])
    webhook: str | None = None
    """As its message says; None: the state server knows."""


class Endings:
    """Order of effects as in a worker: fence → ``Done`` in the log → result object → state final.

    Dying between any two is safe: the job is still due, and the next one finds how far this one came.
    """

    def __init__(self, state: State, sink: ResultSink, keeper_id: str) -> None:
        self._state, self._sink, self._keeper_id = state, sink, keeper_id

    def end(self, ending: Ending) -> Result | None:
        """End the job. None: somebody else has, or will. Raises BrokerUnavailable, StoreUnavailable."""
        sent = ending.submitted_at or None
        claim = self._state.claim(ending.job_id, self._keeper_id, ending.expires_at, ending.webhook, sent)
        if isinstance(claim, Final) or (result := complete(self._state, ending, claim)) is None:
            return None
        return self._sink.commit(result)[0]


def complete(state: State, ending: Ending, claim: Claim) -> Result | None:
    """Complete the log of a claimed job that is not to run. Returns the result to commit: as ``ending`` says,
    or as the log says that it ended before.

    Safe to repeat. None: fenced. Raises BrokerUnavailable.
    """
    so_far = _SoFar.of(claim.entries, ending.echo.get("n", 1))
    ends = so_far.missing(ending, claim.now)
    writes = [Write(ending.job_id, claim.attempt, seq, end.to_json()) for seq, end in enumerate(ends, 1)]
    if writes and state.publish(writes):
        return None
    for end in ends:
        so_far.take(end)
    return _result(ending, claim, so_far)


@dataclass(slots=True)
class _Said:
    """What the log says of one choice."""

    parts: list[str] = field(default_factory=list[str])
    tokens: int = 0
    stop_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    done: Done | None = None

    def take(self, event: Delta | Candidate) -> bool:
        """False: all of it was said before."""
        end = event.offset + len(event.ids)
        if end <= self.tokens:
            return False
        if event.logprobs is not None:
            self.logprobs += logprobs.unpack(event.logprobs, len(event.ids))[self.tokens - end :]
        self.tokens = end
        self.parts.append(event.text)
        return True

    def end(self, done: Done) -> None:
        self.parts.append(done.text)
        self.stop_tokens = done.stop_tokens
        self.done = done


@dataclass(slots=True)
class _SoFar:
    """What the log says of a job."""

    returned: int
    """Choices that the job returns."""
    shown: dict[int, _Said] = field(default_factory=dict[int, _Said])
    candidates: dict[int, _Said] = field(default_factory=dict[int, _Said])
    """Those of which the best are to be shown."""
    usage: Usage = field(default_factory=Usage)
    """As the last end has it."""
    started_at: float | None = None
    first_token_at: float | None = None

    @classmethod
    def of(cls, log: Sequence[Entry], returned: int) -> _SoFar:
        found = cls(returned)
        for _, event in log:
            found.take(event)
        return found

    def take(self, event: Event) -> None:
        """The next entry."""
        match event:
            case Started() if self.started_at is None:
                self.started_at = event.at
            case Delta() if self.shown.setdefault(event.choice, _Said()).take(event):
                self.first_token_at = self.first_token_at or event.at
            case Candidate():
                said = self.candidates.setdefault(event.choice, _Said())
                if said.take(event):
                    self.first_token_at = self.first_token_at or event.at
                if event.end is not None:
                    said.end(event.end)
            case Done():
                self.shown.setdefault(event.choice, _Said()).end(event)
                self.usage = event.usage
            case _:
                pass

    def missing(self, ending: Ending, now: float) -> list[Done]:
        """What has to be added for the log to be complete."""
        made = (self.candidates or self.shown).values()
        usage = Usage(completion_tokens=sum(one.tokens + one.stop_tokens for one in made))
        done = Done(reason=ending.reason, error=ending.error, usage=usage, at=now)
        told = {index: "" for index, one in self.shown.items() if one.done is not None}
        open_ = dict.fromkeys({*range(self.returned), *self.shown} - told.keys(), "")
        if open_ and self.candidates:
            numbers = sorted(self.candidates)
            best = logprobs.likeliest([self.candidates[i].logprobs for i in numbers], self.returned)
            open_ |= {rank: "".join(self.candidates[numbers[i]].parts) for rank, i in enumerate(best)}
        return [done.model_copy(update={"choice": i, "text": text}) for i, text in sorted(open_.items())]


def _result(ending: Ending, claim: Claim, so_far: _SoFar) -> Result:
    echo = ending.echo
    ends = [(one, one.done) for _, one in sorted(so_far.shown.items()) if one.done is not None]
    done = decisive(end for _, end in ends)
    return Result(
        job_id=ending.job_id,
        model=ending.model,
        state=done.reason.state,
        endpoint=Endpoint(echo.get("endpoint", Endpoint.NATIVE)),
        choices=tuple(
            Choice(
                index=end.choice,
                text="".join(one.parts),
                finish_reason=end.reason,
                stop_reason=end.stop_reason,
                closed=end.closed,
                tool_calls=end.tool_calls,
            )
            for one, end in ends
        ),
        usage=so_far.usage,
        timings=Timings(
            submitted_at=ending.submitted_at or claim.now,
            started_at=so_far.started_at,
            first_token_at=so_far.first_token_at,
            finished_at=max(end.at for _, end in ends),
        ),
        error=done.error,
        attempts=claim.attempts - 1,
        seed=echo.get("seed"),
        custom_id=echo.get("custom_id"),
        retry_of=echo.get("retry_of"),
        metadata=echo.get("metadata", {}),
    )
