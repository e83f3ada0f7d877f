"""The kombu transport ``gristmill``: Redis or Valkey with atomic claims, leases, a doorbell, a capacity gate.

START HERE: ``Channel.claim_next`` is what happens between two messages. Stock kombu pops a message and
registers it afterwards, so that a kill in between loses it; it also redelivers by the clients' clocks, and
waits on one queue at a time. Here each of those is a script on the server (``message_queue.py``), and what
is claimed belongs to the process (``claims.py``), not to the connection. An idle consumer waits for one
stream, the bell.

Transport options of our own: ``gate`` (see gate.py), ``claims`` (see claims.py), ``replicas`` (to wait for at
a put). Without them every active queue is claimable, and claims die with their channel. Overridden
privates of kombu: this is why kombu's minor is pinned.
"""

# kombu and Celery carry no types that strict checking could use.
# pyright: basic
from __future__ import annotations

import logging
import re
from enum import Enum
from queue import Empty
from time import monotonic
from typing import Any

import redis
from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.transport import redis as stock
from kombu.utils.json import dumps, loads
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..schemas import keys
from ..schemas.errors import InvalidRequest
from ..schemas.job import DEFAULT_TENANT, TENANT_PATTERN
from ..schemas.queues import TENANT_HEADER
from .claims import Claims
from .gate import Gate, Waker
from .message_queue import ClaimedMessage, MessageQueue

log = logging.getLogger(__name__)

SCHEME = "gristmill"
ASK_AGAIN_S = 0.5
"""How long a closed gate goes unasked when nobody pokes."""
SWEEP_EVERY_S = 1.0
MAX_CONNECTIONS = 1024
_TENANT = re.compile(TENANT_PATTERN)


def sweep_period_s(lease_s: float) -> float:
    """A second; sooner where leases are short."""
    return min(SWEEP_EVERY_S, lease_s / 6)


def tenant_of(message: dict[str, Any]) -> str:
    """Whose message it is. Raises InvalidRequest for a name that no queue would take."""
    tenant = (message.get("headers") or {}).get(TENANT_HEADER, DEFAULT_TENANT)
    if not isinstance(tenant, str) or not _TENANT.match(tenant):
        raise InvalidRequest(f"tenant {tenant!r} does not match {TENANT_PATTERN}; rename it", param="tenant")
    return tenant


class _Waits(Enum):
    """What a consumer waits for before it claims again."""

    NOTHING = "its waker is set"
    BELL = "a message: the bell is being listened to"
    GATE = "capacity"
    ROOM = "an acknowledgement: it has as many messages as it may"


class QoS(virtual.QoS):
    """kombu's view of ``Claims``. Closing a channel hands nothing back: the claims live on."""

    def __init__(self, channel: Channel, prefetch_count: int = 0) -> None:
        super().__init__(channel, prefetch_count)
        self._on_collect.cancel()
        self.claims: Claims = channel.claims
        self._swept_at = 0.0

    def can_consume(self) -> bool:
        return not self.prefetch_count or len(self.claims) < self.prefetch_count

    def can_consume_max_estimate(self) -> int | None:
        return max(self.prefetch_count - len(self.claims), 0) if self.prefetch_count else None

    def append(self, _message: Any, delivery_tag: str) -> None:
        """The claim exists already: from here on it is renewed."""
        self.claims.add(delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        self.claims.ack(delivery_tag)

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        """Back to the head of the queue; or, as AMQP has it, to the dead letters."""
        if requeue:
            self.claims.requeue(delivery_tag)
        else:
            self.claims.bury(delivery_tag, "rejected")

    def bury(self, delivery_tag: str, reason: str) -> None:
        """Among the dead letters, with ``reason`` for the person who looks: it is not delivered again."""
        self.claims.bury(delivery_tag, reason)

    def leave(self, delivery_tag: str) -> None:
        """Stop renewing and say nothing: the message comes back when its lease runs out."""
        self.claims.leave(delivery_tag)

    def restore_unacked(self, _client: Any = None) -> list[Any]:
        self.claims.requeue(*self.claims.held)
        return []

    def restore_unacked_once(self, _stderr: Any = None) -> None:
        """Nothing: see the class."""

    def restore_visible(self, *_: Any, **__: Any) -> None:
        """kombu's periodic hook; without an event loop it is called whenever there is nothing to read."""
        period_s = 0.9 * sweep_period_s(self.claims.lease_s)  # a timer that is a little early counts
        if monotonic() - self._swept_at >= period_s:
            self._swept_at = monotonic()
            self.claims.sweep(period_s)


class Poller(stock.MultiChannelPoller):
    """Watches, per channel, the waker, the bell (kombu calls that connection BRPOP) and remote control."""

    def on_poll_start(self) -> None:
        for channel in self._channels:
            if channel.active_queues:
                self._watch_waker(channel)
                channel.look_around()
            if channel.active_fanout_queues:
                self._register_LISTEN(channel)

    def listen_for_bell(self, channel: Channel) -> None:
        self._register_BRPOP(channel)

    def on_readable(self, fileno: int) -> Any:
        """No look at the prefetch count here: only a claim takes a message, and it looks itself."""
        if found := self._fd_to_chan.get(fileno):
            channel, kind = found
            return channel.handlers[kind]()
        return None

    def get(self, callback: Any, timeout: float | None = None) -> None:
        """One turn for consumers without an event loop; shorter than asked, since a closed gate is silent."""
        super().get(callback, ASK_AGAIN_S if timeout is None else min(timeout, ASK_AGAIN_S))

    def discard(self, channel: Channel) -> None:
        super().discard(channel)
        fd = channel.waker.fileno()
        if self._fd_to_chan.get(fd, (None,))[0] is channel:
            del self._fd_to_chan[fd]
            try:
                self._unregister_from_poll(fd)
            except (KeyError, ValueError, OSError):  # the loop has forgotten it already
                return

    def _watch_waker(self, channel: Channel) -> None:
        fd = channel.waker.fileno()
        if self._fd_to_chan.get(fd) != (channel, "WAKE"):
            self._fd_to_chan[fd] = (channel, "WAKE")
            self.poller.register(fd, self.eventflags)

    def _update_brpop_polling(self) -> None:
        """Nothing to pause: the bell's reply carries no message."""


class Channel(stock.Channel):
    """One consumer or producer."""

    QoS = QoS
    connection: Any

    gate: Gate | None = None
    claims: Claims
    visibility_timeout: float = 60.0
    socket_timeout = 10.0
    socket_connect_timeout = 5.0
    socket_keepalive = True
    max_connections = MAX_CONNECTIONS
    replicas = 0
    from_transport_options = (*stock.Channel.from_transport_options, "gate", "claims", "replicas")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.waker = Waker()
        self._waits = _Waits.NOTHING
        self._ask_again_at = 0.0
        self._bell_id = "0-0"
        self._asked: frozenset[str] = frozenset()
        self._unacknowledged: set[str] = set()
        self._producer_queue: MessageQueue | None = None
        super().__init__(*args, **kwargs)
        if not hasattr(self, "claims"):
            self.claims = Claims(lease_s=self.visibility_timeout)
        self.handlers = {"BRPOP": self._on_bell, "WAKE": self._on_wake, "LISTEN": self._receive}

    # ---- consuming

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        if not self._active_queues:  # the first one
            self.waker.set()
            self.claims.watch(self.waker)
            if self.gate is not None:
                self.gate.attach(self.waker)
        if no_ack:
            self._unacknowledged.add(queue)
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def look_around(self) -> None:
        """Called on each turn of the loop: wake up if what we wait for may have come."""
        if self.gate is not None:
            self.gate.turn()
        match self._waits:
            case _Waits.GATE if monotonic() >= self._ask_again_at:
                self.waker.set()
            case _Waits.ROOM if self.qos.can_consume():
                self.waker.set()
            case _Waits.BELL if not self._in_poll:  # the connection broke
                self.waker.set()
            case _:
                return

    def claim_next(self) -> ClaimedMessage | None:
        """Claim one message if there is room, the gate is open and one waits; else start waiting."""
        if not self.qos.can_consume():
            self._waits = _Waits.ROOM
            return None
        queues = self._claimable()
        if not queues:
            self._waits, self._ask_again_at = _Waits.GATE, monotonic() + ASK_AGAIN_S
            return None
        if self._waits is _Waits.BELL and self._in_poll and self._asked.issuperset(queues):
            return None  # a poke that opened nothing: the bell will tell
        found = self.message_queue.claim(queues, self._unacknowledged)
        if isinstance(found, str):
            self._waits, self._bell_id, self._asked = _Waits.BELL, found, frozenset(queues)
            if not self._in_poll:  # one that listens already does so from an earlier id
                self.connection.cycle.listen_for_bell(self)
            return None
        self._waits = _Waits.NOTHING
        self.waker.set()  # there may be more
        return found

    @property
    def message_queue(self) -> MessageQueue:
        """The queues through the claims' own connections, which outlive this channel."""
        return self.claims.open(self._claims_client)

    def _claimable(self) -> list[str]:
        active = self.active_queues
        return active if self.gate is None else [name for name in self.gate.claimable() if name in active]

    def _on_wake(self) -> bool:
        self.waker.clear()
        return self._deliver_next()

    def _on_bell(self) -> bool:
        self._brpop_read()
        return self._deliver_next()

    def _deliver_next(self) -> bool:
        """Raises Empty where kombu expects it: when there was nothing to deliver."""
        claimed = self.claim_next()
        if claimed is None:
            raise Empty
        message = self._decoded(claimed)
        if message is None:
            raise Empty
        self.connection._deliver(message, claimed.queue)
        return True

    def _decoded(self, claimed: ClaimedMessage) -> dict[str, Any] | None:
        """As kombu knows messages. One that cannot be read is buried: it would come back for ever."""
        try:
            message: dict[str, Any] = loads(claimed.payload.decode())
            properties, headers = message["properties"], message["headers"]
            info = properties["delivery_info"]
        except (ValueError, KeyError, TypeError) as exc:
            self.claims.bury(claimed.tag, f"not a message: {type(exc).__name__}")
            return None
        properties.update(delivery_tag=claimed.tag, delivery_count=claimed.deliveries)
        info.update(redelivered=claimed.deliveries > 1, queue=claimed.queue, tenant=claimed.tenant)
        headers["redelivered"] = claimed.deliveries > 1
        return message

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Ask for the next ring after the one the last claim saw. The reply is read by ``_brpop_read``."""
        connection = self.client.connection
        self._in_poll, self._brpop_sent_at = connection, monotonic()
        block_ms = int((timeout or self.brpop_timeout) * 1000)
        connection.send_command("XREAD", "COUNT", 1, "BLOCK", block_ms, "STREAMS", keys.BELL, self._bell_id)

    def _brpop_read(self, **_: Any) -> None:
        connection = self.client.connection
        try:
            connection.read_response()
        except self.connection_errors:
            connection.disconnect()
            raise
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()

    def _poll_error(self, kind: str, **_: Any) -> None:
        self.handlers[kind]()

    def basic_get(self, queue: str, no_ack: bool = False, **_: Any) -> Any:
        """One message without waiting, whatever the gate says; None if there is none."""
        claimed = self.message_queue.claim([queue], [queue] if no_ack else ())
        if isinstance(claimed, str) or (payload := self._decoded(claimed)) is None:
            return None
        message = self.Message(payload, channel=self)
        if not no_ack:
            self.qos.append(message, message.delivery_tag)
        return message

    # ---- producing and managing

    def _put(self, queue: str, message: dict[str, Any], **_: Any) -> None:
        """Accepted when this returns. Raises redis-py's, InvalidRequest for a bad tenant, NotReplicated."""
        tenant = tenant_of(message)
        base = message["properties"]["delivery_tag"]
        self.producer_queue.put(queue, tenant, base, dumps(message), self._expires.get(queue))

    @property
    def producer_queue(self) -> MessageQueue:
        """The queues through this channel's own connections."""
        queue = self._producer_queue
        if queue is None or queue.client.connection_pool is not self.pool:  # closed and opened again
            self._producer_queue = queue = MessageQueue(
                self._create_client(),
                lease_s=self.claims.lease_s,
                replicas=self.replicas,
                replica_wait_s=0.8 * (self.socket_timeout or 1.0),  # its answer must come in time
            )
        return queue

    def _size(self, queue: str) -> int:
        return self.producer_queue.depth(queue)

    def _purge(self, queue: str) -> int:
        return self.producer_queue.purge(queue)

    def _has_queue(self, queue: str, **_: Any) -> bool:
        with self.conn_or_acquire() as client:
            return bool(client.exists(keys.queue_tenants(queue)))

    def _delete(
        self, queue: str, exchange: str, routing_key: str, pattern: str, *args: Any, **kw: Any
    ) -> None:
        super()._delete(queue, exchange, routing_key, pattern, *args, **kw)
        self._purge(queue)

    # ---- connections

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:
        """Explicit limits and no hidden retries: a renewal that redis-py repeats for a minute has expired."""
        return super()._connparams(asynchronous) | {"retry": Retry(NoBackoff(), 0), "protocol": 2}

    def _claims_client(self) -> redis.Redis:
        """A client that outlives this channel. A renewal must fail in time for another one to be tried."""
        params = self._connparams()
        limit_s = max(0.2, self.claims.lease_s / 6)
        params["socket_timeout"] = min(limit_s, self.socket_timeout or limit_s)
        return redis.Redis(connection_pool=redis.ConnectionPool(**params))

    def close(self) -> None:
        self._in_poll = None  # the bell's reply may be lost: it carries no message
        self.claims.unwatch(self.waker)
        if self.gate is not None:
            self.gate.detach(self.waker)
        super().close()
        self.waker.close()


class Transport(stock.Transport):
    """Registered as ``gristmill`` when this module is imported."""

    Channel = Channel
    driver_name = SCHEME

    @property
    def supports_batch_publish(self) -> bool:
        """A put is one script and confirmed; there is nothing to gain from kombu's pipelines."""
        return False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cycle = Poller()


TRANSPORT_ALIASES[SCHEME] = f"{__name__}:Transport"
