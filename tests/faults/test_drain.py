"""Workers that are told to leave: in time, politely or not, while everything works and while nothing does."""

from __future__ import annotations

import json
import signal

from gristmill.schemas import keys
from gristmill.schemas.events import End
from gristmill.schemas.job import JobState, Priority
from gristmill.schemas.queues import queue_name
from gristmill.worker.lifecycle import LEAVE_S

from ..support.stack import Stack
from ..support.waiting import LOADED_S, wait_until
from .test_worker import check_log, logged, submit_all, tokens_so_far, undisturbed


def waiting(stack: Stack) -> list[str]:
    """Job ids in the queue, next one first."""
    key = keys.queue_messages(queue_name("m", Priority.NORMAL), "default")
    entries = stack.valkey.client().lrange(key, 0, -1)
    return [json.loads(entry.partition(b"\n")[2])["headers"]["id"] for entry in reversed(entries)]


def test_a_drained_workers_jobs_are_the_next_ones_and_go_on_where_they_were(stack: Stack) -> None:
    """Told twice, so that it leaves at once; then the next worker is told, and killed before it has left."""
    first = stack.worker("--max-num-seqs", "4", "--drain-s", "60")
    expected = undisturbed(stack)
    ids = submit_all(stack)
    wait_until(lambda: sum(tokens_so_far(stack, i) >= 8 for i in ids) >= 2, 60, "two run")
    first.process.send_signal(signal.SIGTERM)
    wait_until(lambda: first.said("worker.draining"), 10, "it drains")
    began = [i for i in ids if logged(stack, i)]
    first.process.send_signal(signal.SIGTERM)
    assert first.process.wait(LEAVE_S + LOADED_S) == 0
    ended = {i for i in ids if stack.result(i)}
    head = [i for i in began if i not in ended]
    assert head, "all that ran had ended: nothing was tested"
    assert set(waiting(stack)[: len(head)]) == set(head)
    assert not stack.valkey.client().hlen(keys.CLAIMS)
    states = [status for i in head if (status := stack.state.status(i))]
    assert {status.state for status in states} == {JobState.QUEUED}
    assert any(status.tokens for status in states), "their tokens are kept"

    before = {i: len(logged(stack, i)) for i in head}
    second = stack.worker("--max-num-seqs", "4", "--drain-s", "60")
    wait_until(lambda: any(len(logged(stack, i)) > before[i] for i in head), 30, "it goes on")
    second.process.send_signal(signal.SIGTERM)
    wait_until(lambda: second.said("worker.draining"), 10, "it drains")
    second.kill()
    stack.worker()
    wait_until(lambda: all(stack.result(i) for i in ids), 90, "every job ends")
    wait_until(lambda: all(isinstance(logged(stack, i)[-1], End) for i in ids), 10, "every log ends")
    for n, job_id in enumerate(ids):
        result = stack.result(job_id)
        assert result is not None
        assert result.text == expected[n]
        assert check_log(stack, job_id, result.text) <= 3


def test_a_worker_leaves_in_time_though_the_broker_is_frozen(stack: Stack) -> None:
    worker = stack.worker("--drain-s", "1")
    expected = undisturbed(stack)
    ids = submit_all(stack)
    wait_until(lambda: all(tokens_so_far(stack, i) >= 8 for i in ids), 60, "every job has some tokens")
    stack.valkey.freeze()
    try:
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(1 + LEAVE_S + LOADED_S) == 0
    finally:
        stack.valkey.thaw()
    stack.worker()
    wait_until(lambda: all(stack.result(i) for i in ids), 90, "every job ends")
    for n, job_id in enumerate(ids):
        result = stack.result(job_id)
        assert result is not None
        assert result.text == expected[n]
