"""Claims: what this process has claimed and not finished. It outlives the connections they came through.

A consumer that reconnects finds its claims here, still leased, and acknowledges them as if nothing had
happened: nothing about a claim belongs to a connection. What the broker could not be told during an outage
is owed, and said when it answers again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from enum import Enum

import redis

from .gate import Waker
from .message_queue import MessageQueue
from .redis import REDIS_ERRORS

log = logging.getLogger(__name__)

RENEW_BATCH = 1000
MAX_RETRY_S = 1.0


class _Debt(Enum):
    ACK = "ack"
    REQUEUE = "requeue"


class Claims:
    """Thread-safe. ``open`` once a connection is known; before that it is empty and says nothing.

    ``on_lost(tag)`` hears of a claim that is no longer ours (in the thread that noticed, so be quick);
    ``should_renew(tag)`` may let a lease run out by saying no.
    """

    def __init__(self, *, lease_s: float, renew_every_s: float | None = None) -> None:
        self.lease_s = lease_s
        self.renew_every_s = min(renew_every_s or lease_s / 3, lease_s / 3)
        self.on_lost: Callable[[str], None] = lambda _tag: None
        self.should_renew: Callable[[str], bool] = lambda _tag: True
        self.queue: MessageQueue | None = None
        self._held: dict[str, None] = {}  # in the order they were claimed
        self._owed: dict[str, _Debt] = {}
        self._lock = threading.Lock()
        self._outage = False
        self._wakers: set[Waker] = set()

    def open(self, connect: Callable[[], redis.Redis]) -> MessageQueue:
        """The queue to claim from; ``connect`` is called once, for a client of our own."""
        with self._lock:
            if self.queue is None:
                self.queue = MessageQueue(connect(), lease_s=self.lease_s)
            return self.queue

    @property
    def held(self) -> tuple[str, ...]:
        """Tags in hand, oldest first."""
        with self._lock:
            return tuple(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def add(self, tag: str) -> None:
        """Ours from now on: its lease is renewed until one of the following."""
        with self._lock:
            self._held[tag] = None

    def leave(self, tag: str) -> None:
        """Say nothing about it any more: the lease brings it back."""
        with self._lock:
            self._held.pop(tag, None)
            self._owed.pop(tag, None)
        self._wake()

    def ack(self, *tags: str) -> list[str]:
        """Done with. Returns the lost ones. What the broker cannot be told now is told later."""
        return self._finish(tags, _Debt.ACK)

    def requeue(self, *tags: str) -> list[str]:
        """Back to the head of the queue, the first tag foremost. Otherwise as ``ack``."""
        return self._finish(tags, _Debt.REQUEUE)

    def bury(self, tag: str, reason: str) -> None:
        """Not to be delivered again: a dead letter. Unheard, its lease runs out, and who gets it next buries
        it."""
        with self._lock:
            self._held.pop(tag, None)
        self._wake()
        assert self.queue is not None, "a claim without a queue"
        try:
            ours = self.queue.bury(tag, reason)
        except REDIS_ERRORS as exc:
            self._outage = True
            log.warning("message.not_buried", extra={"tag": tag, "reason": repr(exc)})
            return
        log.error("message.buried", extra={"tag": tag, "reason": reason, "ours": ours})

    def settle(self) -> None:
        """Say what is owed. Raises redis-py's exceptions."""
        for debt in _Debt:
            with self._lock:
                tags = [tag for tag, owed in self._owed.items() if owed is debt]
            if tags:  # a spent tag may be our own doing: the answer was lost, not the request
                self._tell(tags, debt)

    def renew(self) -> list[str]:
        """Settle what is owed, then prolong every lease in hand. Returns the lost ones. Raises redis-py's."""
        if self.queue is None:
            return []
        try:
            self.settle()
            lost: list[str] = []
            tags = [tag for tag in self.held if self.should_renew(tag)]
            for start in range(0, len(tags), RENEW_BATCH):
                lost += self.queue.renew(tags[start : start + RENEW_BATCH])
        except REDIS_ERRORS:
            self._outage = True
            raise
        with self._lock:  # finished meanwhile: not lost
            lost = [tag for tag in lost if tag in self._held]
        self._lose(lost)
        return lost

    def sweep(self, period_s: float) -> int:
        """Hand back what others let expire. Raises redis-py's exceptions."""
        if self.queue is None:
            return 0
        outage = self._outage
        try:
            swept = self.queue.sweep(period_s=period_s, outage=outage)
        except REDIS_ERRORS:
            self._outage = True
            raise
        self._outage = False
        if swept.returned:
            log.warning("claims.expired", extra={"count": swept.returned})
        if swept.hold_s:
            log.info("claims.held_off", extra={"hold_s": swept.hold_s})
        return swept.returned

    @property
    def troubled(self) -> bool:
        """The broker owes us an answer: try again soon."""
        return self._outage or bool(self._owed)

    def close(self) -> None:
        """Close the connections. What is in hand stays ours until its lease runs out."""
        if self.queue is not None:
            self.queue.client.close()

    def watch(self, waker: Waker) -> None:
        """Wake it when a claim ends: a consumer may wait for room."""
        with self._lock:
            self._wakers.add(waker)

    def unwatch(self, waker: Waker) -> None:
        with self._lock:
            self._wakers.discard(waker)

    def _finish(self, tags: Iterable[str], debt: _Debt) -> list[str]:
        tags = list(tags)
        with self._lock:
            for tag in tags:
                self._held.pop(tag, None)
                self._owed[tag] = debt
        self._wake()
        try:
            lost = self._tell(tags, debt)
        except REDIS_ERRORS as exc:
            self._outage = True
            log.warning("claims.owed", extra={"debt": debt.value, "count": len(tags), "reason": repr(exc)})
            return []
        self._lose(lost)
        return lost

    def _tell(self, tags: list[str], debt: _Debt) -> list[str]:
        assert self.queue is not None, "a claim without a queue"
        done = self.queue.ack(*tags) if debt is _Debt.ACK else self.queue.requeue(*tags)
        with self._lock:
            for tag in tags:
                self._owed.pop(tag, None)
        return [tag for tag, ours in zip(tags, done, strict=True) if not ours]

    def _lose(self, tags: list[str]) -> None:
        for tag in tags:
            with self._lock:
                self._held.pop(tag, None)
            log.warning("claim.lost", extra={"tag": tag})
            self.on_lost(tag)

    def _wake(self) -> None:
        with self._lock:
            wakers = tuple(self._wakers)
        for waker in wakers:
            waker.set()


class Renewer(threading.Thread):
    """Renews ``claims`` in time, and at least every second while the broker is away."""

    def __init__(self, claims: Claims) -> None:
        super().__init__(name="lease", daemon=True)
        self.claims = claims
        self._done = threading.Event()

    def run(self) -> None:
        renewed_at = time.monotonic()
        while not self._done.wait(min(MAX_RETRY_S, self.claims.lease_s / 12)):
            asked_at = time.monotonic()
            if asked_at - renewed_at < self.claims.renew_every_s - 0.01 and not self.claims.troubled:
                continue
            try:
                self.claims.renew()
            except REDIS_ERRORS as exc:
                late_s = round(asked_at - renewed_at, 1)
                log.warning("lease.not_renewed", extra={"for_s": late_s, "reason": repr(exc)})
            else:
                renewed_at = asked_at

    def stop(self) -> None:
        """Returns once the thread renews nothing more."""
        self._done.set()
        if self.is_alive():
            self.join(2 * self.claims.lease_s)
