"""When a job must have ended: by the server's clock, whoever else's is wrong, and without its message."""

from __future__ import annotations

import pytest
from gristmill.backends.redis import connect
from gristmill.backends.state import Due, State
from gristmill.schemas import keys
from gristmill.schemas.job import Endpoint, JobState
from gristmill.schemas.sampling import SamplingParams
from gristmill.schemas.settings import Settings
from gristmill.schemas.status import WorkerInfo

from ..support.clock import Clock
from ..support.journal import Attempt, make_job
from ..support.valkey import Valkey

WORKER = WorkerInfo(models=("tiny",), host="here", pid=1, version="0")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def state(valkey: Valkey, settings: Settings, clock: Clock) -> State:
    return State(connect(valkey.url, settings), settings, clock=clock)


def due(state: State) -> list[Due]:
    return state.due(100)[1]


@pytest.mark.parametrize("skew_s", [-30.0, 0.0, 30.0])
def test_a_deadline_runs_by_the_servers_clock(state: State, clock: Clock, skew_s: float) -> None:
    submitted_at = clock.now + skew_s
    job = make_job(submitted_at=submitted_at, expires_at=submitted_at + 10)
    state.submit(job)
    clock.advance(9.9)
    assert due(state) == []
    claim = Attempt.begin(state, job).claim
    assert claim.expires_at - claim.now == pytest.approx(0.1, abs=0.01)
    clock.advance(0.2)
    assert [d.job_id for d in due(state)] == [job.id]
    assert state.due(100)[0] == pytest.approx(clock.now, abs=0.001)


def test_the_longest_due_come_first_and_no_more_than_asked_for(state: State, clock: Clock) -> None:
    jobs = [make_job(submitted_at=clock.now, expires_at=clock.now + life) for life in (30, 10, 20, 40)]
    for job in jobs:
        state.submit(job)
    clock.advance(35)
    assert [d.job_id for d in due(state)] == [jobs[1].id, jobs[2].id, jobs[0].id]
    assert len(state.due(2)[1]) == 2


def test_a_cancelled_job_is_due_at_once_and_one_that_ended_never(state: State) -> None:
    job, ended = make_job(), make_job()
    state.submit(job), state.submit(ended)
    assert due(state) == []
    state.cancel(job.id), state.cancel(ended.id)
    Attempt.begin(state, ended).finish()
    (found,) = due(state)
    assert (found.job_id, found.state, found.cancelled) == (job.id, JobState.QUEUED, True)
    assert state.cancel(ended.id) is JobState.SUCCEEDED
    assert [d.job_id for d in due(state)] == [job.id]


def test_what_a_live_worker_runs_is_its_own(state: State, clock: Clock, valkey: Valkey) -> None:
    job = make_job()
    attempt = Attempt.begin(state, job, "w1")
    state.cancel(job.id)
    assert [d.owned for d in due(state)] == [False]
    state.register("w1", WORKER, 15)
    assert [d.owned for d in due(state)] == [True]
    state.defer(job.id, clock.now + 5)
    assert due(state) == []
    clock.advance(5)
    state.release(job.id, attempt.id)
    assert [d.owned for d in due(state)] == [False]


def test_a_job_whose_state_was_lost_is_due_again_after_its_claim(
    state: State, clock: Clock, valkey: Valkey
) -> None:
    job = make_job(submitted_at=clock.now, expires_at=clock.now + 10)
    state.submit(job)
    valkey.client().flushall()
    Attempt.begin(state, job)
    clock.advance(11)
    assert [d.job_id for d in due(state)] == [job.id]
    valkey.client().delete(keys.state(job.id))
    assert [d.state for d in due(state)] == [None]
    state.not_due([job.id])
    state.defer(job.id, 1.0)
    assert due(state) == []


def test_what_a_result_repeats_is_known_without_the_message(
    state: State, clock: Clock, valkey: Valkey
) -> None:
    job = make_job(
        endpoint=Endpoint.CHAT,
        custom_id="row-7",
        retry_of="job_1",
        metadata={"a": "é"},
        sampling=SamplingParams(seed=0),
    )
    plain = make_job()
    state.submit(job), state.submit(plain)
    clock.advance(4000)
    first, second = sorted(due(state), key=lambda d: not d.echo)
    assert first.echo == {
        "endpoint": "/v1/chat/completions",
        "custom_id": "row-7",
        "retry_of": "job_1",
        "metadata": {"a": "é"},
        "seed": 0,
    }
    assert (second.echo, second.model, second.submitted_at) == ({}, "tiny", plain.submitted_at)
    assert not valkey.client().hexists(keys.state(plain.id), "echo")
