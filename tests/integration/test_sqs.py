"""The SQS transport over HTTP, on moto and on ministack, with a real Valkey for state."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kombu
import pytest
from celery import Celery
from gristmill.backends import broker
from gristmill.backends.gate import Gate
from gristmill.schemas.settings import Settings
from kombu.message import Message

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

    def __init__(self, server: SqsServer, settings: Settings) -> None:
        self.server, self.settings = server, settings
        self.interactive, self.normal, self.batch = server.queues
        server.create(settings)
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
