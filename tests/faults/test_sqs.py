"""A whole Gristmill on SQS: real workers that are killed, drained and told to wait; no job is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gristmill.backends import broker
from gristmill.schemas import keys
from gristmill.schemas.events import Delta, End, Started
from gristmill.schemas.job import JobState, Priority
from gristmill.schemas.queues import queue_name

from ..support.sqs import SqsServer
from ..support.stack import Stack
from ..support.valkey import Valkey
from ..support.waiting import wait_until

TOKENS = 96


@pytest.fixture
def mill(valkey: Valkey, tmp_path: Path, smollm2: Path) -> Iterator[Callable[[SqsServer], Stack]]:
    """A stack on the server given, its queues created."""
    stacks: list[Stack] = []

    def build(server: SqsServer) -> Stack:
        settings = server.settings(valkey, tmp_path)
        server.create(settings)
        stacks.append(Stack(valkey, tmp_path, smollm2, settings))
        stacks[-1].state.announce(server.model, server.queues)
        return stacks[-1]

    yield build
    for stack in stacks:
        stack.close()


def tokens_so_far(stack: Stack, job_id: str) -> int:
    return sum(len(e.ids) for _, e in stack.state.read_log(job_id) if isinstance(e, Delta))


def check_log(stack: Stack, job_id: str) -> int:
    """Offsets run on without gap or repetition, and the log has ended. Returns the attempts."""
    position, attempts = 0, 0
    events = [event for _, event in stack.state.read_log(job_id)]
    for event in events:
        attempts += isinstance(event, Started)
        if isinstance(event, Delta):
            assert event.offset == position
            position += len(event.ids)
    assert isinstance(events[-1], End)
    assert position == TOKENS
    return attempts


def test_on_sqs_a_killed_workers_job_goes_on_and_leases_last_as_long_as_jobs(
    mill: Callable[[SqsServer], Stack], moto_sqs: SqsServer
) -> None:
    stack, normal = mill(moto_sqs), moto_sqs.queues[1]
    first = stack.worker()
    long = stack.client.submit("Tell me a story.", max_tokens=TOKENS, ignore_eos=True, temperature=0)
    wait_until(lambda: tokens_so_far(stack, long.id) >= 16, 60, "it has some tokens")
    second = stack.worker(wait=False)
    first.kill()
    second.wait_ready()
    text = long.result(90).text
    wait_until(lambda: moto_sqs.counts(normal) == (0, 0), 15, "the message is deleted")
    assert check_log(stack, long.id) == 2

    again = stack.client.submit("Tell me a story.", max_tokens=TOKENS, ignore_eos=True, temperature=0)
    assert again.result(90).text == text
    assert check_log(stack, again.id) == 1, "its lease was renewed while it ran"

    request = stack.client.submit("Once upon", max_tokens=4, metadata={"note": "x" * 100_000}, tenant="ann")
    assert request.result(60).metadata["note"] == "x" * 100_000
    name = keys.request_object(request.id)
    wait_until(lambda: not stack.store.exists(name), 15, "its request object is taken away")

    app = broker.make_app(stack.settings)
    with broker.queues_of(app) as queues:
        queues.pause(normal, paused=True)
        wait_until(lambda: second.said("queues.paused"), 10, "the worker knows")
        waits = stack.client.submit("It waits", max_tokens=4)
        passes = stack.client.submit("It passes", max_tokens=4, priority="interactive")
        assert passes.result(60).state is JobState.SUCCEEDED
        assert waits.status().state is JobState.QUEUED
        queues.pause(normal, paused=False)
    broker.close(app)
    assert waits.result(60).state is JobState.SUCCEEDED

    endless = stack.client.submit("On and on", max_tokens=4000, ignore_eos=True)
    wait_until(lambda: tokens_so_far(stack, endless.id), 60, "it runs")
    endless.cancel()
    assert endless.result(30, check=False).state is JobState.CANCELLED
    assert "test:test" not in second.log.read_text(), "credentials are not logged"


def test_on_sqs_a_drained_worker_hands_back_and_a_lost_state_repeats_nothing(
    mill: Callable[[SqsServer], Stack], ministack_endpoint: str
) -> None:
    server = SqsServer(ministack_endpoint)
    stack = mill(server)
    first = stack.worker(env={"GRISTMILL_DRAIN_S": "0.1"})
    done = stack.client.submit("Done before", max_tokens=4)
    text = done.result(60).text
    long = stack.client.submit("Tell me a story.", max_tokens=TOKENS, ignore_eos=True)
    wait_until(lambda: tokens_so_far(stack, long.id) >= 16, 60, "it has some tokens")
    assert first.terminate() == 0
    wait_until(lambda: server.counts(server.queues[1]) == (1, 0), 10, "it waits again")

    assert done.job is not None
    app = broker.make_app(stack.settings)
    stack.valkey.client().flushall()
    broker.publish(app, queue_name(server.model, Priority.NORMAL), done.job.to_json(), done.id)
    broker.close(app)
    second = stack.worker()
    finished = wait_until(lambda: stack.result(long.id), 120, "the job that ran begins anew and ends")
    assert finished.usage.completion_tokens == TOKENS
    wait_until(lambda: server.counts(server.queues[1]) == (0, 0), 30, "both messages are deleted")
    assert stack.client.get(done.id).result(10).text == text
    again = [event for _, event in stack.state.read_log(done.id)]
    assert not any(isinstance(event, Delta) for event in again), "it was run a second time"
    assert second.said("job.finished")
