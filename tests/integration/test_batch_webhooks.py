"""What the webhook of a batch is told: real server, real store, real receiver; the worker is the test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends.outbox import Outbox
from gristmill.backends.redis import connect
from gristmill.keeper.courier import Courier
from gristmill.keeper.settings import load_keeper_settings
from gristmill.schemas.batch import Batch, BatchOptions, BatchStatus, LineProblem
from gristmill.schemas.errors import InvalidRequest
from gristmill.schemas.settings import Settings
from gristmill.schemas.webhook import new_secret
from openai import OpenAI

from ..support.batch_hand import Hand, open_batch
from ..support.fleet import Fleet
from ..support.receiver import Receiver, receiving
from ..support.valkey import Valkey

SECRET = new_secret()


@pytest.fixture
def fleet(valkey: Valkey, settings: Settings, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(valkey, settings, tmp_path)
    yield fleet
    fleet.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def courier(fleet: Fleet) -> Iterator[Courier]:
    outbox = Outbox(connect(fleet.valkey.url, fleet.settings), clock=fleet.clock)
    settings = load_keeper_settings(webhook_secret=SECRET, webhook_allow="127.0.0.1,::1")
    yield Courier(outbox, settings)
    outbox.close()


def opened(
    fleet: Fleet, receiver: Receiver, *segments: list[int], name: str = "batch_1", **options: Any
) -> Hand:
    """A batch with a webhook, and its worker."""
    fields = {"metadata": {"for": "ö/us"}, "completion_window_s": 600.0}
    given = BatchOptions(webhook=receiver.url(), **options)
    open_batch(fleet.state, fleet.store, segments, id=name, options=given, **fields)
    return Hand(fleet.state, fleet.store, name)


def rounds(fleet: Fleet, count: int = 4) -> None:
    keeper = fleet.batch_rounds()
    for _ in range(count):
        keeper.round()
        keeper.settle()


def told(receiver: Receiver) -> list[tuple[str, str]]:
    """Batch and type of each event, as the openai client reads them."""
    client = OpenAI(api_key="-", webhook_secret=SECRET)
    events: list[Any] = [client.webhooks.unwrap(got.body, got.headers) for got in receiver.got]
    return [(event.data.id, event.type) for event in events]


def test_each_of_a_batchs_four_ends_is_told_and_nothing_else(
    fleet: Fleet, receiver: Receiver, courier: Courier
) -> None:
    failed = opened(fleet, receiver, [1], name="batch_f")
    failed.validate(1, [LineProblem(code="invalid_schema", message="no", line=1)])
    done = opened(fleet, receiver, [1, 2, 3], name="batch_d")
    done.validate(1)
    cancelled = opened(fleet, receiver, [1], name="batch_c")
    cancelled.validate(1)
    rounds(fleet)
    done.run(1, failing=[2])
    fleet.state.batches.cancel("batch_c")
    rounds(fleet)
    expired = opened(fleet, receiver, [1], name="batch_e")
    expired.validate(1)
    fleet.clock.advance(601)
    rounds(fleet)

    courier.drain()
    ends = {"d": "completed", "f": "failed", "c": "cancelled", "e": "expired"}
    assert sorted(told(receiver)) == sorted((f"batch_{n}", f"batch.{end}") for n, end in ends.items())
    bodies = {json.loads(got.body)["data"]["id"]: json.loads(got.body) for got in receiver.got}
    data, record = bodies["batch_d"]["data"], fleet.state.batches.get("batch_d")
    assert record is not None
    assert data == {
        "id": "batch_d",
        "status": "completed",
        "request_counts": {"total": 3, "completed": 2, "failed": 1},
        "usage": {"prompt_tokens": 6, "completion_tokens": 4, "cached_tokens": 0, "total_tokens": 10},
        "metadata": {"for": "ö/us"},
        "output": record.output,
        "error_output": record.error_output,
    }
    for got in receiver.got:
        assert got.headers["webhook-id"] == json.loads(got.body)["id"]


def test_who_asks_for_it_is_told_of_the_start_and_of_progress(
    fleet: Fleet, receiver: Receiver, courier: Courier
) -> None:
    hand = opened(fleet, receiver, list(range(1, 11)), webhook_every_percent=25)
    hand.validate(1)
    rounds(fleet, 1)
    for line in range(1, 11):
        hand.run(1, only=[line])
        fleet.clock.advance(1)
    rounds(fleet)
    fleet.clock.advance(1)
    courier.drain()
    kinds = sorted(kind for _, kind in told(receiver))
    assert kinds == ["batch.completed", "batch.in_progress", *["batch.progress"] * 3]
    counts = [json.loads(got.body)["data"]["request_counts"]["completed"] for got in receiver.got]
    assert sorted(counts) == [0, 3, 5, 8, 10]
    assert len(set(receiver.ids)) == 5


def test_a_final_transition_that_is_said_twice_is_told_once(
    fleet: Fleet, receiver: Receiver, courier: Courier
) -> None:
    hand = opened(fleet, receiver, [1])
    hand.validate(1)
    rounds(fleet, 2)
    hand.run(1)
    batch = fleet.state.batches.get("batch_1")
    assert batch is not None
    assert fleet.state.batches.begin_finalize("batch_1", "me", 60)
    for _ in range(3):
        assert fleet.state.batches.complete(batch, "me", output="o") is BatchStatus.COMPLETED
    courier.drain()
    assert told(receiver) == [("batch_1", "batch.completed")]


def test_a_batch_without_a_webhook_or_with_a_bad_one_leaves_no_event(fleet: Fleet, courier: Courier) -> None:
    open_batch(fleet.state, fleet.store, [[1]])
    hand = Hand(fleet.state, fleet.store)
    hand.validate(1)
    rounds(fleet, 2)
    hand.run(1)
    rounds(fleet)
    assert not [*fleet.valkey.client().scan_iter("gm:webhook*")]
    with pytest.raises(InvalidRequest, match="webhook"):
        Batch.from_python({"id": "b", "model": "m", "options": {"webhook": "ftp://x/"}})
