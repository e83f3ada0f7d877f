"""Segments in a worker, whatever happens to them: a real Valkey, a result directory, an engine the test
plays.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends.batches import SegmentClaim
from gristmill.backends.state import State, Write
from gristmill.engine.messages import Output
from gristmill.engine.tokenizer import Tokenizer
from gristmill.producer import Client
from gristmill.schemas.batch import BatchOptions, BatchStatus, row_id, segment_id
from gristmill.schemas.errors import BrokerUnavailable, StoreUnavailable
from gristmill.schemas.events import Delta, Released, Started
from gristmill.schemas.grammar import GrammarSpec
from gristmill.schemas.job import Job, JobState
from gristmill.schemas.sampling import SamplingParams
from gristmill.schemas.settings import Settings
from gristmill.schemas.status import WorkerInfo
from gristmill.worker import segment_run
from gristmill.worker.disposition import Disposition

from ..support.batches import BATCH, lines_of, message, open_batch, row, run_batch
from ..support.played import STATS, Played
from ..support.waiting import wait_until

S1 = segment_id(BATCH, 1)


class Floor(Played):
    """A handler that segments are delivered to."""

    def deliver_segment(self, segment: str = S1) -> Future[Disposition]:
        return self.threads.submit(self.handler.handle, segment, message(segment))

    def wait(self, *jobs: Job) -> None:
        wait_until(lambda: all(job.id in self.engine.submitted for job in jobs), 10, "they run")

    def finish(self, *jobs: Job, token: int = 28) -> None:
        outputs = [
            Output(id=self.engine.submitted[job.id].id, token_ids=[token], finish="length") for job in jobs
        ]
        self.handler.listener.on_step(outputs, STATS, time.time())


@pytest.fixture
def floor(state: State, tmp_path: Path, tokenizer: Tokenizer) -> Iterator[Floor]:
    floor = Floor(state, tmp_path, tokenizer)
    floor.handler.publisher.start()
    yield floor
    floor.close()


def test_a_segments_rows_run_together_and_end_in_their_batch(floor: Floor, state: State) -> None:
    rows = [row(line) for line in (3, 1, 2)]
    run_batch(state, floor.store, rows)
    delivery = floor.deliver_segment()
    floor.wait(*rows)
    floor.finish(*rows)
    assert delivery.result(10) is Disposition.ACK
    batch = state.batches.get(BATCH)
    assert batch is not None
    assert (batch.status, batch.request_counts.completed, batch.usage.completion_tokens) == (
        BatchStatus.FINALIZING,
        3,
        3,
    )
    lines = lines_of(state, floor.store)
    assert [line["custom_id"] for line in lines] == ["c1", "c2", "c3"]
    assert all(line["response"]["body"]["choices"][0]["text"] for line in lines)
    assert [state.read_log(job.id) for job in rows] == [[]] * 3
    status = state.status(rows[0].id)
    assert status is not None
    assert status.state is JobState.SUCCEEDED
    assert floor.handler.in_hand == 0
    assert floor.deliver_segment().result(10) is Disposition.ACK, "its message came twice"


def test_no_more_rows_are_begun_than_there_is_room_for(floor: Floor, state: State) -> None:
    rows = [row(line) for line in range(1, 41)]
    run_batch(state, floor.store, rows)
    delivery = floor.deliver_segment()
    wait_until(lambda: len(floor.engine.submitted) == 17, 10, "the engine is full")
    assert "batch" not in floor.handler.claimable(), "its rows come first"
    assert {"interactive", "normal"} <= set(floor.handler.claimable())
    done = 0
    while done < 40:
        here = rows[done : len(floor.engine.submitted)]
        floor.finish(*here)
        done += len(here)
        wait_until(lambda n=done: len(floor.engine.submitted) >= min(40, n + 1), 10, "more are begun")
    assert delivery.result(10) is Disposition.ACK
    assert len(lines_of(state, floor.store)) == 40


def test_a_row_that_cannot_run_is_an_error_line_and_the_others_run(floor: Floor, state: State) -> None:
    bad = row(1, prompt="long " * 3000)
    good = row(2)
    run_batch(state, floor.store, [bad, good])
    delivery = floor.deliver_segment()
    floor.wait(good)
    floor.finish(good)
    assert delivery.result(10) is Disposition.ACK
    first, second = lines_of(state, floor.store)
    assert first["response"]["body"]["error"]["code"] == "context_length_exceeded"
    assert second["response"]["status_code"] == 200
    status = state.status(bad.id)
    assert status is not None
    assert status.state is JobState.FAILED


def test_the_next_owner_goes_on_from_the_rows_last_tokens(floor: Floor, state: State) -> None:
    rows = [row(line, sampling=SamplingParams(max_tokens=9)) for line in (1, 2, 3)]
    run_batch(state, floor.store, rows)
    lost = state.batches.claim_segment(S1, "lost")
    assert isinstance(lost, SegmentClaim)
    state.batches.begin_rows(S1, lost.attempt, "lost", [1, 2])
    delta = Delta(offset=0, ids=(28, 29), text="ab", max_tokens=9).to_json()
    assert state.publish([Write(rows[0].id, lost.attempt, 1, delta, owner=S1)]) == set()

    delivery = floor.deliver_segment()
    floor.wait(*rows)
    given = [floor.engine.submitted[job.id].output_ids for job in rows]
    assert given == [[28, 29], [], []]
    late = Write(rows[1].id, lost.attempt, 1, delta, owner=S1)
    assert state.publish([late]) == {rows[1].id}, "the old owner may write no more"
    floor.finish(*rows, token=30)
    assert delivery.result(10) is Disposition.ACK
    used = [line["response"]["body"]["usage"]["completion_tokens"] for line in lines_of(state, floor.store)]
    assert used == [3, 1, 1]


def test_a_fenced_worker_stops_its_rows_and_waits_for_their_end(floor: Floor, state: State) -> None:
    rows = [row(line) for line in (1, 2)]
    run_batch(state, floor.store, rows)
    delivery = floor.deliver_segment()
    floor.wait(*rows)
    state.register("w2", WorkerInfo(models=("m",), host="h", pid=1, version="0"), 60)
    other = state.batches.claim_segment(S1, "w2")
    assert isinstance(other, SegmentClaim)
    floor.finish(rows[0])
    wait_until(lambda: len(floor.engine.aborted) >= 2, 10, "both are stopped")
    assert not delivery.done(), "its new owner may die"
    assert state.batches.end_segment(S1, other.attempt)
    assert delivery.result(10) is Disposition.ACK
    assert lines_of(state, floor.store) == []


def test_a_worker_that_leaves_hands_the_rest_back_with_its_tokens(floor: Floor, state: State) -> None:
    rows = [row(line, sampling=SamplingParams(max_tokens=9)) for line in (1, 2, 3)]
    run_batch(state, floor.store, rows)
    delivery = floor.deliver_segment()
    floor.wait(*rows)
    floor.step(rows[0], 28)
    assert floor.handler.hand_back(flush_s=5) == 1
    assert delivery.result(10) is Disposition.REQUEUE
    log = [type(event) for _, event in state.read_log(rows[0].id)]
    assert log == [Started, Delta, Released]
    status = state.status(S1)
    assert status is not None
    assert status.state is JobState.QUEUED


def test_a_worker_that_drains_ends_what_runs_and_begins_no_more(floor: Floor, state: State) -> None:
    rows = [row(line) for line in range(1, 31)]
    run_batch(state, floor.store, rows)
    delivery = floor.deliver_segment()
    wait_until(lambda: len(floor.engine.submitted) == 17, 10, "the engine is full")
    floor.handler.wind_down()
    floor.finish(*rows[:17])
    assert delivery.result(10) is Disposition.REQUEUE
    assert len(lines_of(state, floor.store)) == 17
    again = state.batches.claim_segment(S1, "next")
    assert isinstance(again, SegmentClaim)
    assert len(again.ended.missing(range(1, 31))) == 13


def test_one_row_is_cancelled_whether_it_runs_or_waits(floor: Floor, state: State) -> None:
    rows = [row(line) for line in range(1, 19)]
    run_batch(state, floor.store, rows)
    delivery = floor.deliver_segment()
    floor.wait(*rows[:17])
    for line in (1, 18):
        assert state.batches.cancel_row(BATCH, line)
        floor.handler.cancel(row_id(BATCH, line))  # as the control channel tells
    floor.finish(*rows[1:17])
    assert delivery.result(10) is Disposition.ACK
    ends = {line["custom_id"]: line["error"] for line in lines_of(state, floor.store) if line["error"]}
    assert {name: error["code"] for name, error in ends.items()} == dict.fromkeys(
        ("c1", "c18"), "batch_cancelled"
    )
    status = state.status(rows[17].id)
    assert status is not None
    assert status.state is JobState.CANCELLED


def test_a_row_is_asked_after_as_any_job_is(floor: Floor, state: State, settings: Settings) -> None:
    rows = [row(line) for line in (1, 2, 3)]
    run_batch(state, floor.store, rows)
    with Client(settings.model_copy(update={"results_url": floor.store.url})) as client:
        good, bad, gone = (client.get(job.id) for job in rows)
        assert good.status().state is JobState.QUEUED
        delivery = floor.deliver_segment()
        floor.wait(*rows)
        floor.step(rows[0], 28)
        wait_until(lambda: good.status().tokens == 1, 10, "it is in the log")
        assert good.status().state is JobState.RUNNING
        assert bad.cancel() is JobState.RUNNING
        floor.handler.cancel(bad.id)
        floor.finish(rows[0], rows[2])
        assert delivery.result(10) is Disposition.ACK
        assert [job.status().state for job in (good, bad, gone)] == ["succeeded", "cancelled", "succeeded"]
        result = good.result(5)
        assert (result.custom_id, result.usage.completion_tokens) == ("c1", 2)
        assert "".join(chunk.text for chunk in good.stream(timeout_s=30)) == result.text
        assert bad.result(5, check=False).state is JobState.CANCELLED
        assert bad.cancel() is JobState.CANCELLED, "final is final"


def test_rows_that_ask_for_the_same_are_computed_once(floor: Floor, state: State) -> None:
    first = row(1)
    copies = [row(line, prompt="row 1", copy_of=first.id) for line in (2, 3)]
    alone = row(5, copy_of=row(9).id)
    run_batch(state, floor.store, [first, *copies, row(4), alone])
    delivery = floor.deliver_segment()
    floor.wait(first, row(4), alone)
    assert copies[0].id not in floor.engine.submitted
    floor.finish(first, row(4), alone)
    assert delivery.result(10) is Disposition.ACK
    lines = lines_of(state, floor.store)
    assert [line["custom_id"] for line in lines] == ["c1", "c2", "c3", "c4", "c5"]
    assert len({line["response"]["body"]["choices"][0]["text"] for line in lines[:3]}) == 1
    batch = state.batches.get(BATCH)
    assert batch is not None
    assert (batch.request_counts.completed, batch.usage.completion_tokens) == (5, 3)


def test_a_row_that_ends_before_its_copies_have_their_turn_answers_them_all_the_same(
    floor: Floor, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last row of those that begin together ended, and each of its copies was computed again."""
    monkeypatch.setattr(segment_run, "BEGIN_AT_ONCE", 1)
    monkeypatch.setattr(segment_run, "AHEAD", 0)
    first, last = row(1), row(9)
    copies = [row(line, prompt="row 1", copy_of=first.id) for line in range(2, 9)]
    slots, room = floor.handler._slots, floor.handler._room
    monkeypatch.setattr(
        floor.handler, "_room", lambda priority: None if slots.get(first.id) else room(priority)
    )
    run_batch(state, floor.store, [first, *copies, last])
    delivery = floor.deliver_segment()
    for each in (first, last):
        floor.wait(each)
        floor.finish(each)
    assert delivery.result(10) is Disposition.ACK
    assert floor.engine.submitted.keys() == {first.id, last.id}
    assert len(lines_of(state, floor.store)) == 9


def test_copies_of_a_row_that_was_cancelled_alone_are_computed(floor: Floor, state: State) -> None:
    rows = [row(1), row(2, prompt="row 1", copy_of=row(1).id), row(3, prompt="row 1", copy_of=row(1).id)]
    run_batch(state, floor.store, rows)
    delivery = floor.deliver_segment()
    floor.wait(rows[0])
    state.batches.cancel_row(BATCH, 1)
    floor.handler.cancel(rows[0].id)
    floor.wait(*rows[1:])
    floor.finish(*rows[1:])
    assert delivery.result(10) is Disposition.ACK
    lines = lines_of(state, floor.store)
    assert [line["error"] and line["error"]["code"] for line in lines] == ["batch_cancelled", None, None]


def test_a_cancelled_batch_keeps_what_has_ended(floor: Floor, state: State) -> None:
    rows = [row(line) for line in range(1, 19)]
    run_batch(state, floor.store, rows)
    delivery = floor.deliver_segment()
    floor.wait(*rows[:16])
    floor.finish(rows[0])
    state.batches.cancel(BATCH)
    floor.handler.cancel(BATCH)
    assert delivery.result(10) is Disposition.ACK
    batch = state.batches.get(BATCH)
    assert batch is not None
    assert batch.status is BatchStatus.CANCELLING
    assert batch.request_counts.completed == 1
    assert batch.request_counts.failed >= 15, "those that ran; the keeper ends the rest"
    assert state.batches.begin_finalize(BATCH, "k", 9) is BatchStatus.CANCELLING


def test_a_paused_batch_ends_what_runs_and_gets_another_message_later(floor: Floor, state: State) -> None:
    rows = [row(line) for line in range(1, 31)]
    run_batch(state, floor.store, rows)
    state.batches.sent(BATCH, state.batches.unsent(BATCH))
    delivery = floor.deliver_segment()
    wait_until(lambda: len(floor.engine.submitted) == 17, 10, "the engine is full")
    state.batches.pause(BATCH)
    floor.handler.cancel(BATCH)
    floor.finish(*rows[:17])
    assert delivery.result(10) is Disposition.ACK
    assert len(lines_of(state, floor.store)) == 17
    assert list(state.batches.unsent(BATCH)) == [S1]


def test_a_message_goes_only_once_the_server_knows_that_it_needs_another(
    floor: Floor, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(line) for line in range(1, 31)]
    run_batch(state, floor.store, rows)

    def away(*_: Any, **__: Any) -> bool:
        floor.handler._closing.set()
        raise BrokerUnavailable("away")

    monkeypatch.setattr(state.batches, "release", away)
    delivery = floor.deliver_segment()
    wait_until(lambda: len(floor.engine.submitted) == 17, 10, "the engine is full")
    state.batches.pause(BATCH)
    floor.handler.cancel(BATCH)
    floor.finish(*rows[:17])
    assert delivery.result(10) is Disposition.REQUEUE


def test_a_segments_next_message_is_not_spent_on_the_end_of_its_last_one(
    floor: Floor, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = open_batch(state, floor.store, [row(1)])
    said = state.batches.validated
    deliveries: list[Future[Disposition]] = []

    def validated(*args: Any, **fields: Any) -> bool:
        """The answer is late: the segment has its next message by then."""
        answer = said(*args, **fields)
        assert state.batches.begin(batch) is BatchStatus.IN_PROGRESS
        first, waits = floor.handler.segments._hands[S1].disposition, threading.Event()
        result = first.result
        monkeypatch.setattr(first, "result", lambda *_: waits.set() or result())
        deliveries.append(floor.deliver_segment())
        assert waits.wait(10)
        return answer

    monkeypatch.setattr(state.batches, "validated", validated)
    assert floor.deliver_segment().result(10) is Disposition.ACK
    floor.wait(row(1))
    floor.finish(row(1))
    assert deliveries[0].result(10) is Disposition.ACK
    assert len(lines_of(state, floor.store)) == 1


def test_rows_wait_for_a_store_that_is_away_and_no_new_ones_are_lost(
    floor: Floor, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(line) for line in (1, 2)]
    run_batch(state, floor.store, rows)
    put, away = floor.store.put_new, threading.Event()
    away.set()

    def failing(name: str, body: bytes) -> bool:
        if away.is_set():
            raise StoreUnavailable("away")
        return put(name, body)

    monkeypatch.setattr(floor.store, "put_new", failing)
    delivery = floor.deliver_segment()
    floor.wait(*rows)
    floor.finish(*rows)
    wait_until(lambda: floor.handler.segments.waits_for, 10, "they wait")
    assert floor.handler.trouble is None, "others may go on"
    away.clear()
    assert delivery.result(10) is Disposition.ACK
    assert len(lines_of(state, floor.store)) == 2


def test_what_waits_long_is_shared_with_an_idle_neighbour(
    floor: Floor, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_run, "SPLIT_FIRST_S", 0.0)
    rows = [row(line) for line in range(1, 98)]
    run_batch(state, floor.store, rows)
    idle = WorkerInfo(models=("m",), host="h", pid=1, version="0", in_hand=0)
    state.register("idle", idle, 60)
    delivery = floor.deliver_segment()
    wait_until(lambda: len(state.batches.segments(BATCH)) == 2, 10, "it is shared")
    mine, other = sorted(state.batches.segments(BATCH), key=lambda info: len(info.id))
    assert mine.rows + other.rows == 97
    assert other.rows >= 8
    assert set(state.batches.unsent(BATCH)) >= {other.id}
    assert other.first > mine.first
    floor.handler.hand_back(flush_s=1)
    assert delivery.result(10) is Disposition.REQUEUE
    claims = [state.batches.claim_segment(each.id, "w") for each in (mine, other)]
    assert all(isinstance(claim, SegmentClaim) for claim in claims)


def test_validation_finds_what_a_run_would_refuse(floor: Floor, state: State) -> None:
    schema = GrammarSpec(kind="json_schema", text='{"type": "nonsense"}')
    bad: dict[int, tuple[dict[str, Any], str]] = {
        1: ({"prompt": "long " * 3000}, "context_length_exceeded"),
        2: ({"model": "other"}, "model_not_found"),
        3: ({"sampling": SamplingParams(grammar=schema)}, "invalid_schema"),
        4: ({"prompt": None, "prompt_ids": (99_999_999,)}, "invalid_request"),
    }
    rows = [*(row(line, **fields) for line, (fields, _) in bad.items()), row(5)]
    for option, status in (("fail", BatchStatus.FAILED), ("skip", BatchStatus.IN_PROGRESS)):
        name = f"batch_{option}"
        named = [job.model_copy(update={"id": job.id.replace(BATCH, name)}) for job in rows]
        options = BatchOptions.from_python({"on_invalid": option})
        batch = open_batch(state, floor.store, named, batch=name, options=options)
        assert floor.deliver_segment(segment_id(name, 1)).result(30) is Disposition.ACK
        assert state.batches.begin(batch) is status
        record = state.batches.get(name)
        assert record is not None
        found = {problem.line: problem.code for problem in record.errors}
        assert found == {line: code for line, (_, code) in bad.items()}
        assert record.validated == 1
        assert record.request_counts.failed == (4 if option == "skip" else 0)
    assert floor.engine.submitted == {}, "nothing ran"


def test_a_batch_whose_rows_are_gone_is_cancelled_with_the_reason(floor: Floor, state: State) -> None:
    run_batch(state, floor.store, [row(1)])
    floor.store.remove(f"batches/{BATCH}/segments/{S1}.jsonl")
    assert floor.deliver_segment().result(10) is Disposition.ACK
    batch = state.batches.get(BATCH)
    assert batch is not None
    assert batch.reason is not None
    assert batch.reason.code == "input_missing"
