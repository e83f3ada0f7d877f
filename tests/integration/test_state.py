"""The journal on a real server: who may write, what a repetition does, how long keys live."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest
from gristmill.backends import calls
from gristmill.backends.redis import connect
from gristmill.backends.state import (
    AsyncState,
    Claim,
    Final,
    State,
    WorkerInfo,
    Write,
    open_async_state,
    open_state,
)
from gristmill.schemas import keys
from gristmill.schemas.errors import BrokerUnavailable, IdempotencyConflict, JobNotFound, Misconfigured
from gristmill.schemas.events import Delta, Done, End, EntryId, Started
from gristmill.schemas.job import FINAL, JobState, Priority
from gristmill.schemas.result import ErrorInfo, FinishReason
from gristmill.schemas.sampling import SamplingParams
from gristmill.schemas.settings import Settings

from ..support.journal import Attempt, make_job
from ..support.valkey import Valkey
from ..support.waiting import wait_until

WORKER = WorkerInfo(
    models=("tiny",), queues=("gm-tiny-normal",), host="h", pid=1, version="0", max_model_len=64
)


# ---- submit


def test_a_job_is_recorded_once(state: State) -> None:
    job = make_job(priority=Priority.BATCH, tenant="acme")
    assert state.submit(job)
    assert not state.submit(job)
    status = state.status(job.id)
    assert status is not None
    assert (status.state, status.model, status.priority, status.tenant) == ("queued", "tiny", "batch", "acme")
    assert status.submitted_at == job.submitted_at
    assert status.expires_at == pytest.approx(job.expires_at, abs=5), "by the server's clock, from now"
    assert (status.attempt, status.attempts, status.tokens) == (0, 0, 0)


def test_the_same_request_sent_later_or_streamed_is_the_same_job(state: State) -> None:
    job = make_job(idempotency_key="k", metadata={"a": "1", "b": "2"})
    assert state.submit(job)
    again = {"submitted_at": job.submitted_at + 9, "expires_at": job.expires_at + 9, "stream": True}
    assert not state.submit(job.model_copy(update=again | {"metadata": {"b": "2", "a": "1"}}))


@pytest.mark.parametrize(
    "change",
    [{"prompt": "bye"}, {"sampling": SamplingParams(max_tokens=3)}, {"model": "other"}, {"custom_id": "x"}],
    ids=lambda change: next(iter(change)),
)
def test_the_same_id_with_another_body_is_a_conflict_and_changes_nothing(state: State, change) -> None:
    job = make_job(idempotency_key="k")
    state.submit(job)
    with pytest.raises(IdempotencyConflict, match="'k'"):
        state.submit(job.model_copy(update=change))
    assert not state.submit(job)


# ---- claim


def test_a_claim_writes_started_before_it_returns(state: State) -> None:
    job = make_job()
    state.submit(job)
    before = time.time()
    claim = state.claim(job.id, 'w"1\\', job.expires_at)
    assert isinstance(claim, Claim)
    assert claim.entries == []
    assert claim.attempts == 1
    assert before - 1 < claim.now < time.time() + 1
    assert claim.attempt == int(claim.now * 1000)
    [(entry_id, started)] = state.read_log(job.id)
    assert entry_id == EntryId(claim.attempt, 0)
    assert isinstance(started, Started)
    assert started.worker == 'w"1\\'
    assert started.at == pytest.approx(claim.now)
    status = state.status(job.id)
    assert status is not None
    assert (status.state, status.worker, status.attempt) == ("running", 'w"1\\', claim.attempt)


def test_each_attempt_has_a_higher_number_and_gets_the_whole_log(state: State) -> None:
    job = make_job()
    first = Attempt.begin(state, job)
    first.write("a", "b")
    second = Attempt.begin(state, job, "w2")
    assert second.id > first.id
    assert second.claim.attempts == 2
    kinds = [(entry_id, type(event)) for entry_id, event in second.claim.entries]
    assert kinds == [
        (EntryId(first.id, 0), Started),
        (EntryId(first.id, 1), Delta),
        (EntryId(first.id, 2), Delta),
    ]
    assert second.text == "ab"


def test_claims_in_one_millisecond_still_differ(state: State) -> None:
    job = make_job()
    attempts = [Attempt.begin(state, job).id for _ in range(50)]
    assert attempts == sorted(set(attempts))


def test_a_final_job_is_not_claimed(state: State) -> None:
    job = make_job()
    attempt = Attempt.begin(state, job)
    attempt.done()
    attempt.finish()
    assert state.claim(job.id, "w2", job.expires_at) == Final(JobState.SUCCEEDED)
    assert len(state.read_log(job.id)) == 3


def test_a_claim_of_a_job_whose_state_was_lost_stays_above_its_log(state: State, valkey: Valkey) -> None:
    job = make_job()
    first = Attempt.begin(state, job)
    first.write("a")
    valkey.client().delete(keys.state(job.id))
    second = Attempt.begin(state, job)
    assert second.id > first.id
    assert second.text == "a"
    assert second.write("b")


def test_a_late_submit_fills_in_what_the_claim_did_not_know(state: State) -> None:
    job = make_job()
    Attempt.begin(state, job)
    assert not state.submit(job)
    status = state.status(job.id)
    assert status is not None
    assert (status.state, status.model) == ("running", "tiny")


# ---- publish: the fence


def test_entries_of_many_jobs_go_out_in_one_call(state: State) -> None:
    attempts = [Attempt.begin(state, make_job()) for _ in range(20)]
    writes = [attempt.entry(text) for text in "xyz" for attempt in attempts]
    assert state.publish(writes) == set()
    for attempt in attempts:
        events = [event for _, event in state.read_log(attempt.job.id)[1:]]
        assert [e.text for e in events if isinstance(e, Delta)] == ["x", "y", "z"]
        assert [e.offset for e in events if isinstance(e, Delta)] == [0, 1, 2]


def test_an_older_attempt_is_fenced_and_its_neighbours_are_not(state: State) -> None:
    zombie = Attempt.begin(state, make_job())
    other = Attempt.begin(state, make_job())
    zombie.write("a")
    heir = Attempt.begin(state, zombie.job, "w2")
    assert state.publish([zombie.entry("late"), other.entry("fine")]) == {zombie.job.id}
    assert heir.write("b")
    assert not zombie.write("later still")
    log = state.read_log(zombie.job.id)
    assert "".join(e.text for _, e in log if isinstance(e, Delta)) == "ab"
    assert len(state.read_log(other.job.id)) == 2


def test_a_write_that_arrived_already_is_a_silent_success(state: State) -> None:
    attempt = Attempt.begin(state, make_job())
    writes = [attempt.entry(text) for text in "abc"]
    assert state.publish(writes) == set()
    assert state.publish(writes) == set()
    assert state.publish([*writes[1:], attempt.entry("d")]) == set()
    deltas = [e.text for _, e in state.read_log(attempt.job.id) if isinstance(e, Delta)]
    assert deltas == ["a", "b", "c", "d"]


def test_a_write_that_would_leave_a_hole_is_refused(state: State) -> None:
    attempt = Attempt.begin(state, make_job())
    lost = attempt.entry("lost")
    assert state.publish([attempt.entry("next")]) == {attempt.job.id}
    assert len(state.read_log(attempt.job.id)) == 1
    assert state.publish([lost]) == set()


@pytest.mark.parametrize("lost", ["state", "log", "both"])
def test_nothing_is_written_for_a_job_whose_keys_vanished(state: State, valkey: Valkey, lost: str) -> None:
    """A log begun in the middle would have no expiry, and a reader would take it for the whole."""
    attempt = Attempt.begin(state, make_job())
    attempt.write("a")
    client = valkey.client()
    names = {"state": [keys.state], "log": [keys.log], "both": [keys.state, keys.log]}[lost]
    client.delete(*(name(attempt.job.id) for name in names))
    assert not attempt.write("b")
    assert client.exists(*(name(attempt.job.id) for name in names)) == 0


def test_a_final_job_takes_no_more_entries(state: State) -> None:
    attempt = Attempt.begin(state, make_job())
    attempt.write("a")
    attempt.done()
    attempt.finish()
    assert not attempt.write("b")
    assert isinstance(state.read_log(attempt.job.id)[-1][1], End)


def test_an_empty_publish_is_no_round_trip(state: State, valkey: Valkey) -> None:
    valkey.kill()
    assert state.publish([]) == set()


# ---- publish: the server refuses


def test_out_of_memory_is_unavailable_not_fenced_and_the_retry_writes(state: State, valkey: Valkey) -> None:
    attempt = Attempt.begin(state, make_job())
    attempt.write("a")
    client = valkey.client()
    client.config_set("maxmemory", 1)
    writes = [attempt.entry("b"), attempt.entry("c")]
    with pytest.raises(BrokerUnavailable, match="memory"):
        state.publish(writes)
    client.config_set("maxmemory", 0)
    assert state.publish(writes) == set()
    assert [e.text for _, e in state.read_log(attempt.job.id) if isinstance(e, Delta)] == ["a", "b", "c"]


def test_a_read_only_replica_is_unavailable_not_fenced(state: State, valkey: Valkey) -> None:
    attempt = Attempt.begin(state, make_job())
    client = valkey.client()
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    with pytest.raises(BrokerUnavailable):
        attempt.write("a")
    with pytest.raises(BrokerUnavailable):
        attempt.finish()


def test_a_revoked_right_in_the_middle_of_a_job_is_unavailable(state: State, valkey: Valkey) -> None:
    attempt = Attempt.begin(state, make_job())
    write = attempt.entry("a")
    admin = valkey.client()
    admin.execute_command("ACL", "SETUSER", "default", "-evalsha", "-eval", "-xrange")
    with pytest.raises(BrokerUnavailable):
        state.publish([write])
    with pytest.raises(Misconfigured, match="ACL"):
        state.read_log(attempt.job.id)
    admin.execute_command("ACL", "SETUSER", "default", "+@all")
    assert state.publish([write]) == set()


def test_a_frozen_or_dead_server_is_unavailable_within_one_timeout(valkey: Valkey) -> None:
    settings = Settings(command_timeout_s=2, connect_timeout_s=2)
    state = State(connect(valkey.url, settings), settings)
    attempt = Attempt.begin(state, make_job())
    write = attempt.entry("a")
    valkey.freeze()
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        state.publish([write])
    assert time.monotonic() - began < 4, "two timeouts"
    valkey.thaw()
    wait_until(lambda: not state.publish([write]), 5, "the server answers again")
    assert len(state.read_log(attempt.job.id)) == 2
    valkey.kill()
    with pytest.raises(BrokerUnavailable):
        state.publish([write])


def test_scripts_survive_a_server_that_forgot_them(state: State, valkey: Valkey) -> None:
    attempt = Attempt.begin(state, make_job())
    attempt.write("a")
    valkey.client().script_flush()
    assert attempt.write("b")


def test_a_killed_server_keeps_the_journal_and_its_right_to_write(state: State, valkey: Valkey) -> None:
    valkey.client().config_set("appendfsync", "always")
    attempt = Attempt.begin(state, make_job())
    attempt.write("a")
    valkey.restart()
    assert attempt.write("b")
    assert Attempt.begin(state, attempt.job).text == "ab"


# ---- finish


def test_finish_is_once_and_ends_the_log(state: State) -> None:
    job = make_job()
    state.submit(job)
    attempt = Attempt.begin(state, job)
    attempt.write("a", "b")
    attempt.done("c")
    assert attempt.finish()
    assert not attempt.finish()
    log = state.read_log(job.id)
    assert [type(event) for _, event in log] == [Started, Delta, Delta, Done, End]
    assert log[-1][0] == EntryId(attempt.id, 4)
    status = state.status(job.id)
    assert status is not None
    assert (status.state, status.tokens, status.worker) == ("succeeded", 2, None)
    assert status.finish_reason is FinishReason.STOP
    assert status.result == f"results/{job.id}.json"
    assert state.result(job.id) == attempt.result().to_json()


def test_a_final_state_is_final(state: State) -> None:
    attempt = Attempt.begin(state, make_job())
    attempt.finish()
    end = End(state=JobState.FAILED, error=ErrorInfo(code="x", message="y"))
    assert not state.finish(attempt.job.id, end)
    assert state.cancel(attempt.job.id) is JobState.SUCCEEDED
    assert not state.release(attempt.job.id, attempt.id)
    status = state.status(attempt.job.id)
    assert status is not None
    assert (status.state, status.error, status.cancel_requested) == ("succeeded", None, False)


def test_a_job_that_never_ran_can_end(state: State) -> None:
    job = make_job()
    state.submit(job)
    assert state.finish(job.id, End(state=JobState.EXPIRED))
    [(entry_id, end)] = state.read_log(job.id)
    assert entry_id.seq == 1
    assert isinstance(end, End)
    assert state.claim(job.id, "w", job.expires_at) == Final(JobState.EXPIRED)


def test_a_result_whose_state_was_lost_can_be_finished(state: State, valkey: Valkey) -> None:
    attempt = Attempt.begin(state, make_job())
    attempt.write("a")
    valkey.client().delete(keys.state(attempt.job.id), keys.log(attempt.job.id))
    assert attempt.finish()
    assert state.claim(attempt.job.id, "w2", attempt.job.expires_at) == Final(JobState.SUCCEEDED)
    every_key_of_a_job_expires(valkey)


def test_a_failure_is_told_by_status(state: State) -> None:
    job = make_job()
    attempt = Attempt.begin(state, job)
    error = ErrorInfo(code="context_length_exceeded", message="too long", param="prompt")
    attempt.done(reason=FinishReason.ERROR)
    state.finish(job.id, End(state=JobState.FAILED, finish_reason=FinishReason.ERROR, error=error))
    status = state.status(job.id)
    assert status is not None
    assert status.error == error
    assert state.result(job.id) is None


def test_of_many_threads_exactly_one_finishes(state: State) -> None:
    attempt = Attempt.begin(state, make_job())
    outcomes: list[bool] = []
    threads = [threading.Thread(target=lambda: outcomes.append(attempt.finish())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(True) == 1


# ---- expiry


def every_key_of_a_job_expires(valkey: Valkey) -> None:
    client = valkey.client()
    for key in client.scan_iter("gm:{*"):
        assert client.pttl(key) > 0, key


def ttl_s(valkey: Valkey, key: str) -> float:
    return valkey.client().pttl(key) / 1000


def test_state_and_log_live_until_the_job_expires_and_a_day_to_end_it(state: State, valkey: Valkey) -> None:
    job = make_job()
    state.submit(job)
    expected = 3600 + calls.EXPIRY_GRACE_S
    assert ttl_s(valkey, keys.state(job.id)) == pytest.approx(expected, abs=30)
    attempt = Attempt.begin(state, job)
    attempt.write("a")
    assert ttl_s(valkey, keys.log(job.id)) == pytest.approx(expected, abs=30)
    assert ttl_s(valkey, keys.state(job.id)) == pytest.approx(expected, abs=30)


def test_once_final_they_live_for_the_results_time(state: State, valkey: Valkey, settings: Settings) -> None:
    attempt = Attempt.begin(state, make_job())
    attempt.write("a")
    attempt.finish()
    for key in (keys.state(attempt.job.id), keys.log(attempt.job.id)):
        assert ttl_s(valkey, key) == pytest.approx(settings.result_ttl_s, abs=30)


def test_a_job_claimed_after_its_time_can_still_be_ended(state: State, valkey: Valkey) -> None:
    job = make_job(submitted_at=1.0, expires_at=2.0)
    attempt = Attempt.begin(state, job)
    assert attempt.claim.now > job.expires_at
    assert attempt.done(reason=FinishReason.EXPIRED)
    assert attempt.finish(reason=FinishReason.EXPIRED)
    every_key_of_a_job_expires(valkey)


def test_the_states_of_many_jobs_come_in_one_call(state: State) -> None:
    queued, running = make_job(), make_job()
    state.submit(queued)
    Attempt.begin(state, running)
    found = state.states([running.id, "job_x", queued.id])
    assert found == [JobState.RUNNING, None, JobState.QUEUED]
    assert state.states([]) == []


# ---- release, cancel


def test_a_released_job_is_queued_and_the_next_attempt_continues(state: State) -> None:
    attempt = Attempt.begin(state, make_job())
    attempt.write("a")
    assert state.release(attempt.job.id, attempt.id)
    status = state.status(attempt.job.id)
    assert status is not None
    assert (status.state, status.worker, status.tokens) == ("queued", None, 1)
    assert Attempt.begin(state, attempt.job).text == "a"


def test_a_fenced_attempt_cannot_release(state: State) -> None:
    zombie = Attempt.begin(state, make_job())
    Attempt.begin(state, zombie.job, "w2")
    assert not state.release(zombie.job.id, zombie.id)
    status = state.status(zombie.job.id)
    assert status is not None
    assert (status.state, status.worker) == ("running", "w2")


def test_a_cancellation_is_a_flag_that_the_claim_returns(state: State) -> None:
    job = make_job()
    state.submit(job)
    assert state.cancel(job.id) is JobState.QUEUED
    assert state.cancelled([make_job().id, job.id]) == {job.id}
    claim = state.claim(job.id, "w", job.expires_at)
    assert isinstance(claim, Claim)
    assert claim.cancelled


def test_nobody_can_cancel_what_nobody_knows(state: State) -> None:
    with pytest.raises(JobNotFound, match="unknown"):
        state.cancel("job_x")
    assert state.cancelled([]) == set()
    assert state.status("job_x") is None
    assert state.result("job_x") is None


def test_a_cancellation_is_announced_to_the_workers_of_the_model(state: State, valkey: Valkey) -> None:
    job, lost = make_job(), make_job()
    state.submit(job)
    Attempt.begin(state, lost)  # its state does not know the model
    stop, heard = threading.Event(), list[str]()
    listener = threading.Thread(
        target=lambda: heard.extend(state.cancellations("tiny", stop, poll_s=0.01)), daemon=True
    )
    listener.start()
    channel = keys.control("tiny")
    wait_until(lambda: valkey.client().pubsub_channels(channel), 5, "listening")
    state.cancel(job.id)
    state.cancel(lost.id, "tiny")
    valkey.client().publish(channel, b"other nonsense \xff")
    wait_until(lambda: len(heard) == 2, 5, "both are heard")
    stop.set()
    wait_until(lambda: not listener.is_alive(), 5, "the listener stops")
    assert heard == [job.id, lost.id]
    assert state.cancelled([job.id, lost.id]) == {job.id, lost.id}


# ---- the registry


def test_a_registered_worker_is_alive_until_its_time_is_over(state: State) -> None:
    state.register("w1", WORKER, ttl_s=60)
    state.register("w2", WORKER.model_copy(update={"models": ("tiny", "big")}), ttl_s=0.05)
    assert len(state.alive("tiny")) <= 2
    wait_until(lambda: len(state.alive("tiny")) == 1, 5, "w2 is gone")
    assert state.alive("tiny") == [WORKER]
    assert state.alive("big") == []
    models = state.models()
    assert set(models) == {"tiny", "big"}
    assert models["tiny"].max_model_len == 64
    assert models["tiny"].seen_at == pytest.approx(time.time(), abs=30)
    state.register("w1", WORKER, ttl_s=60)
    assert list(state.workers()) == ["w1"]
    state.unregister("w1")
    assert state.alive("tiny") == []
    assert set(state.models()) == {"tiny", "big"}


def test_dead_workers_do_not_pile_up(state: State, valkey: Valkey) -> None:
    for number in range(20):
        state.register(f"w{number}", WORKER, ttl_s=0.001)
    wait_until(lambda: not state.workers(), 5, "all are gone")
    state.register("w", WORKER, ttl_s=60)
    assert valkey.client().zcard(keys.WORKERS) == 1


def test_fields_of_a_newer_version_do_not_disturb_the_registry(state: State, valkey: Valkey) -> None:
    state.register("w1", WORKER, ttl_s=60)
    client = valkey.client()
    for body in (client.get(keys.worker("w1")), client.hget(keys.MODELS, "tiny")):
        assert body is not None
    client.set(keys.worker("w1"), client.get(keys.worker("w1"))[:-1] + b',"gpu":"H100"}', keepttl=True)
    assert state.alive("tiny") == [WORKER]


# ---- opening


async def test_the_async_twin_reads_and_writes_the_same(state: State, settings: Settings) -> None:
    job = make_job()
    async with await open_async_state(settings) as twin:
        assert isinstance(twin, AsyncState)
        await twin.ping()
        assert await twin.submit(job)
        assert not state.submit(job)
        attempt = Attempt.begin(state, job)
        attempt.write("a")
        assert await twin.cancel(job.id) is JobState.RUNNING
        assert await twin.status(job.id) == state.status(job.id)
        assert await twin.read_log(job.id) == state.read_log(job.id)
        assert await twin.read_log(job.id, EntryId(attempt.id, 0), 1) == state.read_log(job.id)[1:]
        attempt.finish()
        assert await twin.result(job.id) == state.result(job.id)
        state.register("w1", WORKER, ttl_s=60)
        assert await twin.alive("tiny") == state.alive("tiny") == [WORKER]
        assert await twin.models() == state.models()
        with pytest.raises(JobNotFound):
            await twin.cancel("job_x")


async def test_the_async_twin_translates_errors_too(settings: Settings, valkey: Valkey) -> None:
    async with await open_async_state(settings) as twin:
        await twin.ping()
        valkey.kill()
        with pytest.raises(BrokerUnavailable):
            await twin.submit(make_job())


def test_state_opens_an_embedded_server(tmp_path: Path) -> None:
    settings = Settings(broker_url=f"embedded:{tmp_path / 'e'}")
    with open_state(settings) as state, open_state(settings) as neighbour:
        job = make_job()
        assert state.submit(job)
        assert not neighbour.submit(job)


def test_an_sqs_broker_needs_a_state_server_besides() -> None:
    with pytest.raises(Misconfigured, match="GRISTMILL_STATE_URL"):
        open_state(Settings(broker_url="sqs://"))


# ---- the scripts


LUA = sorted((Path(calls.__file__).parent / "lua").glob("*.lua"))
OURS = [name.lower() for name, value in vars(calls).items() if isinstance(value, calls.Script)]


@pytest.mark.parametrize("name", OURS)
def test_every_script_says_what_it_takes_and_returns(name: str) -> None:
    text = next(path for path in LUA if path.stem == name).read_text()
    header = re.match(r"(--.*\n)+", text)
    assert header is not None
    for word in ("KEYS", "returns"):
        assert f"-- {word}" in header[0]


@pytest.mark.parametrize("name", ["claim", "finish"])
def test_scripts_and_schemas_agree_on_what_is_final(name: str) -> None:
    text = next(path for path in LUA if path.stem == name).read_text()
    table = re.search(r"local FINAL = \{(.*)\}", text)
    assert table is not None
    assert set(re.findall(r"(\w+) = true", table[1])) == {state.value for state in FINAL}


def test_a_write_of_a_row_of_a_batch_uses_one_slot_per_job() -> None:
    call = calls.publish([Write("batch_1.7", 5, 1, "{}")])
    assert call.keys == ("gm:{batch_1.7}:state", "gm:{batch_1.7}:out")
