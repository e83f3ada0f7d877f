"""Claims of the SQS transport: the ClaimBook whose broker leases by visibility timeout.

A lease is prolonged by ChangeMessageVisibility, ended by DeleteMessage, and handed back by a visibility of 0.
Acknowledgements are said by a thread of this class, ten at a time: the consumer's loop never waits for HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass

from ..schemas.errors import BrokerUnavailable, GristmillError, Misconfigured
from .claim_book import MAX_RETRY_S, ClaimBook, Debt
from .dead import DeadLetters
from .sqs_queues import SqsMessage, SqsQueues

log = logging.getLogger(__name__)

MAX_HOLD_S = 11 * 3600.0
"""SQS prolongs no lease beyond 12 hours after the receive."""
RENEW_BATCH = 100
LINGER_S = 3.0
"""A long poll is answered within that, once there is a message."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the book must know of a claim. ``payload`` is the message as it came; once it was read, with the
    request filled in that lay in the object ``request``."""

    message: SqsMessage
    payload: str
    job_id: str | None
    tenant: str
    received_at: float
    """By the book's clock, from before the receive was sent."""
    request: str | None = None


class SqsClaims(ClaimBook):
    """``take`` begins a claim; the rest is ClaimBook's.

    ``done`` hears of acknowledged receipts, in a thread of ours.
    """

    errors = (BrokerUnavailable, Misconfigured)

    def __init__(
        self,
        queues: SqsQueues,
        dead: DeadLetters,
        *,
        lease_s: float,
        renew_every_s: float | None = None,
        max_hold_s: float = MAX_HOLD_S,
        clock: Callable[[], float] = time.monotonic,
        done: Callable[[Receipt], None] = lambda _receipt: None,
    ) -> None:
        super().__init__(lease_s=lease_s, renew_every_s=renew_every_s)
        self.clock = clock
        self._queues, self._dead, self._done = queues, dead, done
        self._max_hold_s = max_hold_s
        self._receipts: dict[str, Receipt] = {}
        self._overdue: set[str] = set()
        self._asking = 0
        self._something_owed = threading.Event()
        self._closing = threading.Event()
        self._settler: threading.Thread | None = None

    def take(self, receipt: Receipt) -> None:
        """Ours from now on, whether or not it has been delivered yet."""
        with self._lock:
            self._receipts[receipt.message.tag] = receipt
            self._held[receipt.message.tag] = None
            if self._settler is None:
                self._settler = threading.Thread(target=self._settle_forever, name="sqs-settle", daemon=True)
                self._settler.start()

    def amend(self, receipt: Receipt) -> bool:
        """Know more of a claim. False: it is not ours any more."""
        with self._lock:
            ours = receipt.message.tag in self._held
            if ours:
                self._receipts[receipt.message.tag] = receipt
            return ours

    def leave(self, tag: str) -> None:
        """See ClaimBook."""
        super().leave(tag)
        self._forget([tag])

    def renew(self) -> list[str]:
        """See ClaimBook."""
        asked_at = self.clock()
        tags = self.held
        lost: list[str] = []
        try:  # what is owed has a thread of its own: a queue that deletes nothing must not cost the leases
            for start in range(0, len(tags), RENEW_BATCH):
                some = self._messages(tags[start : start + RENEW_BATCH])
                lost += [message.tag for message in self._queues.lease(some, self.lease_s)]
        except self.errors:
            self._outage = True
            raise
        self._outage = False
        with self._lock:  # finished meanwhile: not lost
            lost = [tag for tag in lost if tag in self._held]
        self._lose(lost)
        self._forget(lost)
        self._tell_overdue(asked_at)
        return lost

    def bury(self, tag: str, reason: str) -> None:
        """See ClaimBook. Recorded first, deleted second."""
        with self._lock:
            self._held.pop(tag, None)
            receipt = self._receipts.get(tag)
        self._wake()
        if receipt is None:
            return
        message = receipt.message
        try:
            self._dead.add(
                message.queue,
                message.message_id,
                receipt.payload,
                tenant=receipt.tenant,
                reason=reason,
                job_id=receipt.job_id,
            )
        except GristmillError as exc:
            log.warning("message.not_buried", extra={"tag": tag, "reason": exc.message})
            self._forget([tag])
            return
        log.error("message.buried", extra={"tag": tag, "reason": reason})
        self._finish([tag], Debt.ACK)

    def hand_back(self) -> None:
        """See ClaimBook. Lingers while a long poll of ours is under way: it may be given what we have just
        handed back, which would then be nobody's until the lease ran out."""
        until = time.monotonic() + LINGER_S
        while True:
            super().hand_back()
            if not self._asking or time.monotonic() >= until:
                return
            self._closing.wait(LINGER_S / 30)

    @contextmanager
    def asking(self) -> Generator[None]:
        """Around every receive."""
        with self._lock:
            self._asking += 1
        try:
            yield
        finally:
            with self._lock:
                self._asking -= 1

    @property
    def troubled(self) -> bool:
        """See ClaimBook. Debts have a thread of their own."""
        return self._outage

    def close(self) -> None:
        """See ClaimBook. Says what is owed first, once."""
        self._closing.set()
        self._something_owed.set()
        if self._settler is not None:
            self._settler.join(self.lease_s)
        self._queues.close()
        self._dead.close()

    def _finish(self, tags: Iterable[str], debt: Debt) -> list[str]:
        """Owed from now on. What was lost shows in the next renewal, or harms nobody."""
        with self._lock:
            for tag in tags:
                self._held.pop(tag, None)
                if tag in self._receipts:
                    self._owed[tag] = debt
        self._something_owed.set()
        self._wake()
        return []

    def _tell(self, tags: list[str], debt: Debt) -> list[str]:
        messages = self._messages(tags)
        spent = self._queues.delete(messages) if debt is Debt.ACK else self._queues.lease(messages, 0)
        with self._lock:
            for tag in tags:
                self._owed.pop(tag, None)
            told = [self._receipts[tag] for tag in tags if tag in self._receipts]
        if debt is Debt.ACK:
            for receipt in told:
                self._done(receipt)
        self._forget(tags)
        return [message.tag for message in spent]

    def _settle_forever(self) -> None:
        while not self._closing.is_set() or self._owed:
            self._something_owed.wait()
            self._something_owed.clear()
            try:
                self.settle()
            except (BrokerUnavailable, Misconfigured) as exc:
                self._outage = True
                log.warning("claims.owed", extra={"count": len(self._owed), "reason": exc.message})
                if self._closing.wait(MAX_RETRY_S):
                    return
                self._something_owed.set()

    def _tell_overdue(self, now: float) -> None:
        with self._lock:
            over = {
                tag: receipt.job_id
                for tag, receipt in self._receipts.items()
                if tag in self._held
                and tag not in self._overdue
                and now - receipt.received_at >= self._max_hold_s
            }
            self._overdue.update(over)
        for tag, job_id in over.items():
            log.warning("claim.overdue", extra={"tag": tag, "job_id": job_id})
        if jobs := [job_id for job_id in over.values() if job_id is not None]:
            # Who hands them back waits for the state server: not in the thread that renews every lease.
            threading.Thread(target=self.on_overdue, args=(jobs,), name="sqs-overdue", daemon=True).start()

    def _messages(self, tags: Iterable[str]) -> list[SqsMessage]:
        with self._lock:
            return [self._receipts[tag].message for tag in tags if tag in self._receipts]

    def _forget(self, tags: Iterable[str]) -> None:
        with self._lock:
            for tag in tags:
                if tag not in self._held:
                    self._receipts.pop(tag, None)
                    self._overdue.discard(tag)
