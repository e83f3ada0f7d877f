"""A request that kills engines, or whole workers: it is found and given up, and its neighbours go on."""

from __future__ import annotations

from pathlib import Path

import pytest
from gristmill.schemas.dead import DeadLetter
from gristmill.schemas.events import Crashed, Trial
from gristmill.schemas.job import JobState
from gristmill.schemas.queues import queue_names
from gristmill.schemas.status import WorkerInfo

from ..support.faults import poison
from ..support.stack import Stack
from ..support.waiting import wait_until

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


def wait_all(stack: Stack, ids: list[str], what: str) -> None:
    wait_until(lambda: all(stack.result(i) for i in ids), 150, what)


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


@pytest.mark.parametrize(("how", "code"), [("kill", "engine_died"), ("hang", "engine_stalled")])
def test_twenty_neighbours_of_a_poison_row_succeed(stack: Stack, how: str, code: str, tmp_path: Path) -> None:
    ids = submit_neighbours(stack)
    bad = submit_poison(stack)
    ids += submit_neighbours(stack) if how == "kill" else []
    notes = tmp_path / "poisoned"
    env = poison(TOKEN, how, notes=notes) | {"GRISTMILL_ENGINE_STALL_S": "4"}
    worker = stack.worker("--burst", env=env)
    assert worker.process.wait(150) == 0
    check_given_up(stack, bad, code)
    results = [stack.result(i) for i in ids]
    assert all(r is not None and r.state is JobState.SUCCEEDED and not r.error for r in results)
    crashes = len(notes.read_text().splitlines())
    assert crashes <= 1 + 6 + 3, f"{crashes} engines died of one request among {len(ids) + 1}"
    texts = [result.text for result in results if result]
    assert texts[:NEIGHBOURS] == (texts[NEIGHBOURS:] or texts), "alike prompts gave unlike answers"


def test_a_worker_that_dies_with_its_engine_counts_too(stack: Stack, tmp_path: Path) -> None:
    """Whole containers are killed when memory runs out: nobody is left to write down what happened."""
    bad = submit_poison(stack)
    ids = submit_neighbours(stack)[:4]
    env = poison(TOKEN, "kill_worker", notes=tmp_path / "notes")
    while stack.result(bad) is None:
        assert len(stack.workers) < 8
        stack.worker("--burst", wait=False, env=env).process.wait(150)
    wait_all(stack, ids, "the neighbours end")
    check_given_up(stack, bad, "worker_lost")
    log = [event for _, event in stack.state.read_log(bad)]
    assert sum(isinstance(event, Trial) for event in log) == 3
    assert not any(isinstance(event, Crashed) for event in log)


def test_an_engine_that_fails_now_and_then_costs_nobody_the_job(stack: Stack, tmp_path: Path) -> None:
    """Twice, wherever it happens: a crash that does not come back is nobody's fault in the end."""
    ids = [submit_poison(stack), *submit_neighbours(stack)[:4]]
    worker = stack.worker("--burst", env=poison(TOKEN, "segfault", times=2, notes=tmp_path / "notes"))
    assert worker.process.wait(150) == 0
    results = [stack.result(i) for i in ids]
    assert all(r is not None and r.state is JobState.SUCCEEDED for r in results)
    assert results[0] is not None
    assert [crash.alone for crash in results[0].crashes][-1] is True
    assert not dead_letters(stack)
