"""What gc takes away and what it leaves; and a batch made again after its record was lost."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends.calls import EXPIRY_GRACE_S
from gristmill.backends.recovery import recover
from gristmill.backends.retention import LEFT_OVER_S, find_old, remove
from gristmill.producer.cli import cli
from gristmill.producer.console import run_guarded
from gristmill.schemas import keys
from gristmill.schemas.batch import DAY_S, Batch, BatchOptions, BatchStatus, OpenedBatch
from gristmill.schemas.errors import InvalidRequest, JobNotFound
from gristmill.schemas.events import End
from gristmill.schemas.job import DEFAULT_JOB_TTL_S, JobState
from gristmill.schemas.settings import Settings

from ..support.batch_hand import Hand, numbers, open_batch
from ..support.dying import Died, Dying
from ..support.fleet import Fleet
from ..support.journal import make_job
from ..support.s3 import S3Server
from ..support.valkey import Valkey

BATCH = "batch_1"


@pytest.fixture
def fleet(valkey: Valkey, settings: Settings, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(valkey, settings, tmp_path / "results")
    fleet.store.root.mkdir()
    yield fleet
    fleet.close()


def old(fleet: Fleet, days: float = 0.0, **settings: Any) -> dict[str, str]:
    """What would go in so many days: kind by name."""
    chosen = fleet.settings.model_copy(update=settings)
    found = find_old(fleet.store, fleet.state, chosen, time.time() + days * DAY_S)
    return {each.name: each.kind for each in found}


def opened(fleet: Fleet, segments: list[list[int]], **fields: Any) -> Batch:
    """As a client does it: what was opened is in the store as well."""
    batch = open_batch(fleet.state, fleet.store, segments, **fields)
    infos = tuple(sorted(fleet.state.batches.segments(batch.id), key=lambda info: info.id))
    body = OpenedBatch(batch=batch, segments=infos).to_json().encode()
    fleet.store.put_new(keys.batch_file(batch.id, "batch.json"), body)
    return batch


def begun(fleet: Fleet, *segments: list[int], **fields: Any) -> Hand:
    batch = opened(fleet, list(segments), **fields)
    hand = Hand(fleet.state, fleet.store, batch.id)
    for number in range(1, len(segments) + 1):
        hand.validate(number)
    assert fleet.state.batches.begin(batch) is BatchStatus.IN_PROGRESS
    return hand


def finished(fleet: Fleet) -> Batch:
    keeper = fleet.batch_rounds()
    keeper.round()
    keeper.settle()
    found = fleet.state.batches.get(BATCH)
    assert found is not None
    assert found.status is BatchStatus.COMPLETED
    return found


def lose_everything(fleet: Fleet) -> None:
    """The server comes back without its data."""
    fleet.valkey.client().flushall()


# ---- retention


def test_results_of_jobs_go_only_if_asked_for_and_only_of_jobs_that_have_ended(fleet: Fleet) -> None:
    ended, runs, unknown = make_job(), make_job(), make_job()
    for job in (ended, runs, unknown):
        fleet.store.put_new(keys.result_object(job.id), b"{}")
    fleet.state.submit(ended)
    fleet.state.finish(ended.id, End(state=JobState.SUCCEEDED))
    fleet.state.submit(runs)
    assert old(fleet, 1000) == {}
    assert old(fleet, 29, results_keep_s=30 * DAY_S) == {}
    assert old(fleet, 31, results_keep_s=30 * DAY_S) == {
        keys.result_object(job.id): "result" for job in (ended, unknown)
    }


def test_a_large_request_goes_once_its_job_cannot_run_any_more(fleet: Fleet) -> None:
    job = make_job()
    fleet.store.put_new(keys.request_object(job.id), b"{}")
    assert old(fleet, 14) == {}
    assert old(fleet, 16) == {keys.request_object(job.id): "request"}


def test_a_batch_goes_whole_when_its_retention_is_over_and_not_while_it_is_known(fleet: Fleet) -> None:
    hand = begun(fleet, [1, 2], options=BatchOptions(retention_s=3 * DAY_S))
    hand.run(1)
    finished(fleet)
    assert old(fleet, 100) == {}
    lose_everything(fleet)
    assert old(fleet, 2.9) == {}
    (batch,) = find_old(fleet.store, fleet.state, fleet.settings, time.time() + 3.1 * DAY_S)
    assert (batch.kind, batch.name, batch.objects) == ("batch", "batches/batch_1/", 5)
    remove(fleet.store, batch)
    assert list(fleet.store.root.rglob("*")) == []


def test_a_batch_stays_for_as_long_as_one_that_makes_its_failed_rows_again(fleet: Fleet) -> None:
    opened(fleet, [[1]], id="batch_1", options=BatchOptions(retention_s=1 * DAY_S))
    opened(fleet, [[1]], id="batch_2", retry_of="batch_1", options=BatchOptions(retention_s=1 * DAY_S))
    opened(fleet, [[1]], id="batch_3", retry_of="batch_2", options=BatchOptions(retention_s=9 * DAY_S))
    lose_everything(fleet)
    assert old(fleet, 5) == {}
    assert set(old(fleet, 11)) == {f"batches/batch_{number}/" for number in (1, 2, 3)}


def test_a_batch_that_was_lost_before_its_end_is_kept_for_as_long_as_it_might_be_recovered(
    fleet: Fleet,
) -> None:
    begun(fleet, [1, 2]).run(1, only=[1])
    lose_everything(fleet)
    assert old(fleet, 30.5) == {}
    assert old(fleet, 31.5) == {"batches/batch_1/": "batch"}


def test_segments_that_never_became_a_batch_go_after_a_week(fleet: Fleet) -> None:
    fleet.store.put_new(keys.segment_object("batch_9.s1"), b"{}\n")
    assert old(fleet, 6) == {}
    assert old(fleet, 8) == {"batches/batch_9/": "batch"}


def test_a_batch_of_another_version_is_left_alone(fleet: Fleet) -> None:
    fleet.store.put_new(keys.batch_file("batch_9", "batch.json"), b'{"v":2}')
    assert old(fleet, 10_000) == {}


def test_uploads_that_never_ended_go_after_a_day_and_no_others(fleet: Fleet) -> None:
    folder = fleet.store.root / "batches" / "batch_1"
    folder.mkdir(parents=True)
    left = folder / ".output.jsonl.0123456789abcdef"
    left.write_bytes(b"half")
    assert old(fleet, 0) == {}
    os.utime(left, (time.time() - LEFT_OVER_S - 60,) * 2)
    (found,) = find_old(fleet.store, fleet.state, fleet.settings, time.time())
    assert (found.kind, found.name, found.size) == ("left_over", "batches/batch_1/output.jsonl", 4)
    remove(fleet.store, found)
    assert not left.exists()


def test_gc_says_what_would_go_and_takes_it_away_when_told_to(
    fleet: Fleet, capsys: pytest.CaptureFixture[str]
) -> None:
    job = make_job()
    name = keys.result_object(job.id)
    fleet.store.put_new(name, b"{}")
    os.utime(fleet.store.root / name, (time.time() - 31 * DAY_S,) * 2)
    url = fleet.store.url
    command = ["gc", "--broker", fleet.valkey.url, "--results", url, "--results-older-than", "30d", "--json"]
    assert run_guarded(cli, [*command, "--dry-run"]) == 0
    told, total = map(json.loads, capsys.readouterr().out.splitlines())
    assert (total["found"], total["bytes"], total["removed"]) == (1, 2, False)
    assert (told["kind"], told["name"], told["bytes"], told["removed"]) == ("result", name, 2, False)
    assert fleet.store.exists(name)
    assert run_guarded(cli, command) == 0
    assert [json.loads(line)["removed"] for line in capsys.readouterr().out.splitlines()] == [True, True]
    assert not fleet.store.exists(name)
    assert run_guarded(cli, command) == 0
    assert json.loads(capsys.readouterr().out)["found"] == 0, "nothing is an answer, too"
    assert run_guarded(cli, [*command[:-2], "soon"]) == 2


def test_many_objects_are_removed_from_s3_at_once(s3: S3Server) -> None:
    from gristmill.backends.store import open_store

    store = open_store(s3.url, s3.settings())
    names = [f"batches/b1/results/{n}.jsonl" for n in range(20)]
    for name in names:
        store.put_new(name, b"x")
    store.remove_many([*names[:15], "batches/b1/never-there"])
    store.remove_many([])
    assert sorted(store.list()) == sorted(names[15:])
    assert sum(each.size for each in store.stored("batches/")) == 5


def test_the_rules_for_buckets_are_rules_and_leave_batches_their_time(s3: S3Server) -> None:
    rules = json.loads((Path(__file__).parents[2] / "infra" / "s3" / "lifecycle.json").read_text())
    s3.client.put_bucket_lifecycle_configuration(Bucket=s3.bucket, LifecycleConfiguration=rules)
    days = {rule["ID"]: rule["Expiration"]["Days"] for rule in rules["Rules"] if "Expiration" in rule}
    batch = Batch(id="b", model="m")
    assert days["gristmill-batches"] * DAY_S > batch.options.retention_s + batch.completion_window_s
    assert days["gristmill-large-requests"] * DAY_S > DEFAULT_JOB_TTL_S + EXPIRY_GRACE_S


# ---- recovery


def test_a_lost_batch_goes_on_where_its_objects_say_and_loses_nothing(fleet: Fleet) -> None:
    hand = begun(fleet, [3, 1, 2], [5, 4, 6])
    hand.run(1, failing=[2])
    claim = hand.claim(2)
    hand.accept(claim, hand.put(claim, [4]))
    hand.put(claim, [5])  # written, and the server was lost before it could be accepted
    before = fleet.state.batches.get(BATCH)
    assert before is not None
    lose_everything(fleet)
    found = recover(fleet.state.batches, fleet.store, BATCH)
    assert (found.rows, found.total, found.doubled) == (5, 6, 0)
    batch = fleet.state.batches.get(BATCH)
    assert batch is not None
    assert (batch.status, batch.paused) == (BatchStatus.VALIDATING, False)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (4, 1)
    assert batch.usage.completion_tokens == before.usage.completion_tokens + 2
    hand.validate(1)
    hand.validate(2)
    fleet.batch_rounds().round()
    assert hand.lines(hand.claim(2)) == [6]
    hand.run(1)
    hand.run(2)
    done = finished(fleet)
    assert sorted(numbers(fleet.store.get(done.output or ""))) == [1, 3, 4, 5, 6]
    assert numbers(fleet.store.get(done.error_output or "")) == [2]


def test_a_row_that_two_attempts_finished_is_there_once_and_answered(fleet: Fleet) -> None:
    hand = begun(fleet, [1, 2, 3])
    first = hand.claim(1)
    hand.put(first, [1], "errors")
    hand.put(first, [1, 2])
    second = hand.claim(1)
    hand.put(second, [2, 3])
    lose_everything(fleet)
    found = recover(fleet.state.batches, fleet.store, BATCH)
    assert (found.rows, found.doubled) == (3, 2)
    hand.validate(1)
    keeper = fleet.batch_rounds()
    keeper.round()
    done = finished(fleet)
    assert sorted(numbers(fleet.store.get(done.output or ""))) == [1, 2, 3]
    assert done.error_output is None


def test_rows_that_a_keeper_gave_up_on_run_again(fleet: Fleet) -> None:
    hand = begun(fleet, [1, 2], completion_window_s=60.0)
    hand.run(1, only=[1])
    fleet.clock.advance(61)
    keeper = fleet.batch_rounds()
    keeper.round()
    keeper.round()
    keeper.settle()
    fleet.store.remove(keys.batch_file(BATCH, "manifest.json"))
    lose_everything(fleet)
    assert [*fleet.store.list(keys.keeper_results(BATCH))]
    assert recover(fleet.state.batches, fleet.store, BATCH).rows == 1
    assert not fleet.store.exists(keys.batch_file(BATCH, "errors.jsonl"))
    assert [*fleet.store.list(keys.keeper_results(BATCH))] == [], "a later merge would find its parts taken"


def test_recovering_may_be_interrupted_anywhere_and_repeated(fleet: Fleet) -> None:
    hand = begun(fleet, [1, 2, 3])
    claim = hand.claim(1)
    for line in (1, 2):
        hand.put(claim, [line])
    for calls in range(1, 100):
        lose_everything(fleet)
        life = [calls]
        batches: Any = Dying(fleet.state.batches, 0, life)
        store: Any = Dying(fleet.store, 0, life)
        with suppress(Died):
            recover(batches, store, BATCH)
        recover(fleet.state.batches, fleet.store, BATCH)
        batch = fleet.state.batches.get(BATCH)
        assert batch is not None
        assert (batch.request_counts.completed, batch.paused) == (2, False)
        if life[0] > 0:
            return
    raise AssertionError("it never came to an end")


def test_the_command_says_what_goes_on(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> None:
    begun(fleet, [1, 2], [3]).run(1, only=[2])
    lose_everything(fleet)
    command = [
        "batch",
        "recover",
        BATCH,
        "--broker",
        fleet.valkey.url,
        "--results",
        fleet.store.url,
        "--json",
    ]
    assert run_guarded(cli, command) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["total"], told["ended"], told["left"]) == (3, 1, 2)
    assert run_guarded(cli, [*command[:2], "batch_2", *command[3:]]) == 2


def test_what_is_not_lost_is_not_recovered(fleet: Fleet) -> None:
    hand = begun(fleet, [1])
    with pytest.raises(InvalidRequest, match="is known and in_progress"):
        recover(fleet.state.batches, fleet.store, BATCH)
    hand.run(1)
    finished(fleet)
    lose_everything(fleet)
    with pytest.raises(InvalidRequest, match=r"is final.*manifest\.json"):
        recover(fleet.state.batches, fleet.store, BATCH)
    with pytest.raises(JobNotFound):
        recover(fleet.state.batches, fleet.store, "batch_2")
