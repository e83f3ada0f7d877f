"""Endings: give a job that nobody runs its one final state, with the text it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..backends.sink import ResultSink
from ..backends.state import Claim, Entry, Final, State, Write
from ..schemas.events import Delta, Done, Started
from ..schemas.job import Endpoint
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


class Endings:
    """Order of effects as in a worker: fence → ``Done`` in the log → result object → state final.

    Dying between any two is safe: the job is still due, and the next one finds how far this one came.
    """

    def __init__(self, state: State, sink: ResultSink, keeper_id: str) -> None:
        self._state, self._sink, self._keeper_id = state, sink, keeper_id

    def end(self, ending: Ending) -> Result | None:
        """End the job. None: somebody else has, or will. Raises BrokerUnavailable, StoreUnavailable."""
        claim = self._state.claim(ending.job_id, self._keeper_id, ending.expires_at)
        if isinstance(claim, Final) or (result := complete(self._state, ending, claim)) is None:
            return None
        return self._sink.commit(result)[0]


def complete(state: State, ending: Ending, claim: Claim) -> Result | None:
    """Complete the log of a claimed job that is not to run. Returns the result to commit: as ``ending`` says,
    or as the log says that it ended before.

    Safe to repeat. None: fenced. Raises BrokerUnavailable.
    """
    so_far = _SoFar.of(claim.entries)
    done = so_far.done
    if done is None:
        usage = Usage(completion_tokens=so_far.tokens)
        done = Done(reason=ending.reason, error=ending.error, usage=usage, at=claim.now)
        if state.publish([Write(ending.job_id, claim.attempt, 1, done.to_json())]):
            return None
    return _result(ending, claim, so_far, done)


@dataclass(slots=True)
class _SoFar:
    """What the log says of a job's one choice."""

    parts: list[str] = field(default_factory=list[str])
    tokens: int = 0
    started_at: float | None = None
    first_token_at: float | None = None
    done: Done | None = None

    @classmethod
    def of(cls, log: Sequence[Entry]) -> _SoFar:
        found = cls()
        for _, event in log:
            match event:
                case Started() if found.started_at is None:
                    found.started_at = event.at
                case Delta() if event.offset + len(event.ids) > found.tokens:  # else: said before
                    found.tokens = event.offset + len(event.ids)
                    found.parts.append(event.text)
                    found.first_token_at = found.first_token_at or event.at
                case Done():
                    found.parts.append(event.text)
                    found.done = event
                case _:
                    pass
        return found


def _result(ending: Ending, claim: Claim, so_far: _SoFar, done: Done) -> Result:
    echo = ending.echo
    return Result(
        job_id=ending.job_id,
        model=ending.model,
        state=done.reason.state,
        endpoint=Endpoint(echo.get("endpoint", Endpoint.NATIVE)),
        choices=(
            Choice(
                text="".join(so_far.parts),
                finish_reason=done.reason,
                stop_reason=done.stop_reason,
                tool_calls=done.tool_calls,
            ),
        ),
        usage=done.usage,
        timings=Timings(
            submitted_at=ending.submitted_at or claim.now,
            started_at=so_far.started_at,
            first_token_at=so_far.first_token_at,
            finished_at=done.at,
        ),
        error=done.error,
        attempts=claim.attempts - 1,
        seed=echo.get("seed"),
        custom_id=echo.get("custom_id"),
        retry_of=echo.get("retry_of"),
        metadata=echo.get("metadata", {}),
    )
