"""The publisher writes what is due when it is due, and sleeps otherwise."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from gristmill.backends.state import State, Write
from gristmill.engine.messages import Output
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.errors import BrokerUnavailable
from gristmill.schemas.job import Job
from gristmill.schemas.sampling import SamplingParams
from gristmill.worker.generation import JOURNAL_S, JOURNAL_TOKENS, Generation
from gristmill.worker.publisher import Publisher

from ..support.waiting import wait_until


class Server:
    """Takes entries down, with the time; away when told to be."""

    def __init__(self) -> None:
        self.written: list[tuple[float, list[str]]] = []
        self.away = False

    def publish(self, writes: list[Write]) -> set[str]:
        if self.away:
            raise BrokerUnavailable("away")
        self.written.append((time.time(), [write.job_id for write in writes]))
        return set()

    @property
    def names(self) -> list[str]:
        return [name for _, names in self.written for name in names]


class Watched(Publisher):
    """Counts how often it looks through its jobs."""

    looks = 0

    def _next_due_at(self) -> float:
        self.looks += 1
        return super()._next_due_at()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def publisher(server: Server) -> Iterator[Watched]:
    def nothing(_: Generation) -> None:
        return

    state = cast("State", server)
    made = Watched(state, on_complete=nothing, on_fenced=nothing, on_trial_recorded=nothing)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def job(smollm2: Path, publisher: Watched) -> Callable[..., Generation]:
    tokenizer = Tokenizer(smollm2)

    def made(name: str, **more: Any) -> Generation:
        job = Job(
            id=name,
            model="m",
            prompt="x",
            sampling=SamplingParams(),
            submitted_at=1.0,
            expires_at=1e11,
            **more,
        )
        found = Generation(job, attempt=7, attempts=1, started_at=10.0, tokenizer=tokenizer)
        found.admit([1, 2, 3], 1000, 10.0)
        publisher.add(found)
        return found

    return made


def step(publisher: Publisher, *generations: Generation, tokens: int = 1) -> float:
    """As the listener does it. Returns when it began."""
    now = time.time()
    with publisher.lock:
        for one in generations:
            one.push(Output(id=one.request_id, token_ids=[504] * tokens), now)
        publisher.wake(min(at for one in generations if (at := one.due_at()) is not None))
    return now


def test_tokens_wait_for_others_and_no_longer_than_they_may(
    publisher: Watched, server: Server, job: Callable[..., Generation]
) -> None:
    quiet, late = job("quiet"), job("late")
    began = step(publisher, quiet)
    time.sleep(0.3)
    later = step(publisher, late)
    wait_until(lambda: server.names == ["quiet", "late"], 10, "both are written")
    at = [when for when, _ in server.written]
    assert began + JOURNAL_S <= at[0] < later + JOURNAL_S <= at[1], "nobody waits for who came later"


def test_what_is_due_sooner_does_not_wait_for_what_is_due_later(
    publisher: Watched, server: Server, job: Callable[..., Generation]
) -> None:
    quiet, busy, streamed = job("quiet"), job("busy"), job("streamed", stream=True)
    began = step(publisher, quiet)
    step(publisher, busy, tokens=JOURNAL_TOKENS)
    step(publisher, streamed)
    wait_until(lambda: set(server.names) == {"busy", "streamed", "quiet"}, 10, "all are written")
    at = {name: when for when, names in reversed(server.written) for name in names}
    assert at["quiet"] >= began + JOURNAL_S
    assert max(at["busy"], at["streamed"]) < at["quiet"]


def test_steps_that_make_nothing_due_earlier_do_not_wake_it(
    publisher: Watched, job: Callable[..., Generation]
) -> None:
    jobs = [job(str(n)) for n in range(4)]
    step(publisher, *jobs)
    wait_until(lambda: publisher.looks > 0, 5, "it looks once it has something")
    time.sleep(0.05)
    looks = publisher.looks
    for _ in range(10):
        step(publisher, *jobs)
    time.sleep(0.05)
    assert publisher.looks == looks


def test_nothing_is_lost_while_the_server_is_away(
    publisher: Watched, server: Server, job: Callable[..., Generation]
) -> None:
    server.away = True
    first, second = job("first", stream=True), job("second")
    step(publisher, first)
    wait_until(lambda: not publisher.healthy, 5, "it has noticed")
    step(publisher, second, tokens=JOURNAL_TOKENS)  # due during the pause between two tries
    server.away = False
    wait_until(lambda: set(server.names) == {"first", "second"}, 10, "both are written")
    assert publisher.healthy


def test_it_can_be_flushed_and_stopped_while_it_waits_for_ever(
    publisher: Watched, server: Server, job: Callable[..., Generation]
) -> None:
    job("idle")
    assert publisher.flush(5.0)
    quiet = job("quiet")
    step(publisher, quiet)
    assert publisher.flush(5.0)
    assert server.names == ["quiet"]
    publisher.stop()
    assert "publisher" not in {thread.name for thread in threading.enumerate()}
