"""How a worker leaves, and what it takes to stop its heart: a real Valkey, an engine that the test plays."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from gristmill.backends.state import State
from gristmill.schemas.job import JobState
from gristmill.worker.disposition import Disposition
from gristmill.worker.lifecycle import Lifecycle
from gristmill.worker.settings import WorkerSettings

from ..support.fleet import WORKER
from ..support.journal import Attempt, make_job
from ..support.played import Played
from ..support.valkey import Valkey
from ..support.waiting import wait_until

Start = Callable[..., Lifecycle]


@pytest.fixture
def left() -> threading.Event:
    """Set when Celery's loop would be told to end."""
    return threading.Event()


@pytest.fixture
def start(played: Played, state: State, left: threading.Event) -> Iterator[Start]:
    started: list[Lifecycle] = []

    def start(
        leave: Callable[[int], object] = abs,  # not print: the timer may fire in a later test
        leave_s: float = 20.0,
        waiting: Callable[[], int] = lambda: 0,
        **settings: float,
    ) -> Lifecycle:
        lifecycle = Lifecycle(
            WorkerSettings(model="m", heartbeat_every_s=0.3, **settings),  # type: ignore[arg-type]
            "w1",
            state=state,
            handler=played.handler,
            queues=["q"],
            waiting=waiting,
            exit_loop=left.set,
            force_exit=leave,
            leave_s=leave_s,
        )
        lifecycle.start()
        started.append(lifecycle)
        return lifecycle

    yield start
    for lifecycle in started:
        lifecycle.stop("the test is over")
        assert left.wait(10)
        lifecycle.finish(0)


def test_a_worker_whose_rights_are_revoked_and_restored_goes_on(
    start: Start, state: State, valkey: Valkey, left: threading.Event
) -> None:
    """An error of settings, not of the network: it ended the thread that beats, expires and cancels."""
    admin = valkey.client()
    admin.execute_command("ACL", "SETUSER", "admin", "on", ">admin", "~*", "&*", "+@all")
    admin.execute_command("AUTH", "admin", "admin")
    lifecycle = start(drain_s=0.1)
    wait_until(state.workers, 5, "it is announced")
    admin.execute_command("ACL", "SETUSER", "default", "-@write", "-@scripting")
    wait_until(lambda: not admin.execute_command("KEYS", "gm:worker:*"), 5, "its heartbeats fail and expire")
    admin.execute_command("ACL", "SETUSER", "default", "+@all")
    wait_until(state.workers, 5, "it is announced again")

    admin.execute_command("ACL", "SETUSER", "default", "-@write", "-@scripting")
    lifecycle.stop("asked to")
    assert left.wait(5), "it leaves, whatever it is not allowed to say"


def test_when_a_thread_dies_the_jobs_go_back_and_the_worker_leaves(
    start: Start, played: Played, left: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their leases would be renewed for ever, and nobody would work on them."""
    lifecycle = start()
    monkeypatch.setattr(threading, "excepthook", lifecycle.on_thread_died)
    job = make_job()
    delivery = played.deliver(job)
    played.running(job)

    def mistake() -> None:
        raise RuntimeError("of ours")

    threading.Thread(target=mistake, name="publisher").start()
    assert delivery.result(5) is Disposition.REQUEUE
    assert left.wait(5)
    assert lifecycle.exit_code == 1


def test_jobs_that_end_within_the_drain_are_not_handed_back(
    start: Start, played: Played, left: threading.Event
) -> None:
    lifecycle = start(drain_s=20.0)
    job = make_job()
    delivery = played.deliver(job)
    played.running(job)
    lifecycle.stop("SIGTERM")
    played.step(job, 28, finish="length")
    assert delivery.result(5) is Disposition.ACK
    assert left.wait(5)
    assert lifecycle.exit_code == 0


def test_a_drain_does_not_wait_for_a_job_that_runs_elsewhere(
    start: Start, played: Played, state: State, left: threading.Event
) -> None:
    """Its delivery is kept while its new owner lives: all of ``drain_s`` went by with nothing running."""
    lifecycle = start(drain_s=60.0)
    job = make_job()
    delivery = played.deliver(job)
    played.running(job)
    state.register("another", WORKER, 60)
    Attempt.begin(state, job, "another")
    played.step(job, 28)
    wait_until(lambda: played.engine.aborted, 5, "it is fenced")
    lifecycle.stop("SIGTERM")
    assert left.wait(20)
    assert delivery.result(5) is Disposition.REQUEUE


def test_when_celery_ends_by_itself_jobs_are_handed_back_and_threads_freed(
    start: Start, played: Played, left: threading.Event
) -> None:
    """Their threads waited for the engine's tokens, and Python waits for such threads before it exits."""
    lifecycle = start()
    job = make_job()
    delivery = played.deliver(job)
    played.running(job)
    lifecycle.finish(1)
    assert delivery.result(5) is Disposition.REQUEUE
    assert left.is_set()
    assert lifecycle.exit_code == 1


def test_a_drain_ends_in_time_though_neither_broker_nor_store_answers(
    start: Start, played: Played, valkey: Valkey, left: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step had a limit of its own, and together they outlasted the grace period."""
    store_answers, forced = threading.Event(), threading.Event()
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        forced.set()

    put_new = played.store.put_new
    monkeypatch.setattr(played.store, "put_new", lambda *a: store_answers.wait(30) and put_new(*a))
    lifecycle = start(leave, leave_s=1.0, drain_s=0.2)
    stuck, running = make_job(), make_job()
    deliveries = [played.deliver(job) for job in (stuck, running)]
    played.running(stuck), played.running(running)
    played.step(stuck, 28, finish="length")
    wait_until(lambda: played.handler.committer.waiting, 5, "its result is on the way to the store")
    valkey.freeze()
    try:
        began = time.monotonic()
        lifecycle.stop("SIGTERM")
        assert forced.wait(10)
        assert time.monotonic() - began < 0.2 + 1.0 + 1.5
        assert codes == [0]
    finally:
        valkey.thaw()
        store_answers.set()
    assert [delivery.result(15) for delivery in deliveries] == [Disposition.ACK, Disposition.REQUEUE]
    assert left.wait(15)


def test_a_broker_that_is_slow_to_count_delays_no_heartbeat_and_no_deadline(
    start: Start, played: Played, state: State
) -> None:
    """Three HTTP calls on SQS: a worker that waited for them counted as dead, and its jobs ran on."""
    asked, answers = threading.Event(), threading.Event()

    def waiting() -> int:
        asked.set()
        answers.wait(60)
        return 0

    start(waiting=waiting)
    assert asked.wait(10)
    state.unregister("w1")
    wait_until(lambda: "w1" in state.workers(), 10, "it beats on")
    job = make_job(expires_at=time.time() + 0.5)
    assert played.deliver(job).result(10) is Disposition.ACK
    assert played.result(job.id).state is JobState.EXPIRED
    answers.set()


def test_a_burst_ends_when_nothing_waits_any_more(start: Start, left: threading.Event) -> None:
    messages, counted = [1], threading.Event()

    def waiting() -> int:
        if time.monotonic() > began + 1.0:  # a moment's patience is over
            counted.set()
        return len(messages)

    began = time.monotonic()
    lifecycle = start(waiting=waiting, burst=True)
    assert counted.wait(10)
    assert not lifecycle.draining
    messages.clear()
    assert left.wait(10)


def test_a_heartbeat_tells_that_results_wait_for_the_store(
    start: Start, played: Played, state: State
) -> None:
    job = make_job()
    delivery = played.deliver(job)
    played.running(job)
    away = played.store.root.with_suffix(".away")
    played.store.root.rename(away)
    start()
    played.step(job, 28, finish="length")
    told = wait_until(lambda: [w.trouble for w in state.workers().values() if w.trouble], 10, "it is told")
    assert told[0].startswith("results waiting to be stored: 1; results directory")
    away.rename(played.store.root)
    assert delivery.result(15) is Disposition.ACK
    wait_until(lambda: not any(w.trouble for w in state.workers().values()), 10, "that is over")
