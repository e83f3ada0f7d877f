"""The keeper ends what nobody runs: a real Valkey, a result directory, a clock that the test moves."""

from __future__ import annotations

import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from gristmill.backends.dead import DeadLetters
from gristmill.backends.redis import connect
from gristmill.backends.state import State
from gristmill.keeper.health import HealthPage
from gristmill.schemas import keys
from gristmill.schemas.errors import StoreUnavailable
from gristmill.schemas.events import End
from gristmill.schemas.job import JobState
from gristmill.schemas.result import FinishReason
from gristmill.schemas.settings import Settings

from ..support.fleet import QUEUE, WORKER, Fleet
from ..support.journal import Attempt, make_job
from ..support.valkey import Valkey
from ..support.waiting import wait_until


@pytest.fixture
def fleet(valkey: Valkey, settings: Settings, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(valkey, settings, tmp_path)
    fleet.state.register("w1", WORKER, 15)
    fleet.state.unregister("w1")
    yield fleet
    fleet.close()


def test_the_message_of_a_failed_job_is_left_to_a_worker_which_may_bury_it(fleet: Fleet) -> None:
    """Its worker died between the job's end and the dead letter, and the message was thrown away here."""
    failed, other = fleet.submit(make_job()), fleet.submit(make_job())
    fleet.state.finish(failed.id, End(state=JobState.FAILED))
    fleet.state.finish(other.id, End(state=JobState.SUCCEEDED))
    assert fleet.keeper().round().pruned == 1
    assert fleet.claim().payload.count(failed.id.encode())
    fleet.close()


def test_a_fleet_scaled_to_zero_expires_jobs_on_time(fleet: Fleet) -> None:
    keeper, start = fleet.keeper(), fleet.clock.now
    short = fleet.submit(make_job(submitted_at=start, expires_at=start + 10, custom_id="row-1"))
    long = fleet.submit(make_job(submitted_at=start, expires_at=start + 60))
    fleet.clock.advance(9)
    assert keeper.round().idle
    fleet.clock.advance(1)
    assert keeper.round().ended == 1
    assert fleet.states(short, long) == [JobState.EXPIRED, JobState.QUEUED]
    result = fleet.result(short)
    assert result is not None
    assert (result.state, result.finish_reason, result.text) == (JobState.EXPIRED, FinishReason.EXPIRED, "")
    assert (result.attempts, result.custom_id, result.model) == (0, "row-1", "tiny")
    assert keeper.round().idle


def test_a_job_cancelled_in_the_queue_ends_at_once_without_a_worker(fleet: Fleet) -> None:
    job, other = fleet.submit(make_job()), fleet.submit(make_job())
    fleet.state.cancel(job.id)
    done = fleet.keeper().round()
    assert (done.ended, done.pruned) == (1, 1)
    assert fleet.states(job, other) == [JobState.CANCELLED, JobState.QUEUED]
    assert fleet.queue.depth(QUEUE) == 1, "the other's message"
    assert fleet.claim().payload.count(other.id.encode())


def test_the_text_so_far_is_kept_and_the_log_says_how_it_ended(fleet: Fleet) -> None:
    job = make_job(stream=True)
    fleet.state.submit(job)
    attempt = Attempt.begin(fleet.state, job)
    attempt.write("Once", " upon", " a")
    fleet.state.cancel(job.id)
    assert fleet.keeper().round().ended == 1
    result = fleet.result(job)
    assert result is not None
    assert (result.text, result.state, result.attempts) == ("Once upon a", JobState.CANCELLED, 1)
    assert result.usage.completion_tokens == 3
    kinds = [getattr(event, "kind", None) for _, event in fleet.state.read_log(job.id)]
    assert kinds == ["started", "delta", "delta", "delta", "started", "done", "end"]
    assert not attempt.write(" zombie"), "whoever ran it is fenced"


def test_a_job_whose_log_is_complete_ends_as_the_log_says(fleet: Fleet) -> None:
    """Its worker died between the last entry and the result: the time that passed since changes nothing."""
    job = make_job(submitted_at=fleet.clock.now, expires_at=fleet.clock.now + 10)
    fleet.state.submit(job)
    attempt = Attempt.begin(fleet.state, job)
    attempt.write("all", " of it")
    attempt.done(" now")
    fleet.clock.advance(11)
    fleet.keeper().round()
    result = fleet.result(job)
    assert result is not None
    assert (result.state, result.text) == (JobState.SUCCEEDED, "all of it now")


def test_what_a_live_worker_runs_is_left_to_it(fleet: Fleet) -> None:
    job = make_job()
    fleet.state.submit(job)
    fleet.state.register("w1", WORKER, 15)
    attempt = Attempt.begin(fleet.state, job, "w1")
    fleet.state.cancel(job.id)
    keeper = fleet.keeper()
    done = keeper.round()
    assert (done.ended, done.deferred) == (0, 1)
    assert attempt.write("still its own")
    assert keeper.round().deferred == 0, "not looked at again before its time"
    fleet.state.unregister("w1")
    fleet.clock.advance(5)
    assert keeper.round().ended == 1


def test_a_result_that_stands_counts_and_the_job_ends_as_it_says(fleet: Fleet) -> None:
    """Its worker died between the result and the state."""
    job = make_job(submitted_at=fleet.clock.now, expires_at=fleet.clock.now + 10)
    fleet.state.submit(job)
    attempt = Attempt.begin(fleet.state, job)
    attempt.write("a")
    fleet.store.put_new(keys.result_object(job.id), attempt.result().to_json().encode())
    fleet.clock.advance(11)
    fleet.keeper().round()
    assert fleet.states(job) == [JobState.SUCCEEDED]


def test_a_store_that_is_down_costs_no_job_its_end(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    job = fleet.submit(make_job())
    fleet.state.cancel(job.id)
    keeper = fleet.keeper()
    with monkeypatch.context() as patch:

        def down(*_: object) -> bool:
            raise StoreUnavailable("503")

        patch.setattr(fleet.store, "put_new", down)
        patch.setattr(fleet.store, "check", down)
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                keeper.round()
    assert len(fleet.state.read_log(job.id)) == 2, "one claim, and no more until the store is back"
    assert fleet.states(job) == [JobState.RUNNING], "claimed, by nobody who lives"
    assert keeper.round().ended == 1
    assert fleet.states(job) == [JobState.CANCELLED]


def test_one_job_that_cannot_be_ended_stands_in_nobodys_way(fleet: Fleet) -> None:
    evil, good = fleet.submit(make_job(custom_id="evil")), fleet.submit(make_job())
    fleet.state.cancel(evil.id), fleet.state.cancel(good.id)
    fleet.valkey.client().hset(keys.state(evil.id), "echo", '{"endpoint": "/v9/unheard-of"}')
    keeper = fleet.keeper()
    assert keeper.round().ended == 1
    assert fleet.states(good) == [JobState.CANCELLED]
    assert keeper.round().idle, "it is tried again, and not at once"


def test_a_dead_letter_without_a_final_state_fails_its_job(fleet: Fleet) -> None:
    job, done = fleet.submit(make_job()), fleet.submit(make_job())
    ended = Attempt.begin(fleet.state, done)
    ended.finish()
    for _ in range(2):
        fleet.queue.bury(fleet.claim().tag, "delivered 1,000 times")
    fleet.queue.put(QUEUE, "default", "x", "not even a message")
    fleet.queue.bury(fleet.claim().tag, "not a message")
    keeper = fleet.keeper()
    assert keeper.round().drained == 1
    assert fleet.states(job, done) == [JobState.FAILED, JobState.SUCCEEDED]
    result = fleet.result(job)
    assert result is not None
    assert result.error is not None
    assert result.error.code == "dead_lettered"
    assert "delivered 1,000 times" in result.error.message
    assert fleet.valkey.client().exists(keys.DEAD_NEW) == 0, "nothing is left to drain"
    assert DeadLetters(fleet.valkey.client()).count(QUEUE) == 3, "they stay, for a person to look at"


def test_a_dead_letter_whose_state_was_lost_is_answered_from_its_message(fleet: Fleet) -> None:
    job = fleet.submit(make_job(custom_id="row-9", metadata={"k": "v"}))
    fleet.valkey.client().delete(keys.state(job.id))
    fleet.queue.bury(fleet.claim().tag, "why not")
    assert fleet.keeper().round().drained == 1
    result = fleet.result(job)
    assert result is not None
    assert (result.custom_id, result.metadata, result.model) == ("row-9", {"k": "v"}, "tiny")


def test_claims_of_dead_workers_go_back_and_messages_of_ended_jobs_go(fleet: Fleet) -> None:
    jobs = [fleet.submit(make_job(tenant=tenant)) for tenant in ("a", "a", "b")]
    claimed = fleet.claim()
    keeper = fleet.keeper()
    keeper.round()
    fleet.queue.renew([claimed.tag])
    fleet.valkey.client().zadd(keys.CLAIM_EXPIRY, {claimed.tag: 1})  # its owner died a while ago
    wait_until(lambda: keeper.round().swept == 1, 5, "the claim goes back")
    assert fleet.queue.depth(QUEUE) == 3
    for job in jobs:
        fleet.state.cancel(job.id)
    keeper.round()
    assert fleet.queue.depth(QUEUE) == fleet.queue.claimed() == 0
    client = fleet.valkey.client()
    assert not list(client.scan_iter("gm:queue:*"))


def test_the_walk_through_a_long_queue_reaches_its_end_and_begins_anew(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gristmill.keeper.pruner.PAGE", 3)
    monkeypatch.setattr("gristmill.keeper.pruner.CALLS", 1)
    jobs = [fleet.submit(make_job()) for _ in range(10)]
    keeper = fleet.keeper()
    for number in (9, 4, 3, 0):
        fleet.state.cancel(jobs[number].id)
    pruned = sum(keeper.round().pruned for _ in range(6))
    assert pruned == 4
    fleet.state.cancel(jobs[1].id)
    assert sum(keeper.round().pruned for _ in range(6)) == 1
    left = [fleet.claim().payload for _ in range(5)]
    assert [any(job.id.encode() in body for body in left) for job in jobs] == [
        number in (2, 5, 6, 7, 8) for number in range(10)
    ]


def test_one_keeper_leads_and_another_takes_over(fleet: Fleet) -> None:
    first, second = fleet.keeper("k1"), fleet.keeper("k2")
    assert (first.lead(), second.lead(), first.lead()) == (True, False, True)
    assert 0 < fleet.valkey.client().pttl(keys.KEEPER) <= 15_000
    first.leave()
    assert (second.lead(), first.lead()) == (True, False)


def test_two_keepers_at_once_end_every_job_once(fleet: Fleet) -> None:
    """The lock is for economy: a leader that was frozen past it does what the new one does, and no harm."""
    jobs = [fleet.submit(make_job(submitted_at=fleet.clock.now)) for _ in range(40)]
    for job in jobs:
        fleet.state.cancel(job.id)
    keepers = [fleet.keeper(f"k{n}") for n in range(3)]
    threads = [threading.Thread(target=keeper.round) for keeper in keepers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    wait_until(lambda: keepers[0].round().idle, 10, "nothing is left")
    assert set(fleet.states(*jobs)) == {JobState.CANCELLED}
    for job in jobs:
        ends = [e for _, e in fleet.state.read_log(job.id) if getattr(e, "kind", None) == "end"]
        assert len(ends) == 1


def test_a_running_keeper_hears_a_cancellation_and_outlives_its_server(fleet: Fleet) -> None:
    stop = threading.Event()
    keeper = fleet.keeper()
    thread = threading.Thread(target=keeper.run, args=(stop,))
    thread.start()
    try:
        job = fleet.submit(make_job())
        fleet.state.cancel(job.id)
        wait_until(lambda: fleet.states(job) == [JobState.CANCELLED], 10, "it is ended")
        fleet.valkey.restart()
        other = fleet.submit(make_job())
        fleet.state.cancel(other.id)
        wait_until(lambda: fleet.states(other) == [JobState.CANCELLED], 20, "the next one, too")
    finally:
        stop.set()
        thread.join(10)
    assert not keeper.leads
    assert not fleet.valkey.client().exists(keys.KEEPER)


def test_the_health_page_tells_who_leads_and_what_was_done(fleet: Fleet) -> None:
    keeper = fleet.keeper()
    keeper.lead()
    fleet.state.cancel(fleet.submit(make_job()).id)
    keeper.round()
    page = HealthPage("127.0.0.1", 0, keeper)
    try:
        read = {
            path: urllib.request.urlopen(f"http://127.0.0.1:{page.port}{path}", timeout=5).read().decode()
            for path in ("/health", "/metrics")
        }
    finally:
        page.stop()
    assert '"ok": true, "leads": true' in read["/health"]
    assert "gristmill_keeper_jobs_ended_total 1\n" in read["/metrics"]


def test_the_command_with_once_ends_what_is_due_and_leaves(valkey: Valkey, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    settings = Settings(broker_url=valkey.url, results_url=f"file://{tmp_path}/results")
    command = [sys.executable, "-P", "-m", "gristmill.keeper", "--once", "--log-format", "json"]
    command += ["--broker", settings.broker_url, "--results", settings.results_url]
    with State(connect(valkey.url, settings), settings) as state:
        job = make_job()
        state.submit(job)
        state.cancel(job.id)
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert (run.returncode, run.stdout) == (0, ""), run.stderr
        assert '"event": "job.ended"' in run.stderr
        assert state.states([job.id]) == [JobState.CANCELLED]
    valkey.kill()
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 75
    assert "[broker_unavailable]" in run.stderr
