"""Jobs, and what a worker would write of them: real State, real server, no engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from gristmill.backends.redis import connect
from gristmill.backends.state import Claim, State, Write
from gristmill.schemas.events import Delta, Done, End
from gristmill.schemas.job import Job, new_job_id
from gristmill.schemas.result import Choice, FinishReason, Result, Timings, Usage
from gristmill.schemas.settings import Settings

from .valkey import Valkey


def make_job(**fields: Any) -> Job:
    """A valid job; say only what matters."""
    now = time.time()
    return Job(
        **{
            "id": new_job_id(),
            "model": "tiny",
            "prompt": "hello",
            "submitted_at": now,
            "expires_at": now + 3600,
            **fields,
        }
    )


@dataclass
class Attempt:
    """What a worker does with one claim: tokens are (id, text), each an entry of its own."""

    state: State
    job: Job
    claim: Claim
    seq: int = 0
    ids: list[int] = field(default_factory=list[int])
    parts: list[str] = field(default_factory=list[str])

    @classmethod
    def begin(cls, state: State, job: Job, worker: str = "w1") -> Attempt:
        claim = state.claim(job.id, worker, job.expires_at)
        assert isinstance(claim, Claim)
        attempt = cls(state, job, claim)
        for _, event in claim.entries:
            if isinstance(event, Delta):
                attempt.ids += event.ids
                attempt.parts.append(event.text)
        return attempt

    @property
    def id(self) -> int:
        return self.claim.attempt

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def entry(self, text: str) -> Write:
        """The next token as an entry, not yet written."""
        self.seq += 1
        delta = Delta(offset=len(self.ids), ids=(len(self.ids),), text=text)
        self.ids += delta.ids
        self.parts.append(text)
        return Write(self.job.id, self.id, self.seq, delta.to_json())

    def write(self, *texts: str) -> bool:
        """False: fenced."""
        return not self.state.publish([self.entry(text) for text in texts])

    def done(self, rest: str = "", reason: FinishReason = FinishReason.STOP) -> bool:
        self.seq += 1
        self.parts.append(rest)
        usage = Usage(prompt_tokens=1, completion_tokens=len(self.ids))
        event = Done(reason=reason, text=rest, usage=usage, at=self.claim.now)
        return not self.state.publish([Write(self.job.id, self.id, self.seq, event.to_json())])

    def result(self, reason: FinishReason = FinishReason.STOP) -> Result:
        return Result(
            job_id=self.job.id,
            model=self.job.model,
            state=reason.state,
            choices=(Choice(text=self.text, finish_reason=reason),),
            usage=Usage(prompt_tokens=1, completion_tokens=len(self.ids)),
            timings=Timings(submitted_at=self.job.submitted_at, finished_at=self.claim.now),
        )

    def finish(self, *, inline: bool = True, reason: FinishReason = FinishReason.STOP) -> bool:
        result = self.result(reason)
        end = End(
            state=result.state, finish_reason=reason, usage=result.usage, result=f"results/{self.job.id}.json"
        )
        return self.state.finish(self.job.id, end, result.to_json() if inline else None)


@pytest.fixture
def settings(valkey: Valkey) -> Settings:
    """Short timeouts: a test that needs the long ones would be slow."""
    return Settings(
        broker_url=valkey.url,
        state_url=valkey.url,
        connect_timeout_s=2.0,
        command_timeout_s=2.0,
        result_ttl_s=600.0,
    )


@pytest.fixture
def state(valkey: Valkey, settings: Settings) -> Iterator[State]:
    """A State on a server of its own."""
    with State(connect(valkey.url, settings), settings) as opened:
        yield opened
