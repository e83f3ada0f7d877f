"""What jobs leave behind: every key expires or has an owner, and after the result's time nothing is left.

And whose clock counts: half a minute of skew changes nothing that matters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from gristmill.backends.dead import DeadLetters, job_of
from gristmill.engine.tokenizer import Tokenizer
from gristmill.producer import Client
from gristmill.schemas import keys
from gristmill.schemas.job import Job, JobState, new_job_id
from gristmill.schemas.settings import Settings
from gristmill.worker.disposition import Disposition

from ..support.fleet import QUEUE, WORKER, Fleet
from ..support.journal import make_job
from ..support.played import Played
from ..support.valkey import Valkey
from ..support.waiting import wait_until

RESULT_TTL_S = 0.4
MAX_FINAL_BYTES = 8192


@pytest.fixture
def settings(valkey: Valkey, tmp_path: Path) -> Settings:
    (tmp_path / "results").mkdir()
    results = f"file://{tmp_path}/results"
    return Settings(broker_url=valkey.url, results_url=results, result_ttl_s=RESULT_TTL_S)


@pytest.fixture
def fleet(valkey: Valkey, settings: Settings, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(valkey, settings, tmp_path / "results")
    yield fleet
    fleet.close()


@pytest.fixture
def worker(fleet: Fleet, tmp_path: Path, tokenizer: Tokenizer) -> Iterator[Played]:
    """A delivery handler on the fleet; its engine is the test."""
    played = Played(fleet.state, tmp_path / "results", tokenizer)
    played.handler.publisher.start()
    yield played
    played.handler.hand_back(flush_s=0.1)
    played.threads.shutdown()
    played.handler.publisher.stop()


class Courier:
    """Claims from the queue and does what the pool does with what becomes of a delivery."""

    def __init__(self, fleet: Fleet, worker: Played) -> None:
        self.fleet, self.worker = fleet, worker
        self._open: list[tuple[str, object]] = []

    def take(self) -> Job:
        """Deliver the next message."""
        message = self.fleet.claim()
        letters = DeadLetters(self.fleet.valkey.client())
        letters.add("-", "-", message.payload.decode(), tenant="-", reason="-", job_id=None)
        letter = letters.get("-", "-")
        assert letter is not None
        letters.remove("-", "-")
        job = job_of(letter)
        self._open.append((message.tag, self.worker.deliver(job)))
        return job

    def settle(self) -> None:
        """Every delivery is over."""
        for tag, future in self._open:
            assert future.result(20) is Disposition.ACK  # type: ignore[attr-defined]
            assert self.fleet.queue.ack(tag) == [True]
        self._open.clear()


def run_every_end(fleet: Fleet, worker: Played) -> dict[str, Job]:
    """A job for each way to end."""
    courier, keeper, ended = Courier(fleet, worker), fleet.keeper(), dict[str, Job]()

    def submit(**fields: object) -> Job:
        now = fleet.clock.now
        return fleet.submit(make_job(**{"submitted_at": now, "expires_at": now + 1000, **fields}))

    for name in ("succeeded", "failed", "cancelled running", "expired running"):
        job = ended[name] = submit(**({"prompt_ids": (10**6,), "prompt": None} if name == "failed" else {}))
        courier.take()
        if name != "failed":
            worker.running(job)
            worker.step(job, 28)
    worker.step(ended["succeeded"], 29, finish="length")
    fleet.state.cancel(ended["cancelled running"].id)
    worker.handler.cancel(ended["cancelled running"].id)
    worker.handler.expire(time.monotonic() + 1e6)
    courier.settle()

    ended["cancelled queued"] = submit(tenant="acme")
    fleet.state.cancel(ended["cancelled queued"].id)
    ended["expired queued"] = submit(expires_at=fleet.clock.now + 5)
    fleet.clock.advance(6)
    keeper.round()

    twice = ended["duplicate"] = submit(id=new_job_id(), idempotency_key="k")
    fleet.submit(twice)
    for token in (True, False):  # the second message finds a final state
        courier.take()
        if token:
            worker.running(twice)
            worker.step(twice, 28, finish="length")
        courier.settle()

    dead = ended["dead"] = submit()
    fleet.queue.bury(fleet.claim().tag, "why not")
    keeper.round()
    with Client(fleet.settings) as client:
        again = ended["requeued"] = client.dead.requeue(client.dead.find(dead.id, queue=QUEUE))
    courier.take()
    worker.running(again)
    worker.step(again, 28, finish="length")
    courier.settle()
    keeper.round()
    return ended


EXPECTED = {
    "succeeded": JobState.SUCCEEDED,
    "failed": JobState.FAILED,
    "cancelled running": JobState.CANCELLED,
    "expired running": JobState.EXPIRED,
    "cancelled queued": JobState.CANCELLED,
    "expired queued": JobState.EXPIRED,
    "duplicate": JobState.SUCCEEDED,
    "dead": JobState.FAILED,
    "requeued": JobState.SUCCEEDED,
}


def contents(client: redis.Redis, key: bytes) -> str:
    """Whatever a key holds, as text to search in."""
    match client.type(key):
        case b"string":
            return str(client.get(key))
        case b"hash":
            return str(client.hgetall(key))
        case b"list":
            return str(client.lrange(key, 0, -1))
        case b"set":
            return str(client.smembers(key))
        case b"zset":
            return str(client.zrange(key, 0, -1))
        case b"stream":
            return str(client.xrange(key))
        case other:
            raise AssertionError(other)


def test_after_every_kind_of_end_each_key_expires_or_has_an_owner(
    fleet: Fleet, worker: Played, valkey: Valkey
) -> None:
    fleet.state.register("w1", WORKER, 15)
    ended = run_every_end(fleet, worker)
    assert {name: worker.result(job.id).state for name, job in ended.items()} == EXPECTED

    client = valkey.client()
    for key in client.scan_iter("gm:*"):
        assert client.pttl(key) != -1 or key.decode() in keys.OWNED, f"{key!r} stays for ever"

    names = [key for job in ended.values() for key in (keys.state(job.id), keys.log(job.id))]
    wait_until(lambda: not client.exists(*names), 10, "their time is over")
    ids = [job.id for job in ended.values()]
    for key in client.scan_iter("*"):
        text = key.decode() + contents(client, key)
        assert not [job_id for job_id in ids if job_id in text], f"{key!r} still names a job"


def test_a_waiting_job_is_small_and_a_finished_one_not_much_larger(
    fleet: Fleet, worker: Played, valkey: Valkey
) -> None:
    """The numbers stand in schemas/README.md: what 64 tokens leave in Redis, by the server's own account."""
    client = valkey.client()
    fleet.state._settings = fleet.settings.model_copy(update={"result_ttl_s": 600})

    def used(job: Job) -> int:
        return sum(client.memory_usage(key, samples=0) or 0 for key in (keys.state(job.id), keys.log(job.id)))

    job = make_job()
    fleet.state.submit(job)
    assert used(job) < 1024
    courier = Courier(fleet, worker)
    fleet.submit(job)
    courier.take()
    worker.running(job)
    for token in range(64):
        worker.step(job, 100 + token, **({"finish": "length"} if token == 63 else {}))
    courier.settle()
    assert used(job) < MAX_FINAL_BYTES


@pytest.mark.parametrize("skew_s", [-30.0, 30.0])
def test_half_a_minute_of_skew_changes_nothing_that_matters(
    fleet: Fleet, worker: Played, skew_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client, worker and keeper are half a minute off; the servers are right."""
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + skew_s)
    monkeypatch.setattr(fleet, "clock", right)
    fleet.state._clock = right  # pyright: ignore[reportPrivateUsage]
    fleet.state.register("w1", WORKER, 15)
    with Client(fleet.settings) as client:
        assert client.models()
        job = client.submit("hello", deadline_s=20, model="tiny").job
        short = client.submit("hello", deadline_s=0.3, model="tiny").job
        assert job is not None
        assert short is not None
        assert client.submit("hello", model="tiny").warnings == (), "the worker counts as alive"
    courier = Courier(fleet, worker)
    courier.take()
    worker.running(job)
    worker.handler.expire(time.monotonic())
    worker.step(job, 28)
    keeper = fleet.keeper()
    keeper.round()
    worker.step(job, 29, finish="length")
    courier.settle()
    result = worker.result(job.id)
    assert (result.state, result.usage.completion_tokens) == (JobState.SUCCEEDED, 2)
    assert (result.timings.queue_s, result.timings.e2e_s) >= (0, 0)
    wait_until(lambda: keeper.round().ended, 5, "the other's deadline, by the server's clock")
    assert worker.result(short.id).state is JobState.EXPIRED
    assert abs(fleet.queue.depth(QUEUE) - 1) == 0, "the third one waits"
