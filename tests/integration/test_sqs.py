"""The SQS transport over HTTP, on moto and on ministack, with a real Valkey for state."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import kombu
import pytest
from celery import Celery
from gristmill.backends import broker
from gristmill.backends.dead import job_of, open_dead
from gristmill.backends.gate import Gate
from gristmill.backends.sqs_dead import SqsDead
from gristmill.backends.state import open_state
from gristmill.backends.store import open_store
from gristmill.keeper.keeper import open_keeper
from gristmill.keeper.settings import KeeperSettings
from gristmill.producer import Client
from gristmill.schemas import keys
from gristmill.schemas.errors import BrokerUnavailable, InvalidRequest, Misconfigured
from gristmill.schemas.job import JobState
from gristmill.schemas.settings import Settings
from kombu.message import Message

from ..support.journal import make_job
from ..support.s3 import Proxy
from ..support.sqs import SqsServer
from ..support.valkey import Valkey
from ..support.waiting import wait_until


class Inbox:
    """A consumer in this process: what it was given, in order, nothing acknowledged by itself."""

    def __init__(self, settings: Settings, queues: list[str], claimable: Callable[[], Any] | None) -> None:
        self.gate = Gate(claimable) if claimable else None
        self.app = broker.make_app(settings, gate=self.gate, queue_names=queues)
        self.claims: Any = broker.claims_of(self.app)
        self.connection = self.app.connection_for_read()
        self.messages: list[Message] = []
        kombu.Consumer(
            self.connection,
            [kombu.Queue(name, kombu.Exchange("")) for name in queues],
            on_message=self.messages.append,
            accept=["json"],
            auto_declare=False,
        ).consume()

    def turn(self) -> None:
        try:
            self.connection.drain_events(timeout=0.05)
        except TimeoutError:
            return

    def read(self, count: int, timeout_s: float = 15.0) -> list[str]:
        """Job ids, once ``count`` have come in all."""
        wait_until(lambda: self.turn() or len(self.messages) >= count, timeout_s, f"{count} messages")
        return self.ids

    @property
    def ids(self) -> list[str]:
        return [message.headers["id"] for message in self.messages]

    def close(self) -> None:
        self.connection.close()
        broker.close(self.app)


class Bench:
    """Queues on one emulator, and who sends to and reads from them."""

    def __init__(self, server: SqsServer, settings: Settings, **options: Any) -> None:
        self.server, self.settings = server, settings
        self.interactive, self.normal, self.batch = server.queues
        server.create(settings, **options)
        self.app: Celery = broker.make_app(settings)
        self._inboxes: list[Inbox] = []

    def put(self, job_id: str, queue: str | None = None, **fields: Any) -> None:
        broker.publish(self.app, queue or self.normal, json.dumps({"id": job_id}), job_id, **fields)

    def inbox(self, claimable: Callable[[], Any] | None = None, **fields: Any) -> Inbox:
        settings = self.settings.model_copy(update=fields)
        self._inboxes.append(Inbox(settings, self.server.queues, claimable))
        return self._inboxes[-1]

    def close(self) -> None:
        for inbox in self._inboxes:
            inbox.close()
        broker.close(self.app)


@pytest.fixture
def bench(sqs: SqsServer, valkey: Valkey, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(sqs, sqs.settings(valkey, tmp_path))
    yield bench
    bench.close()


def test_what_is_acknowledged_is_gone_and_what_is_handed_back_comes_again(bench: Bench) -> None:
    bench.put("job-1", tenant="ann")
    box = bench.inbox()
    box.read(1)
    first = box.messages[0]
    assert first.payload == [['{"id": "job-1"}'], {}, first.payload[2]]
    assert first.delivery_info["tenant"] == "ann"
    assert not first.delivery_info["redelivered"]
    first.requeue()
    box.read(2)
    assert box.messages[1].properties["delivery_count"] == 2
    box.messages[1].ack()
    wait_until(lambda: bench.server.counts(bench.normal) == (0, 0), 5, "it is deleted")


def test_a_lease_in_hand_is_renewed_and_one_left_runs_out(bench: Bench) -> None:
    bench.put("kept"), bench.put("left")
    box, other = bench.inbox(lambda: bench.server.queues if len(box.messages) < 2 else ()), bench.inbox()
    box.read(2)
    left = box.messages[box.ids.index("left")]
    left.channel.qos.leave(left.delivery_tag)
    leases_end = time.monotonic() + 4

    def come() -> bool:
        assert box.claims.renew() == []
        box.turn()
        other.turn()
        return bool(other.messages) and time.monotonic() > leases_end

    wait_until(come, 25, "the left one comes again")  # maybe first to a long poll of the box that has no room
    assert other.ids == ["left"]
    left.ack()  # its handle is spent, and the message another's
    other.messages[0].ack()
    wait_until(lambda: bench.server.counts(bench.normal) == (0, 1), 5, "only the renewed one is left")


def test_what_is_handed_back_at_the_end_is_free_at_once(bench: Bench) -> None:
    """A long poll of the leaving process was given the message: it was nobody's until the lease ran out."""
    room = [True]
    bench.put("job-1")
    box = bench.inbox(lambda: bench.server.queues if room else ())
    box.read(1)
    room.clear()
    box.gate.poke()
    box.turn()
    box.claims.hand_back()
    box.close()
    assert bench.server.counts(bench.normal) == (1, 0)


def test_more_urgent_queues_come_first_and_a_closed_gate_claims_nothing(bench: Bench) -> None:
    for number, queue in enumerate([bench.batch, bench.normal, bench.interactive] * 2):
        bench.put(f"{queue}-{number}", queue)
    box = bench.inbox(lambda: ())
    box.turn(), box.turn()
    assert len(box.claims) == 0
    box.gate.claimable = lambda: bench.server.queues
    box.gate.poke()
    got = box.read(6)
    assert [job.rpartition("-")[0] for job in got] == [q for q in bench.server.queues for _ in range(2)]


def test_a_message_wakes_an_idle_consumer_at_once(bench: Bench) -> None:
    box = bench.inbox()
    box.turn(), box.turn()
    bench.put("job-1")
    sent = time.monotonic()
    box.read(1)
    assert time.monotonic() - sent < 12, "a long poll answers when a message comes, not when it ends"


def test_a_message_nobody_can_read_ends_among_the_dead_and_acknowledged_by_nobody(
    sqs: SqsServer, valkey: Valkey, tmp_path: Path
) -> None:
    settings = sqs.settings(valkey, tmp_path)
    bench = Bench(sqs, settings, max_receives=4)
    sqs.client.send_message(QueueUrl=sqs.queue_url(bench.normal), MessageBody="no message of ours")
    bench.put("job-1")
    box = bench.inbox()

    def only_one_is_left() -> bool:
        box.turn()
        while box.messages:  # the same one again, if its lease ran out first: SQS then forgot the old receipt
            message = box.messages.pop()
            assert message.headers["id"] == "job-1"
            message.ack()
        return sum(sqs.counts(bench.normal)) + sum(sqs.counts(sqs.dead)) == 1

    wait_until(only_one_is_left, 15, "the one that could be read is deleted")

    def given_up() -> bool:
        box.turn()
        # ministack looks at the count when a receive begins, and one of ours lasts 20 s.
        sqs.client.receive_message(
            QueueUrl=sqs.queue_url(bench.normal), VisibilityTimeout=0, WaitTimeSeconds=0
        )
        return sqs.counts(sqs.dead)[0] == 1

    wait_until(given_up, 25, "SQS gives it up", poll_s=0.2)
    letters = open_dead(settings)
    dead = SqsDead(settings, letters)
    assert dead.due([sqs.model]) == [sqs.model]
    assert not dead.drain(sqs.model)
    assert dead.due([sqs.model]) == []
    (letter,) = letters.letters(sqs.dead)
    assert (letter.payload, letter.job_id) == ("no message of ours", None)
    dead.close(), letters.close()
    assert sqs.counts(sqs.dead) == (0, 0)
    bench.close()


def test_a_buried_message_is_a_dead_letter_with_its_job(bench: Bench) -> None:
    job = make_job(metadata={"note": "x" * 70_000})
    broker.publish(bench.app, bench.normal, job.to_json(), job.id, "ann")
    name = keys.request_object(job.id)
    store = open_store(bench.settings.results, bench.settings)
    assert json.loads(store.get(name) or b"")["id"] == job.id, "too large for a message"
    box = bench.inbox()
    box.read(1)
    assert box.messages[0].payload[0] == [job.to_json()]
    box.messages[0].channel.qos.bury(box.messages[0].delivery_tag, "max_attempts")
    wait_until(lambda: bench.server.counts(bench.normal) == (0, 0), 5, "it is taken out of SQS")
    wait_until(lambda: not store.exists(name), 5, "and its request out of the store")
    dead = open_dead(bench.settings)
    (letter,) = dead.letters(bench.normal)
    assert (letter.reason, letter.tenant, letter.job_id, job_of(letter)) == (
        "max_attempts",
        "ann",
        job.id,
        job,
    )
    dead.close()


def test_a_claim_is_renewed_while_its_request_is_being_read(
    moto_sqs: SqsServer, valkey: Valkey, tmp_path: Path
) -> None:
    """A store that took longer than a lease had the message given to another worker, and another."""
    bench = Bench(
        moto_sqs, moto_sqs.settings(valkey, tmp_path, visibility_timeout_s=4, lease_renew_every_s=0.5)
    )
    job = make_job(metadata={"note": "x" * 70_000})
    broker.publish(bench.app, bench.normal, job.to_json(), job.id)
    path = tmp_path / "results" / keys.request_object(job.id)
    request = path.read_bytes()
    path.unlink()
    os.mkfifo(path)  # reading it lasts until somebody writes
    box = bench.inbox()
    wait_until(lambda: box.turn() or len(box.claims) == 1, 10, "it is claimed")
    other, ends = bench.inbox(), time.monotonic() + 8

    def both_turn() -> bool:
        with suppress(BrokerUnavailable):  # a slow answer: the next turn is in time
            box.claims.renew(), other.turn()
        return time.monotonic() > ends

    wait_until(both_turn, 20, "two leases are over")
    with path.open("wb") as pipe:
        pipe.write(request)
    box.read(1)
    assert box.messages[0].payload[0] == [job.to_json()]
    assert len(other.claims) == 0
    bench.close()


def test_a_large_request_that_sqs_gave_up_on_can_be_sent_again(
    moto_sqs: SqsServer, valkey: Valkey, tmp_path: Path
) -> None:
    """Its letter held a pointer: nobody could show it, or send it again."""
    settings = moto_sqs.settings(valkey, tmp_path)
    moto_sqs.create(settings, max_receives=1)
    store = open_store(settings.results, settings)
    with open_state(settings) as state:
        state.announce(moto_sqs.model, moto_sqs.queues)
    with Client(settings) as client, open_keeper(keeper_settings(settings), "k1") as keeper:
        job = client.submit("Once", metadata={"note": "x" * 70_000})
        name = keys.request_object(job.id)
        assert store.exists(name)
        url = moto_sqs.queue_url(moto_sqs.queues[1])
        for _ in range(2):
            moto_sqs.client.receive_message(QueueUrl=url, VisibilityTimeout=0, WaitTimeSeconds=0)
        wait_until(lambda: keeper.round().drained, 10, "its job has an end")
        assert moto_sqs.counts(moto_sqs.dead) == (0, 0)
        assert job.result(5, check=False).state is JobState.FAILED
        assert not store.exists(name), "nobody needs it any more"
        again = client.dead.requeue(client.dead.find(job.id))
        assert (again.retry_of, again.metadata) == (job.id, {"note": "x" * 70_000})
        assert store.exists(keys.request_object(again.id))


def test_a_full_dead_letter_queue_is_taken_out_in_turns(
    moto_sqs: SqsServer, valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of messages held up every job's end until the last of them was out."""
    monkeypatch.setattr("gristmill.backends.sqs_dead.AT_ONCE", 10)
    settings = moto_sqs.settings(valkey, tmp_path)
    moto_sqs.create(settings)
    for number in range(12):
        moto_sqs.client.send_message(QueueUrl=moto_sqs.queue_url(moto_sqs.dead), MessageBody=f"no. {number}")
    with closing(open_dead(settings)) as letters, closing(SqsDead(settings, letters)) as dead:
        assert dead.drain(moto_sqs.model)
        assert letters.count(moto_sqs.dead) == 10
        assert dead.due([moto_sqs.model]) == [moto_sqs.model], "at once"
        while dead.drain(moto_sqs.model):
            pass
        assert letters.count(moto_sqs.dead) == 12
        assert dead.due([moto_sqs.model]) == []


def keeper_settings(settings: Settings) -> KeeperSettings:
    return KeeperSettings(**{name: getattr(settings, name) for name in Settings.model_fields})


def test_a_claim_held_for_eleven_hours_is_told_of_once(bench: Bench) -> None:
    """Who was told waited for the state server, and meanwhile no lease was renewed."""
    bench.put("job-1"), bench.put("job-2")
    box = bench.inbox()
    box.read(2)
    overdue: list[list[str]] = []
    heard, go_on = threading.Event(), threading.Event()

    def hear(job_ids: list[str]) -> None:
        overdue.append(sorted(job_ids))
        heard.set()
        go_on.wait(30)

    box.claims.on_overdue = hear
    box.claims.renew()
    assert not overdue
    now = time.monotonic()
    box.claims.clock = lambda: now + 11 * 3600
    assert box.claims.renew() == box.claims.renew() == []
    assert heard.wait(10)
    assert box.claims.renew() == [], "although nobody has come back from hearing of it"
    go_on.set()
    assert overdue == [["job-1", "job-2"]]


def test_a_paused_queue_gives_nothing_until_it_goes_on(bench: Bench) -> None:
    with broker.queues_of(bench.app) as queues:
        queues.pause(bench.normal, paused=True)
        bench.put("waits")
        bench.put("passes", bench.batch)
        box = bench.inbox()
        assert box.read(1) == ["passes"]
        assert bench.server.counts(bench.normal) == (1, 0)
        queues.pause(bench.normal, paused=False)
    assert box.read(2) == ["passes", "waits"]


# ---- trouble


def test_an_endpoint_away_for_a_while_costs_no_claim_and_no_acknowledgement(
    moto_sqs: SqsServer, valkey: Valkey, tmp_path: Path
) -> None:
    proxy = Proxy(moto_sqs.endpoint)
    settings = moto_sqs.settings(valkey, tmp_path, sqs_endpoint_url=proxy.endpoint, visibility_timeout_s=20)
    bench = Bench(moto_sqs, settings)
    bench.put("job-1")
    box = bench.inbox(lambda: bench.server.queues if len(box.messages) < 1 else ())
    box.read(1)
    proxy.faults.extend(["drop"] * 3)
    box.messages[0].ack()
    wait_until(lambda: len(proxy.faults) < 3 and box.claims.troubled, 10, "it was heard by nobody")
    wait_until(lambda: moto_sqs.counts(bench.normal) == (0, 0), 30, "it is said again")
    proxy.faults.extend([(503, "ServiceUnavailable")] * 2)
    bench.put("job-2")
    box.gate.claimable = lambda: bench.server.queues
    assert box.read(2, 30) == ["job-1", "job-2"]
    bench.close()
    proxy.close()


def test_errors_name_the_next_step_and_no_secret(
    moto_sqs: SqsServer, valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = moto_sqs.settings(valkey, tmp_path)

    def attempt(body: str = "{}", **fields: Any) -> None:
        app = broker.make_app(settings.model_copy(update=fields))
        try:
            broker.publish(app, moto_sqs.queues[0], body, "job-1")
        finally:
            broker.close(app)

    with pytest.raises(Misconfigured, match="gristmill queues create"):
        attempt()
    with pytest.raises(Misconfigured, match="GRISTMILL_STATE_URL"):
        attempt(state_url="")
    for url in ("sqs://KEY@", "sqs:///path", "sqs://host?colour=red", "sqs://h:no"):
        with pytest.raises(Misconfigured, match=r"GRISTMILL_BROKER_URL|not a URL") as caught:
            attempt(broker_url=url)
        assert "KEY" not in caught.value.message.replace("KEY:SECRET", "").replace("KEY and", "")
    with pytest.raises(Misconfigured, match="GRISTMILL_SQS_QUEUE_PREFIX"):
        attempt(sqs_queue_prefix="p" * 70)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(Misconfigured, match="KEY:SECRET"):
        attempt(broker_url="sqs://", sqs_endpoint_url=moto_sqs.endpoint, sqs_region="us-east-1")
    moto_sqs.create(settings)
    app = broker.make_app(settings)
    with pytest.raises(InvalidRequest, match="tenant"):
        broker.publish(app, moto_sqs.queues[0], "{}", "job-1", "a b")
    broker.close(app)
    (tmp_path / "results").rmdir()
    with pytest.raises(Misconfigured, match="does not exist"):
        attempt("x" * 70_000)
    assert moto_sqs.counts(moto_sqs.queues[0]) == (0, 0), "no message names what is not there"


def test_an_endpoint_that_is_down_is_told_within_seconds(
    moto_sqs: SqsServer, valkey: Valkey, tmp_path: Path
) -> None:
    app = broker.make_app(
        moto_sqs.settings(valkey, tmp_path, broker_url="sqs://a:b@127.0.0.1:9?region=us-east-1")
    )
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        broker.publish(app, moto_sqs.queues[0], "{}", "job-1")
    assert time.monotonic() - started < 12
    broker.close(app)


def test_queues_are_found_by_url_and_by_prefix(moto_sqs: SqsServer, valkey: Valkey, tmp_path: Path) -> None:
    settings = moto_sqs.settings(valkey, tmp_path, sqs_queue_prefix="two-")
    moto_sqs.create(settings)
    mine = moto_sqs.queues[0]
    app = broker.make_app(settings)
    broker.publish(app, mine, "{}", "job-1")
    assert broker.depth(app, mine) == moto_sqs.counts(f"two-{mine}")[0] == 1
    broker.close(app)
    named = moto_sqs.settings(valkey, tmp_path, sqs_queues={mine: moto_sqs.queue_url(f"two-{mine}")})
    app = broker.make_app(named)
    assert broker.depth(app, mine) == 1
    broker.close(app)
