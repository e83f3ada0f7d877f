"""A batch's life on a real server: who may add to it, what a repetition does, that counts are exact."""

from __future__ import annotations

import random
from typing import Any

import pytest
from gristmill.backends.batches import Accepted, NoClaim, Refused, SegmentClaim
from gristmill.backends.redis import connect
from gristmill.backends.state import State, Write
from gristmill.schemas import keys
from gristmill.schemas.batch import (
    Batch,
    BatchOptions,
    BatchStatus,
    LineProblem,
    Phase,
    RequestCounts,
    ResultObject,
    RowsEnded,
    SegmentInfo,
    StatusChanged,
    Validated,
    child_segment,
    pack_lines,
    row_id,
    segment_id,
    unpack_lines,
)
from gristmill.schemas.errors import IdempotencyConflict, JobNotFound
from gristmill.schemas.events import Delta, Released, Started
from gristmill.schemas.job import JobState
from gristmill.schemas.result import Usage
from gristmill.schemas.settings import Settings
from gristmill.schemas.status import WorkerInfo

from ..support.clock import Clock
from ..support.valkey import Valkey

BATCH = "batch_1"
WORKER = WorkerInfo(models=("tiny",), host="h", pid=1, version="0")


def opened(state: State, *sizes: int, **fields: Any) -> Batch:
    """A batch of as many segments, and rows in each."""
    total = sum(sizes)
    batch = Batch(**{"id": BATCH, "model": "tiny", "request_counts": RequestCounts(total=total), **fields})
    segments, first = [], 1
    for number, rows in enumerate(sizes, 1):
        name = segment_id(BATCH, number)
        last = first + rows - 1
        segments.append(
            SegmentInfo(id=name, input=keys.segment_object(name), rows=rows, first=first, last=last)
        )
        first = last + 1
    assert state.batches.open(batch, segments)
    return batch


def running(state: State, *sizes: int, **fields: Any) -> Batch:
    """The same, once it was validated."""
    batch = opened(state, *sizes, **fields)
    for number, rows in enumerate(sizes, 1):
        claim = claimed(state, number)
        assert claim.phase is Phase.VALIDATE
        said = {"rows": rows, "tokens": 3 * rows, "problems": (), "count": 0, "told": 10}
        assert state.batches.validated(segment_id(BATCH, number), claim.attempt, **said)
    assert state.batches.begin(batch) is BatchStatus.IN_PROGRESS
    return batch


def claimed(state: State, number: int = 1, worker: str = "w1") -> SegmentClaim:
    claim = state.batches.claim_segment(segment_id(BATCH, number), worker)
    assert isinstance(claim, SegmentClaim), claim
    return claim


def rows_of(*lines: int, number: int = 0, kind: Any = "output", segment: str = BATCH + ".s1", **fields: Any):
    return ResultObject(
        segment=segment,
        kind=kind,
        name=keys.rows_object(segment, 1, number, kind),
        rows=len(lines),
        bytes=100,
        sha256="00",
        lines=pack_lines(lines),
        usage=Usage(prompt_tokens=10, completion_tokens=2 * len(lines)),
        **fields,
    )


def counts(state: State) -> tuple[int, int, int]:
    batch = state.batches.get(BATCH)
    assert batch is not None
    return batch.request_counts.completed, batch.request_counts.failed, batch.usage.completion_tokens


def test_a_batch_goes_from_open_to_completed_and_tells_each_step(state: State) -> None:
    batch = opened(state, 3, 2, metadata={"for": "us"})
    for number, rows in ((1, 3), (2, 2)):
        assert state.batches.begin(batch) is BatchStatus.VALIDATING, "not before all were looked at"
        claim = claimed(state, number)
        told = {"rows": rows, "tokens": 7, "problems": (), "count": 0, "told": 9}
        assert state.batches.validated(segment_id(BATCH, number), claim.attempt, **told)
        assert state.batches.claim_segment(segment_id(BATCH, number), "w2") == NoClaim("over")
    assert state.batches.begin(batch) is BatchStatus.IN_PROGRESS
    assert sorted(state.batches.unsent(BATCH)) == [segment_id(BATCH, 1), segment_id(BATCH, 2)]
    marks = state.batches.unsent(BATCH)
    state.batches.sent(BATCH, {segment_id(BATCH, 1): marks[segment_id(BATCH, 1)]})
    assert list(state.batches.unsent(BATCH)) == [segment_id(BATCH, 2)]

    one, two = claimed(state, 1), claimed(state, 2)
    assert (one.phase, one.batch.metadata) == (Phase.RUN, {"for": "us"})
    assert isinstance(state.batches.accept(one.info.id, one.attempt, [rows_of(1, 3)]), Accepted)
    bad = rows_of(2, number=1, kind="errors")
    assert isinstance(state.batches.accept(one.info.id, one.attempt, [bad]), Accepted)
    assert state.batches.end_segment(one.info.id, one.attempt)
    last = rows_of(4, 5, segment=two.info.id)
    ended = state.batches.accept(two.info.id, two.attempt, [last])
    assert isinstance(ended, Accepted)
    assert (ended.completed, ended.failed, ended.standing.status) == (4, 1, BatchStatus.FINALIZING)

    assert state.batches.begin_finalize(BATCH, "me", 60) is BatchStatus.FINALIZING
    assert state.batches.begin_finalize(BATCH, "another", 60) is None
    assert state.batches.complete(batch, "another", output="o") is None
    for _ in range(2):
        assert state.batches.complete(batch, "me", output="o", manifest="m") is BatchStatus.COMPLETED
    final = state.batches.get(BATCH)
    assert final is not None
    assert (final.status, final.output, final.error_output, final.manifest) == ("completed", "o", None, "m")
    assert (final.request_counts, final.usage.completion_tokens) == (
        RequestCounts(total=5, completed=4, failed=1),
        10,
    )
    assert (final.validated, final.planned_tokens) == (5, 14)
    accepted = [rows_of(1).name, bad.name, last.name]
    assert [each.name for each in state.batches.objects(BATCH)] == accepted
    assert state.batches.object_count(BATCH) == 3
    assert [each.name for each in state.batches.objects(BATCH, 1)] == accepted[1:], "those of a later run"

    told_events = [event for _, event in state.batches.read_events(BATCH)]
    statuses = [event.status.value for event in told_events if isinstance(event, StatusChanged)]
    assert statuses == ["validating", "in_progress", "finalizing", "completed"]
    assert [event.counts.completed for event in told_events if isinstance(event, RowsEnded)] == [2, 2, 4]
    assert sum(event.rows for event in told_events if isinstance(event, Validated)) == 5
    assert [found.id for found in state.batches.list()] == [BATCH]


def test_opening_twice_is_once_and_another_batch_of_that_id_is_a_conflict(state: State) -> None:
    batch = opened(state, 2)
    assert not state.batches.open(batch, [])
    with pytest.raises(IdempotencyConflict):
        state.batches.open(batch.model_copy(update={"model": "other"}), [])


def test_a_row_joins_once_whoever_brings_it_and_however_often(state: State) -> None:
    running(state, 4)
    first = claimed(state)
    done = rows_of(1, 2)
    for _ in range(2):  # the reply to the first was lost
        answer = state.batches.accept(first.info.id, first.attempt, [done])
        assert isinstance(answer, Accepted)
    assert counts(state) == (2, 0, 4)

    second = claimed(state, worker="w2")
    assert (1 in second.ended, 2 in second.ended, 3 in second.ended) == (True, True, False)
    assert state.batches.accept(first.info.id, first.attempt, [rows_of(3, number=1)]) is None, "fenced"
    mixed = [rows_of(3, number=2), rows_of(2, 4, number=2, kind="errors")]
    assert state.batches.accept(second.info.id, second.attempt, mixed) == Refused(frozenset({2}))
    assert counts(state) == (2, 0, 4), "all or none"
    rest = [rows_of(3, number=3), rows_of(4, number=3, kind="errors")]
    assert isinstance(state.batches.accept(second.info.id, second.attempt, rest), Accepted)
    assert counts(state) == (3, 1, 8)


def test_a_rows_log_is_fenced_by_its_segment_and_goes_on_in_the_next_attempt(state: State) -> None:
    running(state, 3)
    first = claimed(state)
    for _ in range(2):  # repeated, it begins nothing anew
        assert state.batches.begin_rows(first.info.id, first.attempt, "w1", [1, 2]) == [[], []]
    row = row_id(BATCH, 1)
    token = Delta(offset=0, ids=(5,), text="x").to_json()
    write = Write(row, first.attempt, 1, token, owner=first.info.id)
    assert state.publish([write]) == set()
    status = state.status(row)
    assert status is not None
    assert (status.state, status.tokens, status.tenant) == (JobState.RUNNING, 1, "default")

    second = claimed(state, worker="w2")
    assert state.publish([write._replace(seq=2)]) == {row}
    assert state.batches.begin_rows(first.info.id, first.attempt, "w1", [3]) is None
    logs = state.batches.begin_rows(second.info.id, second.attempt, "w2", [1, 3])
    assert logs is not None
    assert [type(event) for _, event in logs[0]] == [Started, Delta]
    assert state.batches.release(second.info.id, second.attempt, [1])
    assert isinstance(state.read_log(row)[-1][1], Released)
    third = claimed(state)
    assert third.attempts == 3, "the one to validate is none of them"
    state.batches.accept(third.info.id, third.attempt, [rows_of(1)])
    assert state.read_log(row) == [], "its text is in the object now"


def test_what_is_split_off_is_a_segment_of_its_own_and_may_not_be_written_by_its_old_owner(
    state: State,
) -> None:
    running(state, 4)
    holder = claimed(state)
    state.batches.begin_rows(holder.info.id, holder.attempt, "w1", [1])
    kept = holder.info.model_copy(update={"rows": 2, "lines": pack_lines([1, 2])})
    child = child_segment(holder.info.id, "0123abcd")
    given = holder.info.model_copy(
        update={"id": child, "rows": 2, "lines": pack_lines([3, 4]), "parent": holder.info.id}
    )
    for _ in range(2):
        assert state.batches.split(holder.info.id, holder.attempt, kept, given)
    assert child in state.batches.unsent(BATCH)
    assert {info.id: info.rows for info in state.batches.segments(BATCH)} == {holder.info.id: 2, child: 2}
    taken = state.batches.claim_segment(child, "w2")
    assert isinstance(taken, SegmentClaim)
    assert taken.attempt > holder.attempt
    assert unpack_lines(taken.info.lines or "") == [3, 4]
    assert claimed(state).info.rows == 2
    assert not state.batches.split(
        holder.info.id, holder.attempt, kept, given.model_copy(update={"id": child[:-1] + "e"})
    )


def test_problems_make_a_batch_fail_before_anything_runs_unless_they_are_skipped(state: State) -> None:
    for option, expected in (("fail", BatchStatus.FAILED), ("skip", BatchStatus.IN_PROGRESS)):
        options = BatchOptions.from_python({"on_invalid": option, "max_errors": 2})
        batch = opened(state, 3, options=options)
        claim = claimed(state)
        found = [LineProblem(code="invalid_request", message="no", line=line) for line in (1, 2, 3)]
        told = {"rows": 0, "tokens": 0, "problems": found, "count": 3, "told": 2}
        for _ in range(2):
            assert state.batches.validated(claim.info.id, claim.attempt, **told)
        assert state.batches.begin(batch) is expected
        record = state.batches.get(BATCH)
        assert record is not None
        assert (record.problems, [problem.line for problem in record.errors]) == (3, [1, 2])
        claims = isinstance(state.batches.claim_segment(claim.info.id, "w"), SegmentClaim)
        assert claims == (option == "skip")
        assert state.batches.delete(BATCH)


def test_as_many_problems_are_told_as_a_batch_may_ask_for(state: State) -> None:
    batch = opened(state, 10_000, options=BatchOptions(max_errors=10_000))
    claim = claimed(state)
    found = [LineProblem(code="invalid_request", message="no", line=line) for line in range(1, 10_001)]
    told = {"rows": 0, "tokens": 0, "problems": found, "count": 10_000, "told": 10_000}
    assert state.batches.validated(claim.info.id, claim.attempt, **told)
    assert state.batches.begin(batch) is BatchStatus.FAILED
    record = state.batches.get(BATCH)
    assert record is not None
    assert [problem.line for problem in record.errors] == list(range(1, 10_001))


def test_a_cancelled_batch_takes_what_its_workers_have_and_the_rest_from_its_keeper(state: State) -> None:
    batch = running(state, 2, 2)
    claim = claimed(state)
    state.register("w1", WORKER, 60)
    assert state.batches.cancel(BATCH) is BatchStatus.CANCELLING
    assert state.batches.standing(BATCH).over
    assert state.batches.claim_segment(segment_id(BATCH, 2), "w2") == NoClaim("over")
    _, (due,) = state.batches.due(10)
    assert (due.status, due.running, due.left) == ("cancelling", 1, 4)
    assert isinstance(state.batches.accept(claim.info.id, claim.attempt, [rows_of(1)]), Accepted)
    assert state.batches.end_segment(claim.info.id, claim.attempt)
    _, (due,) = state.batches.due(10)
    assert (due.running, due.left) == (0, 3)

    rest = rows_of(2, 3, 4, kind="errors", segment=BATCH + ".s2", cancelled=pack_lines([2, 3, 4]))
    assert state.batches.add(BATCH, [rest], "me") is None, "not before it is the keeper's"
    assert state.batches.begin_finalize(BATCH, "me", 60) is BatchStatus.CANCELLING
    assert isinstance(state.batches.add(BATCH, [rest], "me"), Accepted)
    assert state.batches.complete(batch, "me") is BatchStatus.CANCELLED
    assert state.batches.due(10)[1] == []
    states = [state.status(row_id(BATCH, line)) for line in (1, 2)]
    assert [status and status.state for status in states] == [JobState.SUCCEEDED, JobState.CANCELLED]


def test_a_batch_whose_time_is_up_ends_as_expired(settings: Settings) -> None:
    clock = Clock()
    with State(connect(settings.broker, settings), settings, clock=clock) as state:
        batch = running(state, 1, completion_window_s=60.0, request_counts=RequestCounts(total=2))
        claim = claimed(state)
        assert not state.batches.expire(BATCH)
        assert state.batches.begin_finalize(BATCH, "me", 60) is None
        clock.advance(61)
        assert state.batches.claim_segment(claim.info.id, "w2") == NoClaim("over")
        assert state.batches.expire(BATCH)
        assert state.batches.begin_finalize(BATCH, "me", 60) is BatchStatus.EXPIRED
        assert state.batches.accept(claim.info.id, claim.attempt, [rows_of(1)]) is None
        assert state.batches.add(BATCH, [rows_of(2, kind="errors")]) is None, "a client comes too late, too"
        late = rows_of(1, kind="errors", expired=pack_lines([1]))
        assert isinstance(state.batches.add(BATCH, [late], "me"), Accepted)
        assert state.batches.complete(batch, "me") is BatchStatus.EXPIRED


def test_a_batch_stops_itself_when_too_many_rows_have_failed(state: State) -> None:
    running(state, 10, options=BatchOptions(stop_after_share=0.2))
    claim = claimed(state)
    state.batches.accept(claim.info.id, claim.attempt, [rows_of(1, kind="errors")])
    answer = state.batches.accept(claim.info.id, claim.attempt, [rows_of(2, number=1, kind="errors")])
    assert isinstance(answer, Accepted)
    assert answer.standing.over
    record = state.batches.get(BATCH)
    assert record is not None
    assert record.reason is not None
    assert (record.status, record.reason.code) == ("cancelling", "too_many_failed")


def test_rows_refused_in_validation_count_among_those_that_failed(state: State) -> None:
    """A batch that was to stop at two failures ran all its other rows."""
    for limit, expected in ((2, BatchStatus.CANCELLING), (3, BatchStatus.IN_PROGRESS)):
        options = BatchOptions(on_invalid="skip", stop_after_failed=limit)
        batch = opened(state, 4, options=options)
        state.batches.sent(BATCH, state.batches.unsent(BATCH))
        claim = claimed(state)
        assert isinstance(
            state.batches.accept(claim.info.id, claim.attempt, [rows_of(1, 2, kind="errors")]), Accepted
        )
        said = {"rows": 2, "tokens": 1, "problems": (), "count": 2, "told": 10}
        assert state.batches.validated(claim.info.id, claim.attempt, **said)
        assert state.batches.begin(batch) is expected
        record = state.batches.get(BATCH)
        assert record is not None
        assert (record.reason and record.reason.code) == ("too_many_failed" if limit == 2 else None)
        assert len(state.batches.unsent(BATCH)) == (limit == 3)
        assert state.batches.delete(BATCH)


def test_a_paused_batch_gets_its_messages_back_when_it_goes_on(state: State) -> None:
    running(state, 1)
    state.batches.sent(BATCH, state.batches.unsent(BATCH))
    state.batches.pause(BATCH)
    assert state.batches.claim_segment(segment_id(BATCH, 1), "w") == NoClaim("paused")
    assert list(state.batches.unsent(BATCH)) == [segment_id(BATCH, 1)]
    state.batches.resume(BATCH)
    assert claimed(state).phase is Phase.RUN


def test_one_row_can_be_cancelled_until_it_has_ended(state: State) -> None:
    running(state, 2)
    assert state.batches.cancel_row(BATCH, 2)
    claim = claimed(state)
    assert claim.stopped == {2}
    gone = rows_of(2, kind="errors", cancelled=pack_lines([2]))
    state.batches.accept(claim.info.id, claim.attempt, [gone])
    assert not state.batches.cancel_row(BATCH, 2)
    status = state.status(row_id(BATCH, 2))
    assert status is not None
    assert (status.state, status.result) == (JobState.CANCELLED, gone.name)
    with pytest.raises(JobNotFound):
        state.batches.cancel_row("batch_2", 1)


def test_what_a_client_found_wrong_joins_until_the_batch_is_made_final(state: State) -> None:
    batch = opened(state, 2, request_counts=RequestCounts(total=3))
    wrong = rows_of(3, kind="errors", segment=BATCH + ".s0")
    assert isinstance(state.batches.add(BATCH, [wrong]), Accepted)
    assert isinstance(state.batches.add(BATCH, [wrong]), Accepted), "a repetition"
    claim = claimed(state)
    state.batches.validated(claim.info.id, claim.attempt, rows=2, tokens=1, problems=(), count=0, told=1)
    state.batches.begin(batch)
    assert state.batches.add(BATCH, [rows_of(3, number=9)]) == Refused(frozenset({3})), "submitted again"
    assert counts(state)[:2] == (0, 1)
    claim = claimed(state)
    state.batches.accept(claim.info.id, claim.attempt, [rows_of(1, 2)])
    assert state.batches.begin_finalize(BATCH, "k1", 30.0) is BatchStatus.FINALIZING
    assert state.batches.add(BATCH, [rows_of(3, number=10)]) is None


def test_followers_hear_of_rows_as_they_end(state: State) -> None:
    running(state, 1)
    claim = claimed(state)
    with state.batches.subscribe(BATCH) as channel:
        state.batches.accept(claim.info.id, claim.attempt, [rows_of(1)])
        entry = channel.get(5)
    assert isinstance(entry, tuple)
    assert isinstance(entry[1], RowsEnded)
    last = state.batches.read_events(BATCH, entry[0])
    assert [type(event) for _, event in last] == [StatusChanged]


def test_every_key_of_a_batch_has_an_expiry_and_deleting_leaves_none(state: State, valkey: Valkey) -> None:
    running(state, 2)
    claim = claimed(state)
    state.batches.cancel_row(BATCH, 2)
    state.batches.begin_rows(claim.info.id, claim.attempt, "w", [1])
    state.batches.accept(claim.info.id, claim.attempt, [rows_of(1)])
    valkey.check_keys()
    state.batches.delete(BATCH)
    assert list(valkey.client().scan_iter("gm:*")) == []


def test_lines_survive_packing_and_take_little_space() -> None:
    rng = random.Random(7)
    for lines in ([], [1], [1, 2, 3], sorted(rng.sample(range(1, 2**31), 500))):
        assert unpack_lines(pack_lines(lines)) == lines
    scattered = sorted(rng.sample(range(1, 1_000_000), 10_000))
    assert len(pack_lines(scattered)) < 2 * len(scattered)
    assert len(pack_lines(range(1, 10_001))) < 100


def test_a_segment_that_asks_again_before_its_message_counts_as_sent_still_needs_one(state: State) -> None:
    """A worker was faster than the client that sent: the batch began to run, and no message followed."""
    opened(state, 1)
    marks = state.batches.unsent(BATCH)
    state.batches.delete(BATCH)
    running(state, 1)  # all that happens between a message and the word that it is sent
    state.batches.sent(BATCH, marks)
    assert list(state.batches.unsent(BATCH)) == [segment_id(BATCH, 1)]
    state.batches.sent(BATCH, state.batches.unsent(BATCH))
    assert state.batches.unsent(BATCH) == {}
