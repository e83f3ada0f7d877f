"""Dead letters on a real Valkey: how a message gets there, what is kept of it, and what never grows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery
from gristmill.backends import broker
from gristmill.backends.dead import DeadLetters, job_of
from gristmill.backends.message_queue import DEAD_TTL_S, ClaimedMessage, MessageQueue
from gristmill.schemas import keys
from gristmill.schemas.errors import BadInput
from gristmill.schemas.settings import Settings

from ..support.journal import make_job
from ..support.valkey import Valkey


@pytest.fixture
def queue(valkey: Valkey) -> MessageQueue:
    return MessageQueue(valkey.client(), lease_s=60, now_ms=1_790_000_000_123)


@pytest.fixture
def dead(valkey: Valkey) -> DeadLetters:
    return DeadLetters(valkey.client())


@pytest.fixture
def app(settings: Settings) -> Iterator[Celery]:
    app = broker.make_app(settings)
    yield app
    broker.close(app)


def claimed(queue: MessageQueue) -> ClaimedMessage:
    message = queue.claim(["q"])
    assert isinstance(message, ClaimedMessage)
    return message


def test_a_buried_message_keeps_its_job_its_reason_and_its_time(
    app: Celery, queue: MessageQueue, dead: DeadLetters
) -> None:
    job = make_job(prompt='Zoë said: "é\\u00e9"\n\x00', tenant="acme")
    broker.publish(app, "q", job.to_json(), job.id, job.tenant)
    tag = claimed(queue).tag
    assert queue.bury(tag, 'the engine died of it, "alone", 3 times')
    (letter,) = dead.letters("q")
    assert (letter.id, letter.job_id, letter.tenant, letter.queue) == (tag, job.id, "acme", "q")
    assert (letter.reason, letter.at) == ('the engine died of it, "alone", 3 times', 1_790_000_000.123)
    assert job_of(letter) == job
    assert dead.get("q", tag) == letter
    assert (queue.claimed(), queue.depth("q")) == (0, 0)


def test_a_spent_tag_buries_nothing(queue: MessageQueue, dead: DeadLetters) -> None:
    queue.put("q", "default", "x", "hello")
    tag = claimed(queue).tag
    queue.requeue(tag)
    assert not queue.bury(tag, "too late")
    assert dead.count("q") == 0
    assert queue.depth("q") == 1


@pytest.mark.parametrize("payload", ["not JSON", "[1, 2]", '{"headers": 5}', '{"headers": {"id": 5}}'])
def test_what_is_no_message_has_no_job(queue: MessageQueue, dead: DeadLetters, payload: str) -> None:
    queue.put("q", "default", "x", payload)
    queue.bury(claimed(queue).tag, "unreadable")
    (letter,) = dead.letters("q")
    assert (letter.job_id, letter.payload) == (None, payload)
    with pytest.raises(BadInput):
        job_of(letter)


def test_bytes_that_are_no_text_hide_no_other_letter(
    queue: MessageQueue, dead: DeadLetters, valkey: Valkey
) -> None:
    queue.put("q", "default", "x", b"\xff\xfe{")
    queue.bury(claimed(queue).tag, "unreadable")
    valkey.client().hset(keys.queue_dead("q"), "odd", "written by somebody else")
    valkey.client().zadd(keys.queue_dead_at("q"), {"odd": 1})
    first, second = dead.letters("q")
    assert first.payload == "\ufffd\ufffd{"
    assert (second.id, second.payload) == ("odd", "written by somebody else")


def test_another_brokers_letter_is_written_once(dead: DeadLetters) -> None:
    job = make_job()
    for first in (True, False):
        assert (
            dead.add("q", "m-1", job.to_json(), tenant="acme", reason="undelivered", job_id=job.id) is first
        )
    (letter,) = dead.letters("q")
    assert job_of(letter) == job
    assert dead.remove("q", "m-1", "unknown") == 1
    assert dead.remove("q", "m-1") == 0
    assert list(dead.letters("q")) == []


def test_the_oldest_letters_go_and_none_stays_for_ever(
    dead: DeadLetters, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gristmill.backends.dead.DEAD_LIMIT", 150)
    for number in range(160):
        dead.now_ms = number
        dead.add("q", f"m-{number}", "{}", tenant="t", reason="r", job_id=None)
    assert [letter.id for letter in dead.letters("q")] == [f"m-{n}" for n in range(159, 9, -1)]
    client = valkey.client()
    assert client.hlen(keys.queue_dead("q")) == 150
    for key in (keys.queue_dead("q"), keys.queue_dead_at("q")):
        assert 0 < client.ttl(key) <= DEAD_TTL_S
