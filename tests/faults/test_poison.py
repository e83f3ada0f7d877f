"""A request that kills engines, or whole workers: it is found and given up, and its neighbours go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from gristmill.schemas.dead import DeadLetter
from gristmill.schemas.events import Crashed, Trial
from gristmill.schemas.job import Job, JobState
from gristmill.schemas.queues import queue_names
from gristmill.schemas.result import Result
from gristmill.schemas.sampling import SamplingParams
from gristmill.schemas.status import WorkerInfo

from ..support.batches import BATCH, lines_of, row, run_batch
from ..support.faults import poison
from ..support.stack import Stack
from ..support.waiting import wait_until

pytestmark = pytest.mark.timeout(600)
DEADLINE_S = 500
"""Ten engines die and start again: half a minute, or ten times that on a machine with other things to do."""
TOKEN = 4_321
"""Poison, where a prompt holds it. No other prompt does, and no greedy answer to these reaches it."""
NEIGHBOURS, TOKENS = 20, 24


def submit_neighbours(stack: Stack) -> list[str]:
    return [
        stack.client.submit(
            prompt_ids=[1, 100 + n, 7], max_tokens=TOKENS, temperature=0.0, ignore_eos=True
        ).id
        for n in range(NEIGHBOURS)
    ]


def submit_poison(stack: Stack) -> str:
    return stack.client.submit(prompt_ids=[1, 2, TOKEN, 3], max_tokens=TOKENS, temperature=0.0).id


@pytest.fixture
def stack(tiny_stack: Stack) -> Stack:
    """Some worker served the model before: jobs may be submitted while none does."""
    info = WorkerInfo(models=("m",), queues=tuple(queue_names("m")), host="h", pid=1, version="0")
    tiny_stack.state.register("earlier", info, 1.0)
    return tiny_stack


def succeeded(stack: Stack, job_id: str) -> Result:
    result = stack.result(job_id)
    assert result is not None, f"{job_id} has no result"
    assert result.state is JobState.SUCCEEDED, result.error
    return result


def dead_letters(stack: Stack) -> list[DeadLetter]:
    return list(stack.client.dead.list())


def check_given_up(stack: Stack, job_id: str, code: str, strikes: int = 3) -> None:
    result = stack.result(job_id)
    assert result is not None
    assert result.state is JobState.FAILED
    assert result.error is not None
    assert result.error.code == "max_attempts"
    assert f"gristmill dead requeue {job_id}" in result.error.message
    assert [crash.code for crash in result.crashes if crash.alone] == [code] * strikes
    letters = wait_until(lambda: dead_letters(stack), 10, "the message is among the dead letters")
    assert [(letter.job_id, letter.reason) for letter in letters] == [(job_id, "max_attempts")]
    status = stack.state.status(job_id)
    assert status is not None
    assert status.state is JobState.FAILED


def test_a_poison_row_of_a_batch_is_an_error_line_and_its_neighbours_succeed(stack: Stack) -> None:
    def asked(line: int, *prompt: int) -> Job:
        sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        return row(line, prompt=None, prompt_ids=prompt, sampling=sampling)

    rows = [asked(1, 1, 101, 7), asked(2, 1, 2, TOKEN, 3), asked(3, 1, 103, 7)]
    run_batch(stack.state, stack.store, rows)
    stack.worker(wait=False, env=poison(TOKEN) | {"GRISTMILL_MAX_ATTEMPTS": "1"})
    batches = stack.state.batches

    def final() -> bool:
        batch = batches.get(BATCH)
        return batch is not None and batch.status.final

    wait_until(final, DEADLINE_S, "the batch has ended")
    first, bad, third = lines_of(stack.state, stack.store)
    assert bad["response"]["body"]["error"]["code"] == "max_attempts"
    assert "gristmill dead" not in bad["response"]["body"]["error"]["message"]
    for line in (first, third):
        assert line["response"]["body"]["usage"]["completion_tokens"] == TOKENS
    assert dead_letters(stack) == []


def test_twenty_neighbours_of_a_poison_row_succeed(stack: Stack, tmp_path: Path) -> None:
    """Forty, twenty on either side: they are the same twenty prompts, and get the same answers."""
    before, bad, after = submit_neighbours(stack), submit_poison(stack), submit_neighbours(stack)
    notes = tmp_path / "poisoned"
    worker = stack.worker("--burst", env=poison(TOKEN, "kill", notes=notes))
    assert worker.process.wait(DEADLINE_S) == 0
    check_given_up(stack, bad, "engine_died")
    texts = [succeeded(stack, job_id).text for job_id in (*before, *after)]
    assert texts[:NEIGHBOURS] == texts[NEIGHBOURS:]
    crashes = len(notes.read_text().splitlines())
    assert crashes <= 1 + 6 + 3, f"{crashes} engines died of one request among {len(texts) + 1}"


def test_a_request_that_hangs_engines_is_found_as_well(stack: Stack) -> None:
    good, bad = submit_neighbours(stack)[:2], submit_poison(stack)
    worker = stack.worker("--burst", env=poison(TOKEN, "hang") | {"GRISTMILL_ENGINE_STALL_S": "3"})
    assert worker.process.wait(DEADLINE_S) == 0
    check_given_up(stack, bad, "engine_stalled")
    assert all(succeeded(stack, job_id) for job_id in good)


def test_a_worker_that_dies_with_its_engine_counts_too(stack: Stack) -> None:
    """Whole containers are killed when memory runs out: nobody is left to write down what happened."""
    bad, good = submit_poison(stack), submit_neighbours(stack)[:4]
    while stack.result(bad) is None:
        assert len(stack.workers) < 8
        worker = stack.worker(wait=False, env=poison(TOKEN, "kill_worker"))
        wait_until(lambda: worker.dead or stack.result(bad), 60, "it dies of it, or gives it up")  # noqa: B023
    wait_until(lambda: all(stack.result(job_id) for job_id in good), 120, "the others end")
    assert all(succeeded(stack, job_id) for job_id in good)
    check_given_up(stack, bad, "worker_lost")
    log = [event for _, event in stack.state.read_log(bad)]
    assert sum(isinstance(event, Trial) for event in log) == 3
    assert not any(isinstance(event, Crashed) for event in log)


def test_a_crash_that_does_not_come_back_costs_nobody_the_job(stack: Stack, tmp_path: Path) -> None:
    ids = [submit_poison(stack), *submit_neighbours(stack)[:4]]
    worker = stack.worker("--burst", env=poison(TOKEN, "segfault", times=2, notes=tmp_path / "notes"))
    assert worker.process.wait(DEADLINE_S) == 0
    crashes = [len(succeeded(stack, job_id).crashes) for job_id in ids]
    assert crashes[0] == 2, "its history says so"
    assert not dead_letters(stack)
