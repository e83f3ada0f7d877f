"""``kill -9`` between each two effects: the job ends once, goes on from its journal, and nobody sees a seam.

One stack for all: the worker that has the job dies at the point, another one that was there all along takes
over when the lease is over, and a third starts meanwhile for the next point.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gristmill.engine.models.tiny import write_tiny
from gristmill.producer.client import JobHandle
from gristmill.schemas.events import Delta, Done, End, Event, Released, Started
from gristmill.schemas.job import JobState

from ..support.faultpoints.sitecustomize import POINTS
from ..support.faults import KillPoints, fault_env
from ..support.stack import Stack, Worker
from ..support.valkey import Valkey
from ..support.waiting import wait_until

pytestmark = pytest.mark.slow

SHORT, LONG = 200, 1500
REQUEST: dict[str, Any] = {
    "prompt": "between two effects",
    "temperature": 0.9,
    "seed": 7,
    "ignore_eos": True,
    "stream": True,
}
# What is found by the next claim: how many attempts there are in the end, and whether the engine ran again.
RUNNING = [
    ("before:State.claim", 1, 1, True),
    ("after:State.claim", 1, 2, True),
    ("before:State.publish", 3, 2, True),
    ("after:State.publish", 2, 2, True),
    ("before:State.publish(done)", 1, 2, True),
    ("after:State.publish(done)", 1, 2, False),
    ("after:Spool.add", 1, 2, False),
    ("before:store._link", 1, 2, False),
    ("after:FileStore.put_new", 1, 2, False),
    ("after:State.finish", 1, 1, False),
    ("after:MessageQueue.ack", 1, 1, False),
]
HANDING_BACK = ["after:Publisher.flush", "after:State.release", "after:MessageQueue.requeue"]
RESTARTING = ["before:EngineClient._hand_over", "after:EngineClient._hand_over"]
SUBMITTING = ["before:State.submit", "after:State.submit", "after:broker.publish"]
STORING = ["after:Parcel.put_away"]


class Range:
    """Workers that die at points, and what they say undisturbed."""

    def __init__(self, stack: Stack, directory: Path) -> None:
        self.stack = stack
        for name in ("points", "ledger"):
            (directory / name).mkdir()
        self.points, self._ledger = KillPoints(directory / "points"), directory / "ledger"
        self._env = self.points.env | fault_env(LEDGER=self._ledger)
        self._env |= {"OMP_NUM_THREADS": "1", "GRISTMILL_DRAIN_S": "0"}
        self._said: dict[int, str] = {}
        self.refill(wait=True)

    def refill(self, *, wait: bool = False) -> None:
        """Two workers live, or start."""
        flags = ("--num-threads", "1", "--max-num-seqs", "8", "--max-total-tokens", "2048")
        while len([worker for worker in self.stack.workers if not worker.dead]) < 2:
            self.stack.worker(*flags, wait=False, env=self._env)
        if wait:
            for worker in self.living():
                worker.wait_ready()

    def living(self) -> list[Worker]:
        return [worker for worker in self.stack.workers if not worker.dead]

    def submit(self, tokens: int) -> JobHandle:
        return self.stack.client.submit(**REQUEST, max_tokens=tokens)

    def undisturbed(self, tokens: int) -> str:
        if tokens not in self._said:
            self._said[tokens] = self.submit(tokens).result(60).text
        return self._said[tokens]

    def owner(self, job_id: str) -> int:
        """The process id of the worker that runs the job."""
        status = self.stack.state.status(job_id)
        assert status is not None
        assert status.worker is not None
        return int(status.worker.split("-")[-2])

    def events(self, job_id: str) -> list[Event]:
        return [event for _, event in self.stack.state.read_log(job_id)]

    def added(self, job_id: str) -> list[tuple[int, int]]:
        """What engines were given of the job: process id, tokens of prompt and output so far."""
        found: list[tuple[float, int, int]] = []
        for file in self._ledger.glob("*.jsonl"):
            for line in map(json.loads, file.read_text().splitlines()):
                of_job = [n for i, n in line.get("add", ()) if i.startswith(job_id)]
                found += [(line["t"], int(file.stem), n) for n in of_job]
        return [(pid, tokens) for _, pid, tokens in sorted(found)]

    def claims_left(self) -> bool:
        return bool(self.stack.valkey.client().exists("gm:claims"))


@pytest.fixture(scope="module")
def kill_range() -> Iterator[Range]:
    with tempfile.TemporaryDirectory(prefix="gm-kill-") as name:
        directory = Path(name)
        model = write_tiny(directory / "model", tokenizer=True, max_position_embeddings=2048)
        (directory / "broker").mkdir()
        valkey = Valkey(directory / "broker").start()
        stack = Stack(valkey, directory, model)
        try:
            yield Range(stack, directory)
        finally:
            stack.close()
            valkey.close()


def follow(job: JobHandle) -> list[Any]:
    return list(job.stream(timeout_s=120))


def check(kill_range: Range, job: JobHandle, followed: list[Any], tokens: int) -> list[Event]:
    """It ended once, as undisturbed, in the log, in the result and before a follower's eyes. Its log."""
    result = job.result(60)
    assert result.state is JobState.SUCCEEDED
    assert result.text == kill_range.undisturbed(tokens)
    assert "".join(chunk.text for chunk in followed) == result.text
    assert not any(chunk.reset for chunk in followed)
    events = kill_range.events(job.id)
    deltas = [event for event in events if isinstance(event, Delta)]
    assert [delta.offset for delta in deltas] == [
        sum(len(d.ids) for d in deltas[:n]) for n in range(len(deltas))
    ]
    assert [type(event) for event in events if not isinstance(event, Delta | Started | Released)] == [
        Done,
        End,
    ]
    assert isinstance(events[-1], End)
    wait_until(lambda: not kill_range.claims_left(), 30, "its message is acknowledged")
    return events


def check_continued(kill_range: Range, job_id: str, events: list[Event]) -> None:
    """What the second engine was given is the prompt and every token that had been journalled by then."""
    given = kill_range.added(job_id)
    starts = [n for n, event in enumerate(events) if isinstance(event, Started)]
    journalled = sum(len(event.ids) for event in events[: starts[-1]] if isinstance(event, Delta))
    prompt = len(REQUEST["prompt"])
    assert given[-1][1] == prompt + journalled


@pytest.mark.parametrize(("point", "nth", "attempts", "runs_again"), RUNNING)
def test_a_worker_killed_between_two_effects_costs_neither_tokens_nor_seams(
    point: str, nth: int, attempts: int, runs_again: bool, kill_range: Range
) -> None:
    kill_range.undisturbed(SHORT)
    kill_range.refill(wait=True)
    kill_range.points.arm(point, nth)
    with ThreadPoolExecutor() as threads:
        job = kill_range.submit(SHORT)
        following = threads.submit(follow, job)
        victim = kill_range.points.wait_struck()
        wait_until(lambda: len(kill_range.living()) == 1, 10, f"worker {victim} is dead")
        kill_range.refill()
        events = check(kill_range, job, following.result(), SHORT)
    assert sum(isinstance(event, Started) for event in events) == attempts
    given = kill_range.added(job.id)
    assert len(given) == (1 if point == "before:State.claim" or not runs_again else len(given))
    if runs_again:
        check_continued(kill_range, job.id, events)


@pytest.mark.parametrize("point", HANDING_BACK)
def test_a_worker_killed_while_it_hands_back_costs_nothing(point: str, kill_range: Range) -> None:
    kill_range.undisturbed(LONG)
    kill_range.refill(wait=True)
    with ThreadPoolExecutor() as threads:
        job = kill_range.submit(LONG)
        following = threads.submit(follow, job)
        wait_until(lambda: len(kill_range.events(job.id)) > 2, 30, "it has some tokens")
        kill_range.points.arm(point)
        os.kill(kill_range.owner(job.id), signal.SIGTERM)
        kill_range.points.wait_struck()
        kill_range.refill()
        events = check(kill_range, job, following.result(), LONG)
    assert sum(isinstance(event, Started) for event in events) == 2
    check_continued(kill_range, job.id, events)


@pytest.mark.parametrize("point", RESTARTING)
def test_a_worker_killed_while_it_restarts_its_engine_costs_nothing(point: str, kill_range: Range) -> None:
    kill_range.undisturbed(LONG)
    kill_range.refill(wait=True)
    with ThreadPoolExecutor() as threads:
        job = kill_range.submit(LONG)
        following = threads.submit(follow, job)
        wait_until(lambda: len(kill_range.events(job.id)) > 2, 30, "it has some tokens")
        kill_range.points.arm(point)
        os.kill(kill_range.added(job.id)[-1][0], signal.SIGKILL)
        kill_range.points.wait_struck()
        kill_range.refill()
        events = check(kill_range, job, following.result(), LONG)
    assert sum(isinstance(event, Started) for event in events) == 2
    check_continued(kill_range, job.id, events)


@pytest.mark.parametrize("point", STORING)
def test_a_worker_killed_while_results_wait_for_the_store_loses_none(point: str, kill_range: Range) -> None:
    kill_range.undisturbed(SHORT)
    kill_range.refill(wait=True)
    results = Path(kill_range.stack.settings.results_url.removeprefix("file://"))
    with ThreadPoolExecutor() as threads:
        results.rename(results.with_name("away"))
        try:
            kill_range.points.arm(point)
            job = kill_range.submit(SHORT)
            following = threads.submit(follow, job)
            kill_range.points.wait_struck()
        finally:
            results.with_name("away").rename(results)
        kill_range.refill()
        events = check(kill_range, job, following.result(), SHORT)
    assert sum(isinstance(event, Started) for event in events) == 2
    assert len(kill_range.added(job.id)) == 1, "the log was complete"


@pytest.mark.parametrize("point", SUBMITTING)
def test_a_client_killed_while_it_submits_may_submit_again(point: str, kill_range: Range) -> None:
    kill_range.undisturbed(SHORT)
    kill_range.refill(wait=True)
    settings, key = kill_range.stack.settings, f"killed {point}"
    code = "import json, sys; from gristmill.producer import Client\n"
    code += "broker, results, request = sys.argv[1:]\n"
    code += "Client(broker, results_url=results, model='m').submit(**json.loads(request))"
    request = REQUEST | {"max_tokens": SHORT, "idempotency_key": key}
    command = [sys.executable, "-c", code, settings.broker_url, settings.results_url, json.dumps(request)]
    kill_range.points.arm(point)
    client = subprocess.Popen(command, env=os.environ | kill_range.points.env)
    assert client.wait(60) == -signal.SIGKILL
    assert kill_range.points.wait_struck() == client.pid

    job = kill_range.stack.client.submit(**request)
    events = check(kill_range, job, follow(job), SHORT)
    attempts = sum(isinstance(event, Started) for event in events)
    # Where the first message is out, the second may find the other worker at it, and take over.
    assert attempts == 1 or (point == "after:broker.publish" and attempts == 2)
    assert 1 <= len(kill_range.added(job.id)) <= attempts


def test_every_point_is_tried() -> None:
    tried = {point for point, *_ in RUNNING} | {*HANDING_BACK, *RESTARTING, *SUBMITTING, *STORING}
    assert tried == set(POINTS)
