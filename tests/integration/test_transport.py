"""The kombu transport on a real Valkey: claims, order, tenants, the gate, the bell, and what goes wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import kombu
import pytest
import redis
from celery import Celery
from gristmill.backends import broker
from gristmill.backends.claims import Claims
from gristmill.backends.dead import DeadLetters
from gristmill.backends.gate import Gate
from gristmill.backends.message_queue import ClaimedMessage, MessageQueue
from gristmill.schemas import keys
from gristmill.schemas.errors import BrokerUnavailable, InvalidRequest
from gristmill.schemas.queues import TENANT_HEADER
from gristmill.schemas.settings import Settings
from kombu.message import Message

from ..support.consumer import consumers
from ..support.valkey import Valkey
from ..support.waiting import LOADED_S, wait_until

LEASE_S = 1.5
NEVER_S = 600.0
"""For what must not be the reason that something happened."""


class Inbox:
    """A consumer in this process: what it was given, in order, nothing acknowledged by itself."""

    def __init__(self, url: str, queues: tuple[str, ...] = ("q",), **options: Any) -> None:
        self.claims: Claims = options.setdefault("claims", Claims(lease_s=LEASE_S))
        self.connection = kombu.Connection(
            broker.kombu_url(url), transport_options={"visibility_timeout": LEASE_S, **options}
        )
        self.messages: list[Message] = []
        self._consumer = kombu.Consumer(
            self.connection,
            [kombu.Queue(name, kombu.Exchange("")) for name in queues],
            on_message=self.messages.append,
            accept=["json"],
            prefetch_count=options.get("prefetch_count"),
        )
        self._consumer.consume()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def read(self, count: int, timeout_s: float = 5.0) -> list[str]:
        """Bodies, once ``count`` have come in all."""
        deadline = time.monotonic() + timeout_s
        while len(self.messages) < count:
            self._turn()
            assert time.monotonic() < deadline, f"{self.bodies} and no more"
        return self.bodies

    def read_nothing(self, for_s: float = 0.3) -> None:
        seen, deadline = len(self.messages), time.monotonic() + for_s
        while time.monotonic() < deadline:
            self._turn()
            assert len(self.messages) == seen, self.bodies

    def follow(self) -> None:
        """Go on reading in a thread."""
        self._thread = threading.Thread(target=self._read_on)
        self._thread.start()

    def _read_on(self) -> None:
        while not self._stop.is_set():
            self._turn()

    def _turn(self) -> None:
        try:
            self.connection.drain_events(timeout=0.05)
        except TimeoutError:
            return

    @property
    def bodies(self) -> list[str]:
        return [message.payload for message in self.messages]

    @property
    def tags(self) -> list[str]:
        return [message.delivery_tag for message in self.messages]

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self.connection.close()


@pytest.fixture
def inbox(valkey: Valkey) -> Iterator[Callable[..., Inbox]]:
    opened: list[Inbox] = []

    def open_inbox(*queues: str, **options: Any) -> Inbox:
        opened.append(Inbox(valkey.url, queues or ("q",), **options))
        return opened[-1]

    yield open_inbox
    for box in opened:
        box.close()


@pytest.fixture
def put(valkey: Valkey) -> Iterator[Callable[..., None]]:
    with kombu.Connection(broker.kombu_url(valkey.url)) as connection:
        producer = kombu.Producer(connection)

        def publish(body: object, queue: str = "q", tenant: str = "default") -> None:
            producer.publish(
                body, routing_key=queue, exchange="", serializer="json", headers={TENANT_HEADER: tenant}
            )

        yield publish


@pytest.fixture
def queue(valkey: Valkey) -> MessageQueue:
    """The queue seen from outside."""
    return MessageQueue(valkey.client(), lease_s=LEASE_S)


@pytest.fixture
def app(valkey: Valkey) -> Iterator[Celery]:
    app = broker.make_app(
        Settings(broker_url=valkey.url, command_timeout_s=1, connect_timeout_s=1), queue_names=["q"]
    )
    yield app
    broker.close(app)


# ---- delivery


def test_a_message_says_how_often_it_was_delivered_and_for_whom(put, inbox, queue) -> None:
    put("hello", tenant="ann")
    box = inbox()
    assert box.read(1) == ["hello"]
    message = box.messages[0]
    assert message.properties["delivery_count"] == 1
    assert message.delivery_tag.endswith("#1")
    assert message.delivery_info["tenant"] == "ann"
    assert not message.delivery_info["redelivered"]
    message.requeue()
    box.read(2)
    assert box.messages[1].properties["delivery_count"] == 2
    assert box.messages[1].delivery_info["redelivered"]
    box.messages[1].ack()
    assert queue.claimed() == queue.depth("q") == 0


def test_messages_of_a_tenant_come_in_the_order_they_were_put(put, inbox) -> None:
    for number in range(20):
        put(number)
    assert inbox().read(20) == list(range(20))


def test_an_earlier_queue_is_emptied_before_a_later_one(put, inbox) -> None:
    for number in range(3):
        put(f"batch {number}", queue="batch")
    for number in range(3):
        put(f"interactive {number}", queue="interactive")
    got = inbox("interactive", "batch").read(6)
    assert got[:3] == [f"interactive {n}" for n in range(3)]
    assert got[3:] == [f"batch {n}" for n in range(3)]


def test_tenants_take_turns_and_a_newcomer_waits_for_nobodys_backlog(put, inbox) -> None:
    for number in range(6):
        put(f"big {number}", tenant="big")
    box = inbox(gate=(gate := Gate(lambda: ("q",) if len(box.messages) < 2 else ())))
    box.read(2)
    put("small 0", tenant="small")
    put("small 1", tenant="small")
    gate.claimable = lambda: ("q",)
    gate.poke()
    assert box.read(6)[2:] == ["big 2", "small 0", "big 3", "small 1"]


def test_a_tenant_name_that_could_be_anything_is_refused(put, queue) -> None:
    for name in ("", "a:b", "a\nb", "x" * 65, "é"):
        with pytest.raises(InvalidRequest, match="does not match"):
            put("hello", tenant=name)
    assert queue.depth("q") == 0


def test_a_requeued_message_comes_next_and_its_old_tag_is_spent(put, inbox, queue) -> None:
    put("first")
    put("second")
    box = inbox(prefetch_count=1)
    box.read(1)
    old = box.messages[0]
    old.requeue()
    assert box.read(2) == ["first", "first"]
    assert queue.ack(old.delivery_tag) == [False]
    assert queue.requeue(old.delivery_tag) == [False]
    assert queue.renew([old.delivery_tag]) == [old.delivery_tag]
    assert queue.claimed() == 1, "the new claim stands"
    box.messages[1].ack()
    assert box.read(3)[2] == "second"


def test_a_rejected_message_is_kept_among_the_dead(put, inbox, queue, valkey) -> None:
    put("hello")
    box = inbox()
    box.read(1)
    box.messages[0].reject()
    assert queue.claimed() == queue.depth("q") == 0
    (dead,) = DeadLetters(valkey.client()).letters("q")
    assert (dead.id, dead.reason, dead.tenant) == (box.tags[0], "rejected", "default")
    assert json.loads(dead.payload)["body"]


def test_what_is_no_message_is_buried_and_the_next_one_delivered(put, inbox, queue, valkey) -> None:
    queue.put("q", "default", "x", "not JSON")
    queue.put("q", "default", "y", '{"properties": {}}')
    queue.put("q", "default", "z", b"secret \xff")
    valkey.client().rpush(keys.queue_messages("q", "default"), "pushed by hand")
    put("hello")
    assert inbox().read(1) == ["hello"]
    reasons = [letter.reason for letter in DeadLetters(valkey.client()).letters("q")]
    assert len(reasons) == 4
    assert not any("secret" in reason for reason in reasons), "the log tells the reason"
    assert queue.claimed() == 1


def test_what_is_consumed_without_acknowledgement_leaves_no_claim(put, queue, valkey) -> None:
    put("hello")
    with kombu.Connection(broker.kombu_url(valkey.url)) as connection:
        got: list[object] = []
        with kombu.Consumer(
            connection,
            [kombu.Queue("q", kombu.Exchange(""))],
            callbacks=[lambda body, _message: got.append(body)],
            no_ack=True,
            accept=["json"],
        ):
            connection.drain_events(timeout=5)
    assert got == ["hello"]
    assert queue.claimed() == 0


def test_basic_get_takes_one_message_or_none(put, queue, valkey) -> None:
    put("hello")
    with kombu.Connection(broker.kombu_url(valkey.url)) as connection:
        channel = connection.default_channel
        message = channel.basic_get("q")
        assert message.payload == "hello"
        assert channel.basic_get("q") is None
        message.ack()
    assert queue.claimed() == 0


def test_closing_a_consumer_hands_nothing_back(put, inbox, queue) -> None:
    put("hello")
    box = inbox()
    box.read(1)
    box.close()
    assert queue.claimed() == 1
    assert queue.depth("q") == 0


def test_size_and_purge_count_what_waits(put, inbox, queue, app) -> None:
    for tenant in ("ann", "bob", "bob"):
        put("hello", tenant=tenant)
    inbox(prefetch_count=1).read(1)
    assert broker.depth(app, "q") == queue.depth("q") == 2
    with kombu.Connection(app.conf.broker_url) as connection:
        assert connection.default_channel.queue_declare("q").message_count == 2
        assert connection.default_channel.queue_purge("q") == 2
    assert queue.depth("q") == 0
    assert queue.claimed() == 1, "what is in hand stays there"


# ---- when to claim


def test_a_closed_gate_lets_nothing_through_and_a_poke_opens_it_at_once(
    put, inbox, queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gristmill.backends.transport.ASK_AGAIN_S", NEVER_S)
    open_queues: list[str] = []
    gate = Gate(lambda: open_queues)
    box = inbox("a", "b", gate=gate)
    put("for a", queue="a")
    put("for b", queue="b")
    box.read_nothing()
    assert queue.claimed() == 0
    box.follow()
    open_queues.append("b")
    gate.poke()
    wait_until(lambda: box.bodies == ["for b"], 5, "the poke is heard")


def test_a_gate_that_opens_without_a_poke_is_asked_again_within_a_second(put, inbox) -> None:
    opens_at = time.monotonic() + 0.3
    box = inbox(gate=Gate(lambda: ("q",) if time.monotonic() > opens_at else ()))
    put("hello")
    started = time.monotonic()
    box.read(1)
    assert time.monotonic() - started < 1.5


def test_the_gate_is_asked_before_every_single_claim(put, inbox, queue) -> None:
    for number in range(10):
        put(number)
    places = iter(range(3))
    box = inbox(gate=Gate(lambda: ("q",) if next(places, None) is not None else ()))
    box.read(3)
    box.read_nothing()
    assert queue.depth("q") == 7, "nothing is hoarded"


def test_a_poke_that_opens_nothing_asks_the_server_nothing(inbox, valkey) -> None:
    gate = Gate(lambda: ("q",))
    box = inbox(gate=gate)
    box.read_nothing()
    client = valkey.client()
    client.config_resetstat()
    for _ in range(60):
        gate.poke()
        box._turn()
    scripts = client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"]
    assert scripts < 40, "only the rhythm of bell and sweep is left"


def test_remote_control_reaches_a_consumer_and_brings_its_answer(valkey, tmp_path, app) -> None:
    """Its replies travel through our queues too: without acknowledgement, and gone with their queue."""
    with consumers(valkey.url, tmp_path, lease_s=LEASE_S, job_s=0) as crowd:
        crowd.start()
        wait_until(lambda: crowd.notes("ready"), 20, "it is up")
        replies = wait_until(lambda: app.control.ping(timeout=1.0), 10, "somebody answers")
    assert [*replies[0].values()] == [{"ok": "pong"}]
    assert MessageQueue(valkey.client(), lease_s=1).claimed() == 0


def test_a_put_wakes_an_idle_consumer_of_any_of_its_queues(put, inbox) -> None:
    box = inbox("a", "b", "c")
    box.read_nothing()
    box.follow()
    slow = []
    for number in range(30):
        started = time.monotonic()
        put(number, queue="abc"[number % 3])
        wait_until(lambda n=number: n in box.bodies, 5, "delivered", poll_s=0.001)
        slow.append(time.monotonic() - started)
    assert sorted(slow)[15] < 0.1, "waiting on each queue in turn would take longer"


def test_a_full_consumer_claims_again_as_soon_as_it_acknowledges(
    put, inbox, queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gristmill.backends.transport.ASK_AGAIN_S", NEVER_S)
    for number in range(4):
        put(number)
    box = inbox(prefetch_count=2)
    box.read(2)
    box.read_nothing()
    assert queue.depth("q") == 2
    box.follow()
    box.messages[0].ack()
    wait_until(lambda: len(box.messages) == 3, 5, "room is noticed")


def test_a_paused_queue_is_left_alone_until_it_goes_on(put, inbox, queue) -> None:
    queue.pause("a", paused=True)
    put("for a", queue="a")
    put("for b", queue="b")
    box = inbox("a", "b")
    assert box.read(1) == ["for b"]
    box.read_nothing()
    box.follow()
    queue.pause("a", paused=False)
    wait_until(lambda: "for a" in box.bodies, 5, "the bell is rung")


# ---- leases


def test_an_unrenewed_claim_goes_to_somebody_else_within_its_lease(put, inbox, queue) -> None:
    put("hello")
    inbox().read(1)
    started = time.monotonic()
    other = inbox()
    assert other.read(1) == ["hello"]
    assert other.messages[0].properties["delivery_count"] == 2
    assert time.monotonic() - started < LEASE_S + 1 + LOADED_S
    assert queue.claimed() == 1


def test_a_renewed_claim_stays(put, inbox) -> None:
    put("hello")
    box, other = inbox(), inbox()
    box.read(1)
    deadline = time.monotonic() + 2 * LEASE_S
    while time.monotonic() < deadline:
        assert box.claims.renew() == []
        other.read_nothing(0.2)


def test_losing_a_claim_is_told_once_and_the_loser_can_do_no_harm(put, inbox, queue) -> None:
    put("hello")
    box, other = inbox(), inbox()
    box.read(1)
    other.read(1)
    assert box.claims.renew() == box.tags
    assert box.claims.renew() == []
    box.messages[0].ack()
    assert queue.claimed() == 1
    assert other.claims.renew() == []


def test_leaving_a_message_says_nothing_and_stops_renewing(put, inbox, queue) -> None:
    put("hello")
    box = inbox()
    box.read(1)
    box.messages[0].channel.qos.leave(box.tags[0])
    assert queue.claimed() == 1
    assert box.claims.held == ()


# ---- trouble


def test_claims_that_never_had_a_connection_have_nothing_to_hand_back() -> None:
    """A worker may be told to end between its readiness and its first look at the queues."""
    claims = Claims(lease_s=LEASE_S)
    claims.hand_back()
    claims.close()


def test_a_hold_of_the_sweep_is_logged_once(valkey: Valkey, caplog: pytest.LogCaptureFixture) -> None:
    claims = Claims(lease_s=600.0)
    claims.open(valkey.client)
    with caplog.at_level("INFO", "gristmill"):
        for _ in range(3):
            claims.sweep(0.0)
    claims.close()
    assert [r.message for r in caplog.records] == ["claims.held_off"]


def test_claims_are_adopted_by_the_next_connection(put, inbox, queue, valkey) -> None:
    put("hello")
    box = inbox()
    box.read(1)
    valkey.drop_clients()
    again = inbox(claims=box.claims)
    again.read_nothing()
    assert box.claims.renew() == []
    box.messages[0].ack()
    assert queue.claimed() == 0


def test_an_acknowledgement_nobody_heard_is_said_after_the_restart(put, inbox, valkey) -> None:
    put("hello")
    box = inbox()
    box.read(1)
    valkey.kill()
    box.messages[0].ack()
    assert box.claims.troubled
    valkey.restart()
    queue = MessageQueue(valkey.client(), lease_s=LEASE_S)
    box.claims.renew()  # unless the renewals' own thread was faster
    assert queue.claimed() == queue.depth("q") == 0
    assert box.claims.held == ()


def test_scripts_are_sent_again_to_a_server_that_forgot_them(put, inbox, valkey) -> None:
    put("one")
    box = inbox()
    box.read(1)
    valkey.client().script_flush()
    put("two")
    box.messages[0].ack()
    assert box.read(2) == ["one", "two"]


def test_a_server_out_of_memory_refuses_new_work_and_goes_on_with_the_old(put, inbox, queue, valkey) -> None:
    put("first")
    put("second")
    box = inbox(prefetch_count=1)
    box.read(1)
    valkey.client().config_set("maxmemory", 1)
    with pytest.raises(redis.exceptions.OutOfMemoryError):
        put("third")
    assert box.claims.renew() == []
    queue.sweep()
    box.messages[0].requeue()
    assert box.read(2) == ["first", "first"]
    box.messages[1].ack()
    assert box.read(3)[2] == "second"


def test_a_user_with_few_rights_can_consume_and_publish(put, valkey) -> None:
    valkey.client().acl_setuser(
        "mill",
        enabled=True,
        passwords=["+pw"],
        keys=["gm:*", "_kombu*"],
        channels=["*"],
        categories=["-@all", "+@read", "+@write", "+@connection", "+@pubsub", "+@scripting", "+@blocking"],
        commands=["+info", "+time"],
    )
    url = valkey.url.replace("unix://", "unix://mill:pw@")
    put("hello")
    box = Inbox(url)
    assert box.read(1) == ["hello"]
    assert box.claims.renew() == []
    box.messages[0].ack()
    box.connection.default_channel.qos.restore_visible()
    box.close()


# ---- the app


def test_publish_shows_the_prompt_in_no_header(app, valkey) -> None:
    broker.publish(app, "q", json.dumps({"prompt": "a secret"}), "job-1", "ann")
    (entry,) = valkey.client().lrange(keys.queue_messages("q", "ann"), 0, -1)
    message = json.loads(entry.split(b"\n", 1)[1])
    assert message["headers"]["id"] == "job-1"
    assert b"secret" not in entry, "bodies are base64, everything else must not hold it"
    assert message["headers"]["argsrepr"] == message["headers"]["kwargsrepr"] == "-"


def test_a_dead_broker_is_reported_within_seconds(app, valkey) -> None:
    broker.publish(app, "q", "{}", "job-1")
    valkey.kill()
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        broker.publish(app, "q", "{}", "job-2")
    assert time.monotonic() - started < 7
    with pytest.raises(BrokerUnavailable):
        broker.depth(app, "q")


def test_a_frozen_broker_is_reported_within_seconds(app, valkey) -> None:
    broker.publish(app, "q", "{}", "job-1")
    valkey.freeze()
    started = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        broker.publish(app, "q", "{}", "job-2")
    assert time.monotonic() - started < 10
    valkey.thaw()


def test_publish_rides_out_a_restart(app, valkey) -> None:
    broker.publish(app, "q", "{}", "job-1")
    valkey.kill()
    publisher = threading.Thread(target=broker.publish, args=(app, "q", "{}", "job-2"))
    publisher.start()
    publisher.join(0.5)
    assert publisher.is_alive(), "it is still trying"
    valkey.restart()
    publisher.join()
    assert broker.depth(app, "q") == 2


def test_a_claim_of_the_app_belongs_to_the_app(app) -> None:
    broker.publish(app, "q", "{}", "job-1")
    with broker.queues_of(app) as queues:
        assert isinstance(queues.claim(["q"]), ClaimedMessage)
    assert broker.claims_of(app) is broker.claims_of(app)


def test_what_is_being_told_is_not_told_again_by_a_renewal_meanwhile(put, queue, valkey, caplog) -> None:
    """The second one found the tag spent, and a claim that was acknowledged was reported as lost."""

    class Interrupted(Claims):
        def _tell(self, tags, debt):
            self.settle()  # as the renewer's thread does whenever something is owed
            return super()._tell(tags, debt)

    put("one")
    claims = Interrupted(lease_s=30)
    claims.open(valkey.client)
    claimed = queue.claim(["q"])
    claims.add(claimed.tag)
    assert claims.ack(claimed.tag) == []
    assert queue.claimed() == 0
    assert "claim.lost" not in caplog.text


def test_a_consumers_loop_says_that_it_turns(put, inbox) -> None:
    gate = Gate(lambda: ("q",))
    assert gate.still_s() == 0.0, "nothing is known before the first turn"
    box = inbox(gate=gate)
    put("one")
    box.read(1)
    stood_s = gate.still_s()
    assert 0.0 < stood_s < 5.0
    wait_until(lambda: gate.still_s() > stood_s, 5, "nobody turns it now")
    put("two")
    box.read(2)
    assert gate.still_s() < 5.0
