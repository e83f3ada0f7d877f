"""The kombu transport ``gristmill-sqs``: SQS with leases that are renewed and claims only when there is room.

kombu's own SQS transport needs pycurl, renews no lease, asks for messages before anybody has room for them,
and deletes what it cannot decode. This one is boto3 behind kombu's virtual channel: threads of ``Receiver``
wait for SQS, and the consumer's loop for a ``Waker``, as it does on Redis.

Transport options of our own: ``sqs`` is an ``Sqs``; ``claims`` and ``gate`` as in transport.py.
"""

# kombu and Celery carry no types that strict checking could use.
# pyright: basic
from __future__ import annotations

import logging
import select
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from queue import Empty
from time import monotonic
from typing import Any

import redis
from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.utils.json import dumps, loads

from ..schemas.errors import GristmillError, InvalidRequest
from ..schemas.job import DEFAULT_TENANT
from ..schemas.queues import TENANT_HEADER
from ..schemas.settings import Settings
from . import transport
from .dead import open_dead
from .gate import Gate, Waker
from .message_queue import MessageQueue
from .redis import connect, redis_errors
from .sqs_claims import Receipt, SqsClaims
from .sqs_queues import SqsMessage, SqsQueues
from .sqs_receiver import Receiver
from .sqs_requests import LargeRequests
from .state import state_url

log = logging.getLogger(__name__)

SCHEME = "gristmill-sqs"
_WHERE = "state server"


@dataclass(frozen=True, slots=True)
class Sqs:
    """What the channels of one app share."""

    queues: SqsQueues
    requests: LargeRequests
    flags: MessageQueue
    """Pauses, in the state server."""

    def depth(self, queue: str) -> int:
        """Messages that wait, about."""
        return self.queues.counts(queue)[0]

    def counts(self, queue: str) -> tuple[int, int]:
        """Messages that wait, and those that are claimed, about."""
        return self.queues.counts(queue)

    def purge(self, queue: str) -> int:
        """Throw away what the queue holds. Returns about how many waited."""
        waiting = self.depth(queue)
        self.queues.purge(queue)
        return waiting

    def lacking(self, queue: str, _tenant: str, ids: Collection[str]) -> set[str]:
        """Those tasks of ``ids`` that have no message. Nobody can look into a queue of SQS: all of them where
        it is empty, or none.
        """
        return set() if any(self.counts(queue)) else set(ids)

    def pause(self, queue: str, *, paused: bool) -> None:
        """Stop all claims from a queue, within a second, or let them go on."""
        with redis_errors(_WHERE):
            self.flags.pause(queue, paused=paused)

    def paused(self, queue: str) -> bool:
        """Whether claims from it are stopped."""
        with redis_errors(_WHERE):
            return self.flags.paused(queue)


def transport_options(settings: Settings, gate: Gate | None) -> dict[str, Any]:
    """For an app on SQS. Sends nothing yet. Raises Misconfigured."""
    queues, requests = SqsQueues(settings), LargeRequests(settings)
    flags = MessageQueue(_state_client(settings), lease_s=settings.visibility_timeout_s)
    claims = SqsClaims(
        queues,
        open_dead(settings),
        lease_s=settings.visibility_timeout_s,
        renew_every_s=settings.lease_renew_every_s,
        done=lambda receipt: requests.remove(receipt.request) if receipt.request else None,
    )
    return {"sqs": Sqs(queues, requests, flags), "claims": claims, "gate": gate}


def _state_client(settings: Settings) -> redis.Redis:
    return connect(state_url(settings), settings)


class QoS(transport.QoS):
    """kombu's view of ``SqsClaims``."""

    channel: Channel

    def can_consume(self) -> bool:
        return not self.prefetch_count or self._delivered_count() < self.prefetch_count

    def can_consume_max_estimate(self) -> int | None:
        return max(self.prefetch_count - self._delivered_count(), 0) if self.prefetch_count else None

    def _delivered_count(self) -> int:
        return len(self.claims) - self.channel.receiver.surplus

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """Nothing: SQS shows what has expired by itself."""


class Channel(virtual.Channel):
    """One consumer or producer."""

    QoS = QoS
    connection: Any
    do_restore = False

    sqs: Sqs
    claims: SqsClaims
    gate: Gate | None = None
    from_transport_options = (*virtual.Channel.from_transport_options, "gate", "claims", "sqs")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.waker = Waker()
        self._ask_again_at = 0.0
        super().__init__(*args, **kwargs)
        self.receiver = Receiver(
            self.sqs.queues,
            self.claims,
            read=self._read,
            fill_in=self._filled_in,
            paused=self.sqs.paused,
            wake=self.waker.set,
        )

    # ---- consuming

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        if no_ack:
            raise InvalidRequest("on SQS every message is acknowledged: no_ack cannot be")
        if not self._active_queues:  # the first one
            self.waker.set()
            self.claims.watch(self.waker)
            if self.gate is not None:
                self.gate.attach(self.waker)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def look_around(self) -> None:
        """Called on each turn of the loop: a closed gate is asked again though nobody pokes."""
        if self.gate is not None:
            self.gate.turn()
        if self._active_queues and monotonic() >= self._ask_again_at:
            self.waker.set()

    def deliver_next(self) -> bool:
        """One message, if there is room and one has come; else have one fetched."""
        self.waker.clear()
        self._ask_again_at = monotonic() + transport.ASK_AGAIN_S
        delivery = self.receiver.take(self._claimable() if self.qos.can_consume() else ())
        if delivery is None:
            return False
        self.waker.set()  # there may be more
        self.connection._deliver(delivery.message, delivery.queue)
        return True

    def drain_events(self, timeout: float | None = None, callback: Any = None) -> None:  # noqa: ARG002 - kombu's
        """For consumers without an event loop. Raises Empty, sooner than asked."""
        if not self._active_queues:
            raise Empty
        limit_s = transport.ASK_AGAIN_S if timeout is None else min(timeout, transport.ASK_AGAIN_S)
        select.select([self.waker], [], [], limit_s)
        if not self.deliver_next():
            raise Empty

    def _claimable(self) -> Sequence[str]:
        active = self._active_queues
        return active if self.gate is None else [name for name in self.gate.claimable() if name in active]

    def _read(self, received: SqsMessage, received_at: float) -> tuple[Receipt, dict[str, Any]] | None:
        """What ``Receiver.read`` is. A message that cannot be read is nobody's: its lease runs out, it comes
        again, and in the end SQS puts it into the dead-letter queue."""
        try:
            message: dict[str, Any] = loads(received.body)
            headers, _ = message["headers"], message["properties"]["delivery_info"]
            tenant, job_id = headers.get(TENANT_HEADER, DEFAULT_TENANT), headers.get("id")
            request = self.sqs.requests.name_in(message)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            log.error("message.unreadable", extra=_named(received) | {"reason": type(exc).__name__})
            return None
        return Receipt(received, received.body, job_id, tenant, received_at, request), message

    def _filled_in(self, receipt: Receipt, message: dict[str, Any]) -> dict[str, Any] | None:
        """What ``Receiver.fill_in`` is."""
        received = receipt.message
        if receipt.request is not None:
            try:
                message = self.sqs.requests.fill_in(message)
            except (ValueError, KeyError, TypeError) as exc:
                log.error("message.unreadable", extra=_named(received) | {"reason": type(exc).__name__})
                return None
            except GristmillError as exc:  # the store is away: another try when the lease has run out
                log.warning("request.unavailable", extra=_named(received) | {"reason": exc.message})
                return None
            if not self.claims.amend(replace(receipt, payload=dumps(message))):
                return None
        again, info = received.receives > 1, message["properties"]["delivery_info"]
        message["properties"].update(delivery_tag=received.tag, delivery_count=received.receives)
        info.update(redelivered=again, queue=received.queue, tenant=receipt.tenant)
        message["headers"]["redelivered"] = again
        return message

    def basic_get(self, queue: str, no_ack: bool = False, **_: Any) -> Any:  # noqa: ARG002
        """One message without waiting, whatever the gate says; None if there is none."""
        now = self.claims.clock()
        for received in self.sqs.queues.receive(queue, count=1, lease_s=self.claims.lease_s):
            if (found := self._read(received, now)) is None:
                continue
            self.claims.take(found[0])
            if (message := self._filled_in(*found)) is not None:
                return self.Message(message, channel=self)
            self.claims.leave(received.tag)
        return None

    # ---- producing and managing

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        """Accepted when this returns. Raises BrokerUnavailable, StoreUnavailable, Misconfigured, and
        InvalidRequest for a bad tenant."""
        tenant = transport.tenant_of(message)
        self.sqs.queues.put(queue, self.sqs.requests.text(message), tenant)

    @property
    def producer_queue(self) -> Sqs:
        """The queues, to count, purge and pause."""
        return self.sqs

    def _size(self, queue: str) -> int:
        return self.sqs.depth(queue)

    def _purge(self, queue: str) -> int:
        return self.sqs.purge(queue)

    def close(self) -> None:
        """Hands back what was not delivered; what was stays claimed, as on Redis."""
        self.receiver.stop()
        self.claims.unwatch(self.waker)
        if self.gate is not None:
            self.gate.detach(self.waker)
        if self.connection is not None:
            self.connection.forget(self)
        super().close()
        self.waker.close()


def _named(received: SqsMessage) -> dict[str, Any]:
    return {"queue": received.queue, "message_id": received.message_id, "receives": received.receives}


class Transport(virtual.Transport):
    """Registered as ``gristmill-sqs`` when this module is imported."""

    Channel = Channel
    driver_type = "sqs"
    driver_name = SCHEME
    polling_interval = None  # a channel waits for its waker itself
    implements = virtual.Transport.implements.extend(
        asynchronous=True, exchange_type=frozenset(["direct"]), heartbeats=False
    )

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)
        self._loop: Any = None
        self._readers: dict[Channel, int] = {}

    def register_with_event_loop(self, _connection: Any, loop: Any) -> None:
        self._loop = loop
        loop.on_tick.add(self._watch)
        loop.call_repeatedly(transport.ASK_AGAIN_S, self._look_around)

    def _watch(self) -> None:
        for channel in tuple(self.channels or ()):
            if channel._active_queues and channel not in self._readers:
                self._readers[channel] = channel.waker.fileno()
                self._loop.add_reader(channel.waker.fileno(), channel.deliver_next)

    def _look_around(self) -> None:
        for channel in tuple(self.channels or ()):
            channel.look_around()

    def forget(self, channel: Channel) -> None:
        """Watch the channel no more: the number of its waker may soon be somebody else's."""
        number = self._readers.pop(channel, None)
        if number is not None and self._loop is not None:
            self._loop.remove_reader(number)

    def close_connection(self, connection: Any) -> None:
        if self._loop is not None:
            self._loop.on_tick.discard(self._watch)
        super().close_connection(connection)


TRANSPORT_ALIASES[SCHEME] = f"{__name__}:Transport"
