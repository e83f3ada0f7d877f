"""Consumers and brokers that are killed, frozen, cut off: nothing is lost, nothing runs twice in vain."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from celery import Celery
from gristmill.backends import broker
from gristmill.backends.message_queue import MessageQueue
from gristmill.schemas import keys
from gristmill.schemas.settings import Settings

from ..support.consumer import Consumers, consumers
from ..support.valkey import Valkey
from ..support.waiting import wait_until

SEED = 20261122


@pytest.fixture
def app(valkey: Valkey) -> Iterator[Celery]:
    app = broker.make_app(Settings(broker_url=valkey.url))
    yield app
    broker.close(app)


def publish(app: Celery, count: int, first: int = 0) -> list[str]:
    jobs = [f"job-{number}" for number in range(first, first + count)]
    for job in jobs:
        broker.publish(app, "q", "{}", job)
    return jobs


def nothing_left(valkey: Valkey) -> Callable[[], bool]:
    """Neither waiting nor claimed, looked at in one instant."""
    client = valkey.client()

    def check() -> bool:
        try:
            return client.pipeline().hlen(keys.CLAIMS).zcard(keys.queue_tenants("q")).execute() == [0, 0]
        except redis.RedisError:
            return False

    return check


def started(crowd: Consumers, count: int) -> Callable[[], bool]:
    return lambda: len(crowd.notes("start")) >= count


def test_kills_between_claim_and_acknowledgement_lose_nothing(
    valkey: Valkey, app: Celery, tmp_path: Path
) -> None:
    draw = random.Random(SEED)
    jobs = publish(app, 200)
    with consumers(valkey.url, tmp_path, lease_s=1.0, job_s=0.02) as crowd:
        for kill in range(3):
            victim = crowd.start()
            seen = len(crowd.notes("start"))
            wait_until(started(crowd, seen + draw.randint(1, 40)), 20, f"kill {kill}: work is in hand")
            victim.kill()
        crowd.start()
        wait_until(nothing_left(valkey), 30, f"everything is done (seed {SEED})")
        assert set(crowd.jobs("end")) == set(jobs)
        again = [note for note in crowd.notes("start") if note["n"] > 1]
        assert again, "no kill hit a claimed message: the test shows nothing"
        assert max(note["n"] for note in again) <= 5


def test_a_message_of_a_killed_consumer_comes_back_within_its_lease(
    valkey: Valkey, app: Celery, tmp_path: Path
) -> None:
    with consumers(valkey.url, tmp_path, lease_s=2.0, job_s=60) as crowd:
        crowd.start(), crowd.start()
        wait_until(lambda: len(crowd.notes("ready")) == 2, 20, "both wait")
        (job,) = publish(app, 1)
        wait_until(started(crowd, 1), 20, "one claims it")
        (first,) = crowd.notes("start")
        os.kill(first["pid"], signal.SIGKILL)
        wait_until(started(crowd, 2), 20, "the other claims it")
        second = crowd.notes("start")[1]
        assert (first["job"], second["job"], second["n"]) == (job, job, 2)
        assert second["at"] - first["at"] < 2.0 + 1.5, "a lease, a sweep, and a moment"


def test_a_zombie_can_neither_renew_nor_acknowledge(valkey: Valkey, app: Celery, tmp_path: Path) -> None:
    """Stopped past its lease, then continued: it cannot renew, and its acknowledgement is a no-op."""
    with consumers(valkey.url, tmp_path, lease_s=1.0, job_s=4) as crowd:
        zombie = crowd.start()
        publish(app, 1)
        wait_until(started(crowd, 1), 20, "it is claimed")
        zombie.send_signal(signal.SIGSTOP)
        heir = crowd.start()
        wait_until(lambda: crowd.notes("start", heir.pid), 20, "the heir has it")
        zombie.send_signal(signal.SIGCONT)
        old, new = crowd.notes("start")
        wait_until(lambda: crowd.notes("lost", zombie.pid), 10, "the zombie learns that it lost the claim")
        wait_until(lambda: crowd.notes("end", zombie.pid), 10, "the zombie ends its job, and acknowledges")
        assert crowd.notes("end", heir.pid) or valkey.client().hexists(keys.CLAIMS, new["tag"])
        wait_until(lambda: crowd.notes("end", heir.pid), 10, "the heir finishes undisturbed")
        wait_until(nothing_left(valkey), 5, "the heir's acknowledgement counts")
        assert not crowd.notes("lost", heir.pid)
        assert old["tag"] != new["tag"]
        assert len(crowd.notes("start")) == 2


def test_cut_connections_rerun_nothing(valkey: Valkey, app: Celery, tmp_path: Path) -> None:
    with consumers(valkey.url, tmp_path, lease_s=1.5, job_s=3) as crowd:
        crowd.start()
        jobs = publish(app, 8)
        wait_until(started(crowd, 8), 20, "all run")
        valkey.drop_clients()
        jobs += publish(app, 2, first=8)
        wait_until(started(crowd, 10), 20, "it claims again after reconnecting")
        valkey.drop_clients()
        wait_until(nothing_left(valkey), 20, "acknowledged through the new connection")
        assert Counter(crowd.jobs("start")) == Counter(jobs)


def test_a_killed_broker_comes_back_with_every_job_and_reruns_none_of_those_in_hand(
    valkey: Valkey, app: Celery, tmp_path: Path
) -> None:
    with consumers(valkey.url, tmp_path, lease_s=1.5, job_s=4) as crowd:
        crowd.start()
        jobs = publish(app, 20)  # 16 threads: some wait
        wait_until(started(crowd, 16), 20, "all threads are busy")
        valkey.kill()
        wait_until(lambda: "lease.not_renewed" in (tmp_path / "consumer.log").read_text(), 10, "it is missed")
        valkey.restart()
        wait_until(nothing_left(valkey), 40, "all done")
        assert Counter(crowd.jobs("start")) == Counter(jobs)
        assert not crowd.notes("lost")


def test_a_broker_frozen_for_two_leases_reruns_nothing(valkey: Valkey, app: Celery, tmp_path: Path) -> None:
    with consumers(valkey.url, tmp_path, lease_s=1.0, job_s=4) as crowd:
        crowd.start()
        other = crowd.start()
        jobs = publish(app, 6)
        wait_until(started(crowd, 6), 20, "all run")
        valkey.freeze()
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(2.0)  # two leases pass
        valkey.thaw()
        wait_until(nothing_left(valkey), 30, "all done")
        assert Counter(crowd.jobs("start")) == Counter(jobs)


def test_a_warm_shutdown_leaves_no_claim_behind(valkey: Valkey, app: Celery, tmp_path: Path) -> None:
    with consumers(valkey.url, tmp_path, lease_s=30, job_s=0.3) as crowd:
        worker = crowd.start()
        jobs = publish(app, 40)
        wait_until(started(crowd, 5), 20, "it runs")
        worker.terminate()
        worker.wait(20)
        queue = MessageQueue(valkey.client(), lease_s=1)
        assert queue.claimed() == 0, "finished ones are acknowledged, the others handed back"
        assert len(crowd.jobs("end")) + queue.depth("q") == len(jobs), "nothing finished was handed back"
