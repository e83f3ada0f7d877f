"""Claims of the Redis transport: the ClaimBook whose broker is a ``MessageQueue``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import redis

from .claim_book import ClaimBook, Debt
from .message_queue import MessageQueue
from .redis import REDIS_ERRORS

log = logging.getLogger(__name__)

RENEW_BATCH = 1000


class Claims(ClaimBook):
    """``open`` it once a connection is known; before that it is empty and says nothing."""

    errors = REDIS_ERRORS

    def __init__(self, *, lease_s: float, renew_every_s: float | None = None) -> None:
        super().__init__(lease_s=lease_s, renew_every_s=renew_every_s)
        self.queue: MessageQueue | None = None
        self._held_off_until = 0.0  # by the monotonic clock: when the hold ends that the log has told of

    def open(self, connect: Callable[[], redis.Redis]) -> MessageQueue:
        """The queue to claim from; ``connect`` is called once, for a client of our own."""
        with self._lock:
            if self.queue is None:
                self.queue = MessageQueue(connect(), lease_s=self.lease_s)
            return self.queue

    def bury(self, tag: str, reason: str) -> None:
        """See ClaimBook."""
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

    def renew(self) -> list[str]:
        """See ClaimBook."""
        if self.queue is None:
            return []
        try:
            self.settle()
            lost: list[str] = []
            tags = self.held
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
        try:
            swept = self.queue.sweep(period_s=period_s)
        except REDIS_ERRORS:
            self._outage = True
            raise
        self._outage = False
        if swept.returned:
            log.warning("claims.expired", extra={"count": swept.returned})
        now = time.monotonic()
        if swept.hold_s and now >= self._held_off_until:
            log.info("claims.held_off", extra={"hold_s": swept.hold_s})
            self._held_off_until = now + swept.hold_s
        return swept.returned

    def close(self) -> None:
        """See ClaimBook."""
        if self.queue is not None:
            self.queue.client.close()

    def _tell(self, tags: list[str], debt: Debt) -> list[str]:
        assert self.queue is not None, "a claim without a queue"
        done = self.queue.ack(*tags) if debt is Debt.ACK else self.queue.requeue(*tags)
        with self._lock:
            for tag in tags:
                self._owed.pop(tag, None)
        return [tag for tag, ours in zip(tags, done, strict=True) if not ours]
