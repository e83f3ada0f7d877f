"""What keepers do for batches: messages, the end of validation, expiry, cancelling, and the final files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends import message_queue
from gristmill.backends.assemble import lines
from gristmill.backends.joining import join
from gristmill.backends.line_merge import Piece
from gristmill.keeper import batch_rounds, finisher
from gristmill.keeper.finisher import Finisher
from gristmill.producer.cli import cli
from gristmill.producer.console import run_guarded
from gristmill.schemas import keys
from gristmill.schemas.batch import (
    Batch,
    BatchOptions,
    BatchStatus,
    LineProblem,
    child_segment,
)
from gristmill.schemas.batch_manifest import BatchManifest
from gristmill.schemas.errors import Misconfigured, ResultsDamaged
from gristmill.schemas.queues import queue_names
from gristmill.schemas.settings import Settings

from ..support.batch_hand import Hand, numbers, open_batch
from ..support.dying import Died, Dying
from ..support.fleet import WORKER, Fleet
from ..support.valkey import Valkey

BATCH = "batch_1"
QUEUE = queue_names("tiny")[2]
HOLD_S = 30.0


@pytest.fixture
def fleet(valkey: Valkey, settings: Settings, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(valkey, settings, tmp_path)
    yield fleet
    fleet.close()


@pytest.fixture
def hand(fleet: Fleet) -> Hand:
    return Hand(fleet.state, fleet.store)


def running(fleet: Fleet, *segments: list[int], **fields: Any) -> Batch:
    """A batch that was validated."""
    batch = open_batch(fleet.state, fleet.store, segments, **fields)
    hand = Hand(fleet.state, fleet.store, batch.id)
    for number in range(1, len(segments) + 1):
        hand.validate(number)
    assert fleet.state.batches.begin(batch) is BatchStatus.IN_PROGRESS
    return batch


def rounds(fleet: Fleet, count: int = 3, name: str = "k1") -> None:
    keeper = fleet.batch_rounds(name, HOLD_S)
    for _ in range(count):
        keeper.round()
        keeper.settle()


def record(fleet: Fleet, batch_id: str = BATCH) -> Batch:
    found = fleet.state.batches.get(batch_id)
    assert found is not None
    return found


def file(fleet: Fleet, name: str | None) -> list[int]:
    return [] if name is None else numbers(fleet.store.get(name))


def codes(fleet: Fleet, name: str | None) -> dict[int, str]:
    """Of the rows in an error file that no response tells of."""
    body = fleet.store.get(name or "") or b""
    said = [json.loads(line) for line in body.splitlines()]
    return {n: row["error"]["code"] for n, row in zip(numbers(body), said, strict=True) if row["error"]}


# ---- messages


def test_a_batch_goes_from_its_input_to_its_files_with_a_keeper_alone(fleet: Fleet, hand: Hand) -> None:
    open_batch(fleet.state, fleet.store, [[2, 5, 1], [4, 3]])
    keeper = fleet.keeper()
    assert keeper.round().idle, "whoever opens a batch sends the first messages"
    fleet.clock.advance(31)
    assert keeper.round().sent == 2, "but it may have died"
    assert keeper.round().idle
    assert fleet.queue.depth(QUEUE) == 2
    hand.validate(1)
    assert keeper.round().idle
    hand.validate(2)
    assert keeper.round().full
    assert record(fleet).status is BatchStatus.IN_PROGRESS
    assert keeper.round().sent == 2
    assert fleet.queue.depth(QUEUE) == 4
    hand.run(1, failing=[5])
    keeper.round()
    assert record(fleet).status is BatchStatus.IN_PROGRESS
    hand.run(2)
    assert record(fleet).status is BatchStatus.FINALIZING
    keeper.round()
    keeper.settle()
    batch = record(fleet)
    assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 4, 1)
    assert file(fleet, batch.output) == [1, 2, 3, 4]
    assert file(fleet, batch.error_output) == [5]
    manifest = BatchManifest.from_json(fleet.store.get(batch.manifest or "") or b"")
    assert (manifest.status, manifest.total, manifest.usage) == ("completed", 5, batch.usage)
    assert manifest.output is not None
    assert manifest.output.name == keys.batch_file(BATCH, "output.jsonl")
    assert keeper.batches_finished == 1
    assert keeper.round().idle


def test_a_client_that_takes_long_to_send_its_messages_is_left_to_it(fleet: Fleet) -> None:
    """After half a minute each further segment had two messages, and was begun twice."""
    open_batch(fleet.state, fleet.store, [[1], [2], [3]])
    marks, keeper = fleet.state.batches.unsent(BATCH), fleet.keeper()
    for segment in (f"{BATCH}.s1", f"{BATCH}.s2"):
        fleet.clock.advance(20)
        assert keeper.round().sent == 0
        fleet.state.batches.sent(BATCH, {segment: marks[segment]})
    fleet.clock.advance(31)
    assert keeper.round().sent == 1, "it died"


def test_segments_are_sent_in_their_order_and_what_was_split_off_behind_its_origin(fleet: Fleet) -> None:
    batch = running(fleet, *[[n] for n in range(1, 13)])
    sent: list[str] = []
    keeper = batch_rounds.BatchRounds(
        fleet.state.batches,
        Finisher(fleet.state.batches, fleet.store, "k1", HOLD_S),
        lambda _, segment, phase: sent.append(f"{segment} {phase.value}"),
        lambda *_: set(),
        keeper_id="k1",
        hold_s=HOLD_S,
    )
    done = keeper.round()
    assert (done.sent, done.full) == (12, False)
    assert sent == [f"{batch.id}.s{n} run" for n in range(1, 13)]
    child = child_segment(f"{BATCH}.s2", "0a0a0a0a")
    places = sorted([f"{BATCH}.s10", child, f"{BATCH}.s2", f"{BATCH}.s1"], key=batch_rounds._place)
    assert places == [f"{BATCH}.s1", f"{BATCH}.s2", child, f"{BATCH}.s10"]


def test_the_message_says_which_segment_and_what_to_do_with_it(fleet: Fleet) -> None:
    running(fleet, [1])
    fleet.batch_rounds().round()
    message: Any = fleet.queue.claim([QUEUE])
    assert f"{BATCH}.s1" in str(message.payload)
    assert fleet.state.batches.unsent(BATCH) == {}


def test_many_segments_are_sent_a_few_a_round(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_rounds, "SEND_AT_ONCE", 2)
    running(fleet, [1], [2], [3])
    keeper = fleet.batch_rounds()
    first, second = keeper.round(), keeper.round()
    assert (first.sent, first.full, second.sent, second.full) == (2, True, 1, False)


def test_segments_whose_messages_got_lost_get_others_and_no_others_do(fleet: Fleet, hand: Hand) -> None:
    """A queue was purged, and its batch stood still until its time was up."""
    running(fleet, *([n] for n in range(1, 7)))
    keeper = fleet.batch_rounds()
    assert keeper.round().sent == 6
    tags = [fleet.queue.claim([QUEUE]).tag for _ in range(5)]  # pyright: ignore[reportAttributeAccessIssue]
    fleet.state.register("w1", WORKER, 3600)
    hand.claim(3)
    fleet.queue.ack(*tags[1:])  # 1 is claimed, 6 waits, a live worker runs 3; 2 and 4 are lost, and 5 was run
    hand.worker = "dead"
    hand.claim(4)
    hand.run(5)
    looks: list[int] = []
    for _ in range(5):
        fleet.clock.advance(batch_rounds.MISSED_EVERY_S + 1)
        looks.append(keeper.round().sent + keeper.round().sent)
    assert looks == [0, 2, 0, 0, 0]
    waiting = str([fleet.queue.claim([QUEUE]) for _ in range(3)])
    assert [n for n in range(1, 7) if f'"id": "{BATCH}.s{n}"' in waiting] == [2, 4, 6]


def test_one_round_looks_for_the_lost_messages_of_one_batch(fleet: Fleet) -> None:
    """A hundred batches of one tenant went through its whole backlog a hundred times, and no round ended."""
    names = ["batch_1", "batch_2", "batch_3"]
    for name in names:
        running(fleet, [1], id=name)
    looked: list[str] = []

    def lacking(batch: Batch, segments: Collection[str]) -> set[str]:
        looked.append(batch.id)
        return set(segments)

    keeper = batch_rounds.BatchRounds(
        fleet.state.batches,
        Finisher(fleet.state.batches, fleet.store, "k1", HOLD_S),
        lambda *_: None,
        lacking,
        keeper_id="k1",
        hold_s=HOLD_S,
    )
    after: list[int] = []
    for _ in range(5):
        fleet.clock.advance(batch_rounds.SEARCH_AGAIN_S + 0.1)
        keeper.round()
        after.append(len(looked))
    assert (after, looked) == ([1, 2, 3, 3, 3], names)


def test_claims_are_looked_through_page_by_page(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(message_queue, "HELD_PAGE", 3)
    payload = '{"headers": {"id": "batch_1.s%d"}}' + " " * 100  # no small hash, which comes in one page
    for number in range(20):
        queue = QUEUE if number % 2 else f"{QUEUE}.other"
        fleet.queue.put(queue, "default", f"b{number}", payload % number)
        fleet.queue.claim([queue])
    ids = [f"batch_1.s{number}" for number in range(22)]
    assert fleet.queue.lacking(QUEUE, "default", ids) == {*ids[::2], ids[21]}


def test_a_queue_too_long_to_look_through_is_taken_to_hold_the_message(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(45):
        fleet.queue.put(QUEUE, "default", f"b{number}", f'{{"headers": {{"id": "batch_1.s{number}"}}}}')
    ids = [f"batch_1.s{number}" for number in (3, 30, 70)]
    monkeypatch.setattr(message_queue, "SEEK_PAGE", 20)
    assert fleet.queue.lacking(QUEUE, "default", ids) == {"batch_1.s70"}
    assert fleet.queue.lacking(QUEUE, "another", ids) == set(ids)
    monkeypatch.setattr(message_queue, "SEEK_LIMIT", 40)
    assert fleet.queue.lacking(QUEUE, "default", ids) == set()


def test_a_paused_batch_gets_no_messages_until_it_goes_on(fleet: Fleet) -> None:
    running(fleet, [1])
    fleet.state.batches.pause(BATCH)
    keeper = fleet.batch_rounds()
    assert keeper.round().sent == 0
    fleet.state.batches.resume(BATCH)
    assert keeper.round().sent == 1


def test_an_input_with_problems_fails_its_batch_and_nothing_runs(fleet: Fleet, hand: Hand) -> None:
    open_batch(fleet.state, fleet.store, [[1, 2], [3]])
    hand.validate(1, [LineProblem(code="context_length_exceeded", message="too long", line=2)])
    hand.validate(2)
    rounds(fleet)
    batch = record(fleet)
    assert (batch.status, batch.problems) == (BatchStatus.FAILED, 1)
    assert [problem.line for problem in batch.errors] == [2]
    assert fleet.queue.depth(QUEUE) == 0
    assert (batch.output, batch.error_output) == (None, None)


def test_what_wakes_a_keeper_while_it_looks_is_not_put_off(fleet: Fleet, hand: Hand) -> None:
    open_batch(fleet.state, fleet.store, [[1]])
    hand.validate(1)
    fleet.clock.advance(1)
    now, (due,) = fleet.state.batches.due(10)
    assert fleet.state.batches.defer(due.id, now + 100, seen_at=now), "due since before"
    assert fleet.state.batches.due(10)[1] == []
    fleet.state.batches.cancel(BATCH)
    fleet.state.batches.defer(due.id, now + 100, seen_at=now)
    assert len(fleet.state.batches.due(10)[1]) == 1, "within the same millisecond"


# ---- batches that stop


def test_rows_that_did_not_run_in_time_get_a_line_each(fleet: Fleet, hand: Hand) -> None:
    running(fleet, [3, 1, 2], [5, 4], completion_window_s=600.0)
    hand.run(1, only=[2, 3], failing=[3])
    fleet.clock.advance(601)
    rounds(fleet)
    batch = record(fleet)
    assert batch.status is BatchStatus.EXPIRED
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 4)
    assert file(fleet, batch.output) == [2]
    assert sorted(file(fleet, batch.error_output)) == [1, 3, 4, 5]
    assert codes(fleet, batch.error_output) == dict.fromkeys([1, 4, 5], "batch_expired")
    assert b'"custom_id":"row-4"' in (fleet.store.get(batch.error_output or "") or b"")


def test_a_cancelled_batch_waits_for_what_live_workers_hand_in(fleet: Fleet, hand: Hand) -> None:
    running(fleet, [1, 2], [3])
    fleet.state.register("w1", WORKER, 3600)
    claim = hand.claim(1)
    fleet.state.batches.cancel(BATCH)
    keeper = fleet.batch_rounds()
    keeper.round()
    keeper.settle()
    assert record(fleet).status is BatchStatus.CANCELLING
    hand.accept(claim, hand.put(claim, [2]))
    fleet.state.batches.end_segment(claim.info.id, claim.attempt)
    keeper.round()
    keeper.settle()
    batch = record(fleet)
    assert batch.status is BatchStatus.CANCELLED
    assert file(fleet, batch.output) == [2]
    assert codes(fleet, batch.error_output) == dict.fromkeys([1, 3], "batch_cancelled")


def test_a_dead_worker_is_not_waited_for_and_a_silent_one_not_for_ever(
    fleet: Fleet, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    running(fleet, [1, 2])
    fleet.state.register("w1", WORKER, 3600)
    claim = hand.claim(1)
    made = hand.put(claim, [1, 2])
    fleet.state.batches.cancel(BATCH)
    monkeypatch.setattr(batch_rounds, "PATIENCE_S", -1.0)
    rounds(fleet)
    batch = record(fleet)
    assert batch.status is BatchStatus.CANCELLED
    assert codes(fleet, batch.error_output) == dict.fromkeys([1, 2], "batch_cancelled")
    assert hand.accept(claim, made) is None, "it is fenced"


def test_a_batch_stops_at_as_many_failures_as_it_was_told(fleet: Fleet, hand: Hand) -> None:
    running(fleet, [1, 2, 3], [4], options=BatchOptions(stop_after_failed=2))
    hand.run(1, failing=[1, 2])
    rounds(fleet)
    batch = record(fleet)
    assert batch.status is BatchStatus.CANCELLED
    assert batch.reason is not None
    assert batch.reason.code == "too_many_failed"
    assert file(fleet, batch.output) == [3]
    assert sorted(file(fleet, batch.error_output)) == [1, 2, 4]


def test_a_batch_cancelled_before_anything_was_validated_ends_too(fleet: Fleet) -> None:
    open_batch(fleet.state, fleet.store, [[1, 2], [3]])
    fleet.state.batches.cancel(BATCH)
    rounds(fleet)
    batch = record(fleet)
    assert (batch.status, batch.output) == (BatchStatus.CANCELLED, None)
    assert codes(fleet, batch.error_output) == dict.fromkeys([1, 2, 3], "batch_cancelled")


def test_many_rows_that_did_not_run_are_written_some_at_a_time(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finisher, "ROWS_AT_ONCE", 4)
    running(fleet, list(range(1, 11)), completion_window_s=60.0)
    fleet.clock.advance(61)
    rounds(fleet)
    assert len(list(fleet.state.batches.objects(BATCH))) == 3
    assert sorted(file(fleet, record(fleet).error_output)) == list(range(1, 11))


# ---- files


def test_the_order_of_the_input_comes_back_if_it_was_asked_for(fleet: Fleet, hand: Hand) -> None:
    running(fleet, [6, 1, 4], [5, 2, 3], options=BatchOptions(input_order=True))
    hand.run(1, only=[4])
    hand.run(2)
    hand.run(1)
    rounds(fleet)
    assert file(fleet, record(fleet).output) == [1, 2, 3, 4, 5, 6]


def test_finished_rows_can_be_read_while_the_batch_runs(fleet: Fleet, hand: Hand) -> None:
    running(fleet, [1, 2, 3], [4])
    hand.run(1, only=[3, 1], failing=[1])
    accepted = list(fleet.state.batches.objects(BATCH))
    found = [line for each in accepted for line in lines(fleet.store, Piece.of(each))]
    assert sorted(numbers(b"".join(found))) == [1, 3]


@pytest.mark.parametrize("ending", ["completed", "expired"])
def test_a_keeper_may_die_before_any_call_and_another_goes_on(
    fleet: Fleet, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finisher, "ROWS_AT_ONCE", 2)
    expected: Any = None
    for calls in range(1, 200):
        name = f"batch_{calls}"
        batch = running(fleet, [1, 2, 3], [5, 4], id=name, completion_window_s=60.0)
        hand = Hand(fleet.state, fleet.store, name)
        hand.run(1, failing=[2])
        if ending == "completed":
            hand.run(2)
        else:
            fleet.clock.advance(61)
            assert fleet.state.batches.expire(name)
        life = [calls]
        batches: Any = Dying(fleet.state.batches, 0, life)
        store: Any = Dying(fleet.store, 0, life)
        with suppress(Died):
            Finisher(batches, store, "k1", HOLD_S).finish(name)
        other = Finisher(fleet.state.batches, fleet.store, "k2", HOLD_S)
        if not record(fleet, name).status.final and life[0] <= 0 and calls > 2:
            assert other.finish(name) is None, "it is still held"
        fleet.clock.advance(HOLD_S + 1)
        other.finish(name)
        done = record(fleet, name)
        assert done.status == ending
        found = (
            file(fleet, done.output),
            sorted(file(fleet, done.error_output)),
            done.request_counts.model_dump(),
        )
        assert found == (expected or found)
        expected = found
        assert [*fleet.store.left_overs(f"batches/{batch.id}/")] == []
        if life[0] > 0:
            return
    raise AssertionError("it never came to an end")


def test_objects_that_are_gone_leave_the_batch_unfinished_and_are_told_of(
    fleet: Fleet, hand: Hand, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    running(fleet, [1])
    hand.run(1)
    (made,) = fleet.state.batches.objects(BATCH)
    body = fleet.store.get(made.name) or b""
    fleet.store.remove(made.name)
    with pytest.raises(ResultsDamaged, match="gone"):
        Finisher(fleet.state.batches, fleet.store, "k1", HOLD_S).finish(BATCH)
    rounds(fleet)
    assert [entry.msg for entry in caplog.records].count("batch.damaged") == 1, "and not in every round"
    assert record(fleet).status is BatchStatus.FINALIZING
    assert run_guarded(cli, ["batch", "show", BATCH, "--broker", fleet.valkey.url]) == 0
    shown = dict(line.split(":", 1) for line in capsys.readouterr().out.splitlines())
    assert "results_damaged" in shown["trouble"]
    assert made.name in shown["trouble"]
    assert "a keeper tries again" in shown["next step"]
    fleet.store.put_new(made.name, body)
    fleet.clock.advance(batch_rounds.BROKEN_AGAIN_S)
    rounds(fleet, 1)
    ended = record(fleet)
    assert (ended.status, ended.trouble, ended.trouble_at) == (BatchStatus.COMPLETED, None, None)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_damage_that_the_server_will_not_note_is_no_crash(
    fleet: Fleet, hand: Hand, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ACL that lacks a command: the thread died of it, with a trace and no word of the batch."""
    running(fleet, [1])
    hand.run(1)
    (made,) = fleet.state.batches.objects(BATCH)
    fleet.store.remove(made.name)

    def refused(*_: object) -> bool:
        raise Misconfigured("no permission")

    monkeypatch.setattr(fleet.state.batches, "trouble", refused)
    rounds(fleet, 1)
    assert record(fleet).status is BatchStatus.FINALIZING


def test_an_object_that_tells_of_its_rows_together_is_not_cut(fleet: Fleet, hand: Hand) -> None:
    """Nobody can say which of its tokens were those of the rows that are left."""
    open_batch(fleet.state, fleet.store, [[1, 2]])
    claim = hand.claim(1)
    fleet.state.batches.add(BATCH, [hand.put(claim, [1])])
    with pytest.raises(AssertionError, match="usage"):
        join(fleet.state.batches, fleet.store, BATCH, hand.put(claim, [1, 2]), "client")


def test_a_batch_whose_rows_were_taken_away_ends_with_what_there_is(fleet: Fleet, hand: Hand) -> None:
    running(fleet, [1, 2], [3])
    hand.run(2)
    fleet.store.remove(keys.segment_object(f"{BATCH}.s1"))
    fleet.state.batches.cancel(BATCH)
    rounds(fleet)
    batch = record(fleet)
    assert batch.status is BatchStatus.CANCELLED
    assert file(fleet, batch.output) == [3]
    assert (batch.error_output, batch.request_counts.failed) == (None, 0)


def test_a_segment_whose_message_was_put_aside_gets_another(fleet: Fleet) -> None:
    running(fleet, [1])
    keeper = fleet.keeper()
    assert keeper.round().sent == 1
    fleet.queue.bury(fleet.queue.claim([QUEUE]).tag, "rejected")  # pyright: ignore[reportOptionalMemberAccess]
    done = keeper.round()
    assert (done.sent, done.ended) == (1, 0)
    assert fleet.queue.depth(QUEUE) == 1
    assert list(fleet.store.list("results/")) == [], "a segment is no job"


def test_batches_whose_time_is_over_leave_the_list(fleet: Fleet) -> None:
    for number in range(5):
        open_batch(fleet.state, fleet.store, [[1]], id=f"batch_{number}")
    client = fleet.valkey.client()
    client.delete(keys.batch("batch_1"), keys.batch("batch_3"))
    at: str | None = None
    for _ in range(4):
        at = fleet.state.batches.forget_gone(at, 2)
    assert {name.decode() for name in client.zrange(keys.BATCHES, 0, -1)} == {
        "batch_0",
        "batch_2",
        "batch_4",
    }
