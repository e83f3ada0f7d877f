"""Receiver: asks SQS for messages while there is room, and keeps what came more than asked for.

A look at the queues in their order comes first, without waiting: what is most urgent wins. If all are empty,
a long poll listens on each. A long poll cannot be called back, so that its message may find no room any more:
it waits here under its lease for a few seconds, then goes back for somebody else.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..schemas.errors import GristmillError
from .sqs_claims import Receipt, SqsClaims
from .sqs_queues import BATCH, LONG_POLL_S, SqsMessage, SqsQueues

log = logging.getLogger(__name__)

SURPLUS_S = 5.0
"""How long a message that found no room is kept from an idle neighbour."""
LOOK_UP_S = 1.0
"""How old what we know of paused queues may be, and how long a stale surplus may go unnoticed."""
TROUBLE_FIRST_S, TROUBLE_MAX_S = 0.2, 5.0


@dataclass(frozen=True, slots=True)
class Delivery:
    """A claimed message as kombu knows it."""

    queue: str
    tag: str
    message: dict[str, Any]
    at: float
    """When it came, by ``time.monotonic``."""


class Receiver:
    """``take`` is for the consumer's loop and never waits; all waiting is done by threads of this class.

    ``read`` makes a receipt and kombu's message of what was received, without asking anybody; None: it cannot
    be read. ``fill_in`` completes the message of a claim, however long that takes; None: not deliverable now.
    ``paused`` says whether claims from a queue are stopped. ``wake`` says that something has come.
    """

    def __init__(
        self,
        queues: SqsQueues,
        claims: SqsClaims,
        *,
        read: Callable[[SqsMessage, float], tuple[Receipt, dict[str, Any]] | None],
        fill_in: Callable[[Receipt, dict[str, Any]], dict[str, Any] | None],
        paused: Callable[[str], bool],
        wake: Callable[[], None],
    ) -> None:
        self._queues, self._claims = queues, claims
        self._read, self._fill_in = read, fill_in
        self._ask_paused, self._wake = paused, wake
        self._changed = threading.Condition()
        self._wanted: tuple[str, ...] = ()
        self._known: dict[str, None] = {}  # whatever was wanted so far
        self._waiting: deque[Delivery] = deque()
        self._listening: set[str] = set()
        self._paused: frozenset[str] = frozenset()
        self._paused_at = float("-inf")
        self._batch = 1
        self._stopped = False
        self._trouble_s = 0.0
        self._thread = threading.Thread(target=self._run, name="sqs-receive", daemon=True)

    def take(self, wanted: Sequence[str]) -> Delivery | None:
        """The next message of the first queue of ``wanted`` that has one here; if none, have it fetched.

        No queue wanted means: no room.
        """
        with self._changed:
            if not self._thread.is_alive() and not self._stopped:
                self._thread.start()
            for queue in wanted:
                for delivery in self._waiting:
                    if delivery.queue == queue and queue not in self._paused:
                        self._waiting.remove(delivery)
                        self._changed.notify_all()  # there may be room for more
                        return delivery
            if self._waiting and not wanted:
                self._batch = 1  # it was more than there was room for
            if self._wanted != (wanted := tuple(wanted)):
                self._wanted = wanted
                self._known.update(dict.fromkeys(wanted))
                self._changed.notify_all()
            return None

    @property
    def surplus(self) -> int:
        """Messages claimed and not delivered."""
        return len(self._waiting)

    def stop(self) -> None:
        """Ask for nothing more, hand back what was not delivered. A long poll under way ends by itself."""
        with self._changed:
            self._stopped = True
            waiting, self._waiting = self._waiting, deque()
            self._changed.notify_all()
        self._claims.requeue(*(delivery.tag for delivery in waiting))

    # ---- the thread that decides

    def _run(self) -> None:
        while queues := self._next():
            try:
                found = self._look(queues)
            except GristmillError as exc:
                self._wait_out(exc)
            else:
                if not found:
                    self._listen(queues)

    def _next(self) -> tuple[str, ...]:
        """The queues to ask, once there are any and nothing of theirs waits here. None: it is over."""
        with self._changed:
            while not self._stopped:
                self._hand_back_surplus()
                self._look_up_paused()
                queues = tuple(queue for queue in self._wanted if queue not in self._paused)
                if queues and not self._has_come(queues):
                    return queues
                self._changed.wait(LOOK_UP_S)
            return ()

    def _look(self, queues: Sequence[str]) -> bool:
        """Whether one of them, in order, had something now. One that is listened to has nothing."""
        return any(queue not in self._listening and self._receive(queue, 0) for queue in queues)

    def _listen(self, queues: tuple[str, ...]) -> None:
        """Long polls on all of them, until something has come or something else is wanted."""
        with self._changed:
            wanted, paused = self._wanted, self._paused
            while (
                not self._stopped and not self._waiting and (wanted, paused) == (self._wanted, self._paused)
            ):
                for queue in queues:
                    if queue not in self._listening:
                        self._listening.add(queue)
                        threading.Thread(
                            target=self._long_poll, args=(queue,), name=f"sqs-{queue}", daemon=True
                        ).start()
                self._changed.wait(LOOK_UP_S)
                self._hand_back_surplus()
                self._look_up_paused()
                if (wanted, paused) != (self._wanted, self._paused):
                    return

    def _has_come(self, queues: Sequence[str]) -> bool:
        return any(delivery.queue in queues for delivery in self._waiting)

    def _long_poll(self, queue: str) -> None:
        try:
            self._receive(queue, LONG_POLL_S)
        except GristmillError as exc:
            self._wait_out(exc)
        finally:
            with self._changed:
                self._listening.discard(queue)
                self._changed.notify_all()

    def _receive(self, queue: str, wait_s: int) -> bool:
        with self._claims.asking():
            return self._receive_now(queue, wait_s)

    def _receive_now(self, queue: str, wait_s: int) -> bool:
        asked_at = self._claims.clock()
        count = self._batch
        messages = self._queues.receive(queue, count=count, lease_s=self._claims.lease_s, wait_s=wait_s)
        self._trouble_s = 0.0
        with self._changed:
            if len(messages) == count:
                self._batch = min(BATCH, 2 * count)
        found = [pair for message in messages if (pair := self._read(message, asked_at)) is not None]
        for receipt, _ in found:  # before anything is looked up: renewed from now on, however long that takes
            self._claims.take(receipt)
        return sum(self._deliver(queue, *pair) for pair in found) > 0

    def _deliver(self, queue: str, receipt: Receipt, message: dict[str, Any]) -> bool:
        tag = receipt.message.tag
        content = self._fill_in(receipt, message)
        if content is None:
            self._claims.leave(tag)
            return False
        with self._changed:
            stopped = self._stopped
            if not stopped:
                self._waiting.append(Delivery(queue, tag, content, time.monotonic()))
            self._changed.notify_all()
        if stopped:
            self._claims.requeue(tag)
        else:
            self._wake()
        return True

    def _hand_back_surplus(self) -> None:
        now = time.monotonic()
        stale = [delivery for delivery in self._waiting if now - delivery.at >= SURPLUS_S]
        for delivery in stale:
            self._waiting.remove(delivery)
        if stale:
            log.info("claims.surplus", extra={"count": len(stale)})
            self._claims.requeue(*(delivery.tag for delivery in stale))

    def _look_up_paused(self) -> None:
        """Called with the lock, which it lets go of while it asks."""
        now = time.monotonic()
        if now - self._paused_at < LOOK_UP_S or not self._wanted:
            return
        self._paused_at, known = now, tuple(self._known)
        self._changed.release()
        try:
            paused = frozenset(queue for queue in known if self._ask_paused(queue))
        except GristmillError as exc:
            log.warning("queues.flags_unknown", extra={"code": exc.code, "reason": exc.message})
            paused = self._paused
        finally:
            self._changed.acquire()
        if paused != self._paused:
            log.info("queues.paused", extra={"queues": sorted(paused)})
            self._paused = paused
            self._wake()

    def _wait_out(self, exc: GristmillError) -> None:
        """SQS does not answer, or not to us: what is mended there needs no restart here."""
        with self._changed:
            if not self._trouble_s:
                log.warning("sqs.unavailable", extra={"code": exc.code, "reason": exc.message})
            self._trouble_s = min(TROUBLE_MAX_S, 2 * self._trouble_s or TROUBLE_FIRST_S)
            self._changed.wait_for(lambda: self._stopped, self._trouble_s)
