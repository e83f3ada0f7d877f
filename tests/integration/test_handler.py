"""A delivery, whatever happens to it: a real Valkey, a result directory, an engine that the test plays."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from gristmill.backends.state import Claim, State, WorkerInfo, Write
from gristmill.engine.detokenizer import Detokenizer
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas import keys
from gristmill.schemas.events import Delta, Trial
from gristmill.schemas.job import Job, JobState, Priority
from gristmill.schemas.result import FinishReason
from gristmill.schemas.status import JobStatus
from gristmill.worker.disposition import Disposition

from ..support.journal import Attempt, make_job
from ..support.played import Played
from ..support.valkey import Valkey
from ..support.waiting import wait_until


def test_a_delivery_ends_in_a_result_before_it_is_acknowledged(played: Played, state: State) -> None:
    job = make_job()
    delivery = played.deliver(job)
    played.running(job)
    played.step(job, 28)
    assert not delivery.done()
    played.step(job, 29, finish="length")
    assert delivery.result(5) is Disposition.ACK
    assert played.result(job.id).usage.completion_tokens == 2
    status = state.status(job.id)
    assert status is not None
    assert status.state is JobState.SUCCEEDED


def test_a_second_delivery_of_a_running_job_ends_as_the_first(played: Played) -> None:
    job = make_job()
    first = played.deliver(job)
    played.running(job)
    second = played.deliver(job)
    played.step(job, 28, finish="length")
    assert {first.result(5), second.result(5)} == {Disposition.ACK}


def test_a_message_that_no_worker_can_read_is_answered(played: Played, state: State) -> None:
    """It was acknowledged and forgotten: its submitter waited for two weeks."""
    job = make_job()
    body = json.dumps({**json.loads(job.to_json()), "from_the_future": 1})
    assert played.handler.handle(job.id, body) is Disposition.ACK
    result = played.result(job.id)
    assert (result.state, result.error and result.error.code) == (JobState.FAILED, "invalid_request")
    status = state.status(job.id)
    assert status is not None
    assert status.state is JobState.FAILED
    assert played.handler.handle("no job's id!", body) is Disposition.ACK


def test_a_message_that_this_worker_cannot_read_ends_as_its_log_says(played: Played, state: State) -> None:
    """A newer worker had finished it, and died before the result was stored: a failure took its place."""
    job = make_job(metadata={"k": "v"})
    state.submit(job)
    newer = Attempt.begin(state, job, "a newer worker")
    assert newer.write("once ", "upon")
    assert newer.done(" a time")
    body = json.dumps({**json.loads(job.to_json()), "from_the_future": 1})
    assert played.handler.handle(job.id, body) is Disposition.ACK
    result = played.result(job.id)
    assert (result.state, result.text, result.metadata) == (
        JobState.SUCCEEDED,
        "once upon a time",
        {"k": "v"},
    )


@pytest.mark.parametrize("kind", [RuntimeError, BaseException])  # a panic in Rust is no Exception
def test_a_prompt_that_breaks_the_tokenizer_fails_its_job_alone(
    played: Played, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """The delivery crashed, its lease brought it back a minute later, and so on for ever."""

    def encode(text: str, add_special_tokens: bool = True) -> list[int]:
        if text == "the evil one":
            raise kind("not thought of")
        return Tokenizer.encode(tokenizer, text, add_special_tokens)

    monkeypatch.setattr(tokenizer, "encode", encode)
    evil, good = make_job(prompt="the evil one"), make_job()
    deliveries = [played.deliver(evil), played.deliver(good)]
    played.running(good)
    played.step(good, 28, finish="length")
    assert [d.result(5) for d in deliveries] == [Disposition.ACK] * 2
    error = played.result(evil.id).error
    assert error is not None
    assert error.code == "internal_error"
    assert played.result(good.id).state is JobState.SUCCEEDED


def test_a_log_that_cannot_be_continued_fails_its_job(played: Played, state: State) -> None:
    earlier = Attempt.begin(state, make_job())
    event = Delta(offset=5, ids=(28,), text="text of a token whose predecessors are lost")
    assert not state.publish([Write(earlier.job.id, earlier.id, 1, event.to_json())])
    assert played.deliver(earlier.job).result(5) is Disposition.ACK
    error = played.result(earlier.job.id).error
    assert error is not None
    assert error.code == "internal_error"


def test_a_token_that_breaks_the_detokeniser_fails_its_job_alone(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that reads the engine's steps died, and every job of the worker stood still."""
    push = Detokenizer.push

    def breaks(self: Detokenizer, ids: list[int]) -> str:
        if ids == [666]:
            raise RuntimeError("not thought of")
        return push(self, ids)

    def broken(_: Detokenizer) -> str:
        raise AssertionError("asked a broken detokeniser for more")

    monkeypatch.setattr(Detokenizer, "push", breaks)
    evil, good = make_job(), make_job()
    deliveries = [played.deliver(evil), played.deliver(good)]
    played.running(evil), played.running(good)
    with monkeypatch.context() as patch:
        patch.setattr(Detokenizer, "finish", broken)
        played.step(evil, 666)
    played.step(good, 28, finish="length")
    assert [d.result(5) for d in deliveries] == [Disposition.ACK] * 2
    assert played.result(evil.id).state is JobState.FAILED
    assert played.engine.aborted == [played.engine.submitted[evil.id].id]
    assert played.result(good.id).state is JobState.SUCCEEDED


def test_a_crash_in_our_own_code_leaves_the_message_to_its_lease(
    played: Played, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that is no Exception, such as the panic of a Rust library."""

    def claim(*_: object) -> object:
        raise BaseException("panic")

    monkeypatch.setattr(state, "claim", claim)
    assert played.deliver(make_job()).result(5) is Disposition.DROP
    assert played.handler.in_hand == 0


def test_handing_back_does_not_wait_for_a_state_server_that_is_frozen(played: Played, valkey: Valkey) -> None:
    """Each job in hand was one more timeout: 128 of them outlasted any patience, and were killed instead."""
    jobs = [make_job() for _ in range(8)]
    deliveries = [played.deliver(job) for job in jobs]
    for job in jobs:
        played.running(job)
    valkey.freeze()
    try:
        began = time.monotonic()
        assert played.handler.hand_back(flush_s=0.1) == 8
        assert {d.result(10) for d in deliveries} == {Disposition.REQUEUE}
        assert time.monotonic() - began < 6, "two command timeouts of 2 s, side by side"
    finally:
        valkey.thaw()


def test_jobs_handed_back_are_queued_again_with_their_tokens(played: Played, state: State) -> None:
    job = make_job()
    delivery = played.deliver(job)
    played.running(job)
    played.step(job, 28)
    assert played.handler.hand_back(flush_s=5) == 1
    assert delivery.result(5) is Disposition.REQUEUE
    status = state.status(job.id)
    assert status is not None
    assert (status.state, status.tokens) == (JobState.QUEUED, 1)
    late = make_job()
    assert played.deliver(late).result(5) is Disposition.REQUEUE
    assert played.engine.submitted.keys() == {job.id}


def register(state: State, worker: str, ttl_s: float) -> None:
    info = WorkerInfo(models=("tiny",), queues=(), host="h", pid=1, version="0", max_model_len=64)
    state.register(worker, info, ttl_s)


def test_a_fenced_attempt_writes_nothing_and_keeps_its_message_until_the_job_is_final(
    played: Played, state: State
) -> None:
    """Left to their leases, two messages of a job fenced each other; acknowledged, it could be lost."""
    job = make_job()
    delivery = played.deliver(job)
    played.running(job)
    register(state, "another", 60)
    newer = Attempt.begin(state, job, "another")
    played.step(job, 28, finish="length")
    wait_until(lambda: played.engine.aborted, 5, "it notices")
    assert played.engine.aborted == [played.engine.submitted[job.id].id]
    assert played.handler.in_hand == 1
    assert not delivery.done()
    assert newer.finish()
    assert delivery.result(20) is Disposition.ACK
    assert not played.store.exists(keys.result_object(job.id))
    assert played.handler.in_hand == 0


def test_a_job_given_back_goes_on_from_its_journal(played: Played, state: State) -> None:
    job = make_job()
    delivery = played.deliver(job)
    request = played.running(job)
    played.step(job, 28)
    played.handler.give_back(["somebody else's", job.id])
    assert delivery.result(5) is Disposition.REQUEUE
    assert played.engine.aborted == [request.id]
    played.engine.submitted.clear()
    played.deliver(job)
    assert played.running(job).output_ids == [28]


def test_many_jobs_given_back_wait_for_a_frozen_state_server_once(
    played: Played, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each waited for itself: a hundred held everybody's lease renewals up for minutes."""
    monkeypatch.setattr("gristmill.worker.handler.GIVE_BACK_FLUSH_S", 2.0)
    jobs = [make_job() for _ in range(12)]
    deliveries = [played.deliver(job) for job in jobs]
    for job in jobs:
        played.running(job)
        played.step(job, 28)
    valkey.freeze()
    try:
        began = time.monotonic()
        played.handler.give_back([job.id for job in jobs])
        assert time.monotonic() - began < 12, "twelve times two seconds, if each waited for itself"
        assert {d.result(20) for d in deliveries} == {Disposition.REQUEUE}
    finally:
        valkey.thaw()


def test_a_fenced_delivery_comes_back_if_the_newer_attempts_worker_is_gone(
    played: Played, state: State
) -> None:
    """A worker froze before its claim of the job, and went on after its message had been swept and given to
    us. It fenced us, and died. Ours was the only message left, and we acknowledged it.
    """
    job = make_job()
    delivery = played.deliver(job)
    played.running(job)
    state.claim(job.id, "zombie", job.expires_at)
    played.step(job, 28)
    assert delivery.result(5) is Disposition.DROP
    assert played.handler.in_hand == 0


def test_a_delivery_that_a_keeper_fenced_is_kept_until_it_has_ended_the_job(
    played: Played, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keepers are no workers: the message was left to its lease, and a minute later it came for nothing."""
    job, looks = make_job(), list[str]()
    status = state.status

    def look(job_id: str) -> JobStatus | None:
        looks.append(job_id)
        return status(job_id)

    monkeypatch.setattr(state, "status", look)
    delivery = played.deliver(job)
    played.running(job)
    keeper = Attempt.begin(state, job, "keeper-k1")
    played.step(job, 28)
    wait_until(lambda: len(looks) >= 2, 10, "it looks, and looks again")
    assert not delivery.done()
    assert keeper.finish(reason=FinishReason.CANCELLED)
    assert delivery.result(10) is Disposition.ACK


def test_an_engine_that_works_for_nobody_is_told_to_stop(played: Played) -> None:
    """Cancelled between the last look and the hand-over, a job took its place to its last token."""
    job = make_job()
    delivery = played.deliver(job)
    request = played.running(job)
    played.handler.cancel(job.id)
    assert delivery.result(5) is Disposition.ACK
    played.engine.aborted.clear()
    played.step(job, 28)
    assert played.engine.aborted == [request.id]
    assert played.result(job.id).usage.completion_tokens == 0


def test_a_slow_store_leaves_the_engines_places_to_other_jobs(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results on their way counted as running: the engine idled while S3 took its time."""
    go_on = threading.Event()
    put_new = played.store.put_new

    def slow(name: str, body: bytes) -> bool:
        return go_on.wait(10) and put_new(name, body)

    monkeypatch.setattr(played.store, "put_new", slow)
    jobs = [make_job() for _ in range(17)]  # 16 places, and one that waits
    deliveries = [played.deliver(job) for job in jobs]
    for job in jobs:
        played.running(job)
        played.step(job, 28)
    assert played.handler.claimable() == [Priority.INTERACTIVE], "it would evict one of them"
    played.step(jobs[0], 29, finish="length")
    wait_until(lambda: Priority.BATCH in played.handler.claimable(), 5, "a place is free")
    for job in jobs[1:]:
        played.step(job, 29, finish="length")
    go_on.set()
    assert {delivery.result(10) for delivery in deliveries} == {Disposition.ACK}


def test_a_delivery_whose_state_was_lost_is_left_to_its_lease(
    played: Played, state: State, valkey: Valkey
) -> None:
    job = make_job()
    delivery = played.deliver(job)
    played.running(job)
    valkey.client().delete(keys.state(job.id), keys.log(job.id))
    played.step(job, 28, finish="length")
    assert delivery.result(5) is Disposition.DROP


def test_a_job_that_ended_before_its_state_was_lost_is_not_run_again(
    played: Played, state: State, valkey: Valkey
) -> None:
    """Redis forgot everything, the broker (another server) delivers again: the result object knows."""
    job = make_job()
    delivery = played.deliver(job)
    played.running(job)
    played.step(job, 28, finish="length")
    assert delivery.result(5) is Disposition.ACK
    valkey.client().flushall()
    played.engine.submitted.clear()
    assert played.deliver(job).result(5) is Disposition.ACK
    assert not played.engine.submitted
    status = state.status(job.id)
    assert status is not None
    assert status.state is JobState.SUCCEEDED


def lose_alone(state: State, job: Job, times: int) -> None:
    """So often a worker died while it ran this job alone."""
    for worker in range(times):
        claim = state.claim(job.id, f"w{worker}", job.expires_at)
        assert isinstance(claim, Claim)
        state.publish([Write(job.id, claim.attempt, 1, Trial(at=1.0).to_json())])


def test_a_job_that_three_workers_died_of_alone_is_given_up(played: Played, state: State) -> None:
    job = make_job()
    lose_alone(state, job, 3)
    assert played.deliver(job).result(5) is Disposition.BURY
    assert not played.engine.submitted
    result = played.result(job.id)
    assert result.error is not None
    assert result.error.code == "max_attempts"
    assert [(crash.code, crash.worker, crash.alone) for crash in result.crashes] == [
        ("worker_lost", f"w{worker}", True) for worker in range(3)
    ]
    assert played.deliver(job).result(5) is Disposition.BURY, "its worker may have died before it could"


@pytest.mark.parametrize("losses", [1, 2])
def test_only_a_second_loss_in_a_row_makes_a_suspect(played: Played, state: State, losses: int) -> None:
    job = make_job()
    for worker in range(losses):
        state.claim(job.id, f"w{worker}", job.expires_at)
    delivery = played.deliver(job)
    played.running(job)
    assert (job.id in played.engine.suspects) is (losses == 2)
    played.step(job, 28, finish="length")
    assert delivery.result(5) is Disposition.ACK


def test_the_next_worker_allows_as_many_tokens_as_the_first(
    played: Played, state: State, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Workers with other defaults cut, or lengthened, what a request without max_tokens had begun."""
    job = make_job()
    first = played.deliver(job)
    assert played.running(job).max_tokens == 1024
    played.step(job, 28)
    played.handler.hand_back(flush_s=5)
    assert first.result(5) is Disposition.REQUEUE
    second = Played(state, tmp_path, tokenizer, default_max_tokens=3)
    second.handler.publisher.start()
    try:
        delivery = second.deliver(job)
        assert second.running(job).max_tokens == 1024
        second.step(job, 29, finish="length")
        assert delivery.result(5) is Disposition.ACK
    finally:
        second.close()
