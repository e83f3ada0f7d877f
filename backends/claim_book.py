"""ClaimBook: what this process has claimed and not finished, whatever the broker.

It outlives the connections the claims came through: a consumer that reconnects finds its claims here, still
leased, and acknowledges them as if nothing had happened. What the broker could not be told during an outage
is owed, and said when it answers again. ``claims.py`` keeps it for Redis, ``sqs_claims.py`` for SQS.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import ClassVar

from .gate import Waker

log = logging.getLogger(__name__)

MAX_RETRY_S = 1.0


class Debt(Enum):
    """What the broker is still to be told of a claim."""

    ACK = "ack"
    REQUEUE = "requeue"


class ClaimBook(ABC):
    """Thread-safe. ``errors`` is what its broker raises while it does not answer.

    ``on_overdue(job_ids)`` hears, in a thread of its own, of jobs whose claims the broker will not prolong
    much longer: hand them back.
    """

    errors: ClassVar[tuple[type[Exception], ...]]

    def __init__(self, *, lease_s: float, renew_every_s: float | None = None) -> None:
        self.lease_s = lease_s
        self.renew_every_s = min(renew_every_s or lease_s / 3, lease_s / 3)
        self.on_overdue: Callable[[Sequence[str]], None] = lambda _job_ids: None
        self._held: dict[str, None] = {}  # in the order they were claimed
        self._owed: dict[str, Debt] = {}
        self._lock = threading.Lock()
        self._outage = False
        self._wakers: set[Waker] = set()

    @abstractmethod
    def renew(self) -> list[str]:
        """Settle what is owed, then prolong every lease in hand. Returns the lost ones. Raises ``errors``."""

    @abstractmethod
    def bury(self, tag: str, reason: str) -> None:
        """Not to be delivered again: a dead letter. Unheard, its lease runs out, and who gets it next buries
        it."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections. What is in hand stays ours until its lease runs out."""

    @abstractmethod
    def _tell(self, tags: list[str], debt: Debt) -> list[str]:
        """Pay a debt. Returns the tags that were spent. Raises ``errors``."""

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
        return self._finish(tags, Debt.ACK)

    def requeue(self, *tags: str) -> list[str]:
        """Back to the head of the queue, the first tag foremost. Otherwise as ``ack``."""
        return self._finish(tags, Debt.REQUEUE)

    def settle(self) -> None:
        """Say what is owed. Raises ``errors``."""
        for debt in Debt:
            with self._lock:
                tags = [tag for tag, owed in self._owed.items() if owed is debt]
            if tags:  # a spent tag may be our own doing: the answer was lost, not the request
                self._tell(tags, debt)

    def hand_back(self) -> None:
        """All that is in hand, at the end of the process. Raises ``errors``."""
        self.requeue(*self.held)
        self.settle()

    @property
    def troubled(self) -> bool:
        """The broker owes us an answer: try again soon."""
        return self._outage or bool(self._owed)

    def watch(self, waker: Waker) -> None:
        """Wake it when a claim ends: a consumer may wait for room."""
        with self._lock:
            self._wakers.add(waker)

    def unwatch(self, waker: Waker) -> None:
        with self._lock:
            self._wakers.discard(waker)

    def _finish(self, tags: Iterable[str], debt: Debt) -> list[str]:
        tags = list(tags)
        if not tags:  # a worker may end before it has a connection to the broker
            return []
        with self._lock:
            for tag in tags:
                self._held.pop(tag, None)
        self._wake()
        try:
            lost = self._tell(tags, debt)
        except self.errors as exc:
            self._outage = True
            with self._lock:  # not before: a renewal that settles meanwhile would tell them a second time
                self._owed.update(dict.fromkeys(tags, debt))
            log.warning("claims.owed", extra={"debt": debt.value, "count": len(tags), "reason": repr(exc)})
            return []
        self._lose(lost)
        return lost

    def _lose(self, tags: list[str]) -> None:
        for tag in tags:
            with self._lock:
                self._held.pop(tag, None)
            log.warning("claim.lost", extra={"tag": tag})

    def _wake(self) -> None:
        with self._lock:
            wakers = tuple(self._wakers)
        for waker in wakers:
            waker.set()


class Renewer(threading.Thread):
    """Renews ``claims`` in time, and at least every second while the broker is away."""

    def __init__(self, claims: ClaimBook) -> None:
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
            except self.claims.errors as exc:
                late_s = round(asked_at - renewed_at, 1)
                log.warning("lease.not_renewed", extra={"for_s": late_s, "reason": repr(exc)})
            else:
                renewed_at = asked_at

    def stop(self) -> None:
        """Returns once the thread renews nothing more."""
        self._done.set()
        if self.is_alive():
            self.join(2 * self.claims.lease_s)
