"""What a task returns is what becomes of its delivery, through the real Celery and the real broker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery import Celery
from gristmill.backends import broker
from gristmill.backends.dead import DeadLetters
from gristmill.schemas.settings import Settings
from gristmill.worker.disposition import MAX_ATTEMPTS, Disposition

from ..support.consumer import Consumers, consumers
from ..support.valkey import Valkey
from ..support.waiting import wait_until

LEASE_S = 3.0


@pytest.fixture
def app(valkey: Valkey) -> Iterator[Celery]:
    app = broker.make_app(Settings(broker_url=valkey.url))
    yield app
    broker.close(app)


@pytest.fixture
def crowd(valkey: Valkey, tmp_path: Path) -> Iterator[Consumers]:
    with consumers(valkey.url, tmp_path, lease_s=LEASE_S, job_s=0) as crowd:
        crowd.start()
        wait_until(lambda: crowd.notes("ready"), 30, "the consumer is ready")
        yield crowd


def test_each_disposition_is_carried_out(app: Celery, crowd: Consumers, valkey: Valkey) -> None:
    """Celery's own class acknowledged all of them: what was handed back was lost."""
    for how in Disposition:
        broker.publish(app, "q", how.value, f"job_{how.value}")
    again = [f"job_{how.value}" for how in (Disposition.REQUEUE, Disposition.DROP)]
    every = [f"job_{how.value}" for how in Disposition]
    wait_until(lambda: sorted(crowd.jobs("end")) == sorted([*every, *again]), 20, "two come again")
    with broker.queues_of(app) as queues:
        wait_until(lambda: not queues.claimed(), 10, "nothing stays claimed")
        assert queues.depth("q") == 0
    starts = {(note["job"], note["n"]): note["at"] for note in crowd.notes("start")}
    assert starts["job_requeue", 2] - starts["job_requeue", 1] < LEASE_S / 2, "handed back at once"
    assert starts["job_drop", 2] - starts["job_drop", 1] > LEASE_S * 0.6, "left to its lease"
    letters = list(DeadLetters(valkey.client()).letters("q"))
    assert [(letter.job_id, letter.reason) for letter in letters] == [("job_bury", MAX_ATTEMPTS)]
