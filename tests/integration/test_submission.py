"""A batch submitted again, wherever an earlier try or an earlier life of it ended: every row has one line."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from gristmill.producer.batch import submission
from gristmill.producer.batch.retrying import retry
from gristmill.producer.batch.spool import Spooled
from gristmill.producer.batch.submission import Submission
from gristmill.producer.batches import Wishes, describe, read
from gristmill.producer.link import Link
from gristmill.producer.settings import producer_settings
from gristmill.schemas import keys
from gristmill.schemas.batch import Batch, BatchOptions, BatchStatus, OpenedBatch, segment_id, unpack_lines
from gristmill.schemas.batch_lines import OutputLine
from gristmill.schemas.settings import Settings

from ..support.batch_hand import Hand, answer, numbers
from ..support.dying import Died
from ..support.fleet import Fleet
from ..support.valkey import Valkey


class Desk:
    """A client, a keeper, and what a worker would do."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        settings = fleet.settings.model_copy(update={"results_url": fleet.store.url})
        self.link, self.settings = Link(settings), producer_settings(settings)
        self.keeper = fleet.batch_rounds()
        self.died = 0
        """Submissions that came to no end."""

    def dies_at_add(self, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let the next submission die when it adds rows for the ``number``-th time."""
        batches, calls = self.link.state.batches, count(1)
        add = batches.add

        def adding(*args: Any) -> Any:
            if next(calls) == number:
                monkeypatch.setattr(batches, "add", add)
                raise Died
            return add(*args)

        monkeypatch.setattr(batches, "add", adding)

    def submit(self, *prompts: str, known: Container[int] = (), **options: Any) -> Batch:
        """``known``: lines whose answers a cache has."""
        wishes = Wishes(model="tiny", options=BatchOptions.from_python(options))
        with read([{"prompt": prompt} for prompt in prompts], wishes, self.settings) as intake:
            batch = describe(intake, wishes, "tiny", self.settings, "batch_", "")
            own = submission.OwnRows(self.link.store, batch.id)

            def taken(row: Spooled) -> bool:
                if row.line in known:
                    own.answer(row.line, OutputLine.from_json(answer(batch.id, row.line)))
                return row.line in known

            try:
                Submission(self.link, intake, batch).run(taken, own)
            except Died:
                self.died += 1
        return batch

    def hand(self, batch: Batch) -> Hand:
        return Hand(self.fleet.state, self.fleet.store, batch.id)

    def run(self, batch: Batch, failing: Collection[int] = ()) -> None:
        """Validate and run its segment."""
        self.fleet.clock.advance(600)
        self.hand(batch).validate(1)
        self.keeper.round()
        self.hand(batch).run(1, failing=failing)

    def finished(self, batch: Batch, status: BatchStatus = BatchStatus.COMPLETED) -> Batch:
        self.fleet.clock.advance(600)  # behind the server's own clock, by which the client acts
        for _ in range(3):
            self.keeper.round()
            self.keeper.settle()
        found = self.fleet.state.batches.get(batch.id)
        assert found is not None
        assert found.status is status, found
        return found

    def lines(self, name: str | None) -> list[int]:
        return sorted(numbers(self.fleet.store.get(name or "none")))


@pytest.fixture
def desk(valkey: Valkey, settings: Settings, tmp_path: Path) -> Iterator[Desk]:
    fleet = Fleet(valkey, settings, tmp_path)
    desk = Desk(fleet)
    yield desk
    desk.link.close()
    fleet.close()


def test_a_batch_whose_end_was_cut_off_with_the_server_comes_to_its_end_when_submitted_again(
    desk: Desk,
) -> None:
    """Its output.jsonl stood without a manifest, and each later end found other bytes under that name."""
    batch = desk.submit("a", "b", input_order=True)
    store = desk.fleet.store
    made = [keys.batch_file(batch.id, "output.jsonl"), keys.rows_object(f"{batch.id}.keeper", 0, 0, "output")]
    for name in made:
        assert store.put_new(name, b"an earlier life's\n")
    desk.fleet.valkey.client().flushall()
    assert desk.submit("a", "b", input_order=True).id == batch.id
    assert not any(map(store.exists, made))
    desk.run(batch)
    assert desk.lines(desk.finished(batch).output) == [1, 2]
    desk.fleet.valkey.client().flushall()
    assert desk.submit("a", "b", input_order=True).id == batch.id
    assert store.exists(made[0]), "with a manifest it is the answer"


def test_rows_that_an_earlier_try_told_of_with_others_join_all_the_same(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had told of the first one, and died. All others lay in one object with that, which was refused."""
    with monkeypatch.context() as small:
        small.setattr(submission, "OBJECT_BYTES", 1)
        desk.dies_at_add(2, monkeypatch)
        batch = desk.submit("", "", "c", "", on_invalid="skip")
    assert desk.died == 1
    desk.fleet.store.remove(keys.batch_file(batch.id, "batch.json"))  # it would name the first try's objects
    desk.submit("", "", "c", "", on_invalid="skip")
    joined = [each.lines for each in desk.fleet.state.batches.objects(batch.id)]
    assert [unpack_lines(lines) for lines in joined] == [[1], [2, 4]]
    desk.submit("", "", "c", "", on_invalid="skip")
    desk.run(batch)
    found = desk.finished(batch)
    assert (desk.lines(found.output), desk.lines(found.error_output)) == ([3], [1, 2, 4])


@pytest.mark.parametrize("again", [{1}, set(), {2}], ids=["as before", "without the cache", "with more"])
def test_a_client_that_died_before_its_own_rows_joined_completes_the_batch_with_the_next_try(
    desk: Desk, again: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that was answered from the cache then, and is not now, was in no segment and in no object."""
    desk.dies_at_add(1, monkeypatch)
    batch = desk.submit("a", "b", "c", "", on_invalid="skip", known={1})
    assert desk.died == 1
    assert desk.submit("a", "b", "c", "", on_invalid="skip", known=again).id == batch.id
    joined = {n for each in desk.fleet.state.batches.objects(batch.id) for n in unpack_lines(each.lines)}
    assert joined == {1, 4} | again
    desk.run(batch)
    found = desk.finished(batch)
    assert (desk.lines(found.output), desk.lines(found.error_output)) == ([1, 2, 3], [4])


def test_a_client_that_died_before_its_own_rows_joined_and_never_comes_back_leaves_a_batch_that_ends(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its segments had succeeded, and it waited for those rows until its time was up."""
    desk.dies_at_add(2, monkeypatch)
    batch = desk.submit("a", "b", "c", "", on_invalid="skip", known={1})
    desk.run(batch)
    found = desk.finished(batch)
    assert (desk.lines(found.output), desk.lines(found.error_output)) == ([1, 2, 3], [4])
    desk.dies_at_add(1, monkeypatch)
    found = desk.finished(desk.submit("d", "", on_invalid="skip", known={1}))
    assert (desk.lines(found.output), desk.lines(found.error_output)) == ([1], [2]), "without a segment"
    assert desk.died == 2


def test_rows_that_a_dead_client_had_refused_or_answered_are_there_when_its_batch_is_stopped(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were in no segment, and so in none of its files."""
    desk.dies_at_add(2, monkeypatch)
    batch = desk.submit("a", "b", "c", "", on_invalid="skip", known={1})
    desk.fleet.state.batches.cancel(batch.id)
    found = desk.finished(batch, BatchStatus.CANCELLED)
    assert (desk.lines(found.output), desk.lines(found.error_output)) == ([1], [2, 3, 4])
    assert found.request_counts.failed == 3


def test_what_an_earlier_life_left_beside_the_segments_is_not_run_again_by_a_retry(desk: Desk) -> None:
    """Its rows had been cut otherwise, since a cache had known some of them: each was retried twice."""
    store = desk.fleet.store
    batch = desk.submit("a", "b", "c", known={1})
    first = keys.segment_object(segment_id(batch.id, 1))
    store.put_new(keys.segment_object(segment_id(batch.id, 2)), store.get(first) or b"")
    desk.fleet.valkey.client().flushall()
    desk.submit("a", "b", "c")
    opened = OpenedBatch.from_json(store.get(keys.batch_file(batch.id, "batch.json")) or b"")
    assert [(info.rows, info.input) for info in opened.segments] == [(3, first)]
    desk.run(batch, failing=[1, 2])
    assert retry(desk.link, desk.finished(batch)).request_counts.total == 2
