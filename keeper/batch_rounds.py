"""BatchRounds: what each batch needs next. Segments get their messages; one that was validated runs or fails;
one that was cancelled, or whose time is up, stops; and one whose rows have all ended is made final.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field

from ..backends.batches import Batches, DueBatch, NoClaim
from ..schemas.batch import Batch, BatchStatus, Phase
from ..schemas.errors import GristmillError, Misconfigured, Transient
from ..schemas.result import ErrorInfo
from .finisher import Finisher

log = logging.getLogger(__name__)

Send = Callable[[Batch, str, Phase], None]
"""Has the broker accept the message of a segment, by its id."""

Lacking = Callable[[Batch, Collection[str]], set[str]]
"""Which of these segments have plainly no message at the broker."""

LOOK_AT = 100
SEND_AT_ONCE = 500
"""Messages of a batch in one round: between two the keeper has other things to do."""
SENT_PAGE = 50
ALL = 1_000_000
HANDING_IN_S = 5.0
"""How often to look whether workers have handed in what they have of a batch that stops …"""
PATIENCE_S = 120.0
"""… and how long to wait for them: they are fenced afterwards."""
MISSED_EVERY_S = 120.0
"""How often to look for segments whose messages are lost. Those that lack one twice in a row get another:
what is on its way is somewhere else by then."""
SEARCH_AGAIN_S = 1.0
"""When a batch whose look fell into a round that had one already comes up again, the first one first."""
AGAIN_S = 5.0
BROKEN_AGAIN_S = 300.0
AT_ONCE = 2
"""Batches that are made final side by side; each may take minutes, and rounds go on meanwhile."""
FORGET_PAGE = 200


@dataclass(slots=True)
class BatchRound:
    """What one round did."""

    sent: int = 0
    """Segments that got a message."""
    started: int = 0
    """Batches whose validation is over."""
    searched: bool = False
    """It has looked for lost messages: one search a round, each of which may go through a whole backlog."""
    full: bool = False
    """There is more to do."""


@dataclass(frozen=True, slots=True)
class _Missed:
    """What a look for lost messages found."""

    at: float = float("-inf")
    segments: dict[str, int] = field(default_factory=dict[str, int])
    """Those that lacked one, each with the last attempt at it."""


class BatchRounds:
    """One thread's, but for ``_finish``. Every duty may be done twice, and by two keepers at once."""

    def __init__(
        self,
        batches: Batches,
        finisher: Finisher,
        send: Send,
        lacking: Lacking,
        *,
        keeper_id: str,
        hold_s: float,
    ) -> None:
        self._keeper_id, self._lacking = keeper_id, lacking
        self._batches, self._finisher, self._send, self._hold_s = batches, finisher, send, hold_s
        self._finishing: dict[str, threading.Thread] = {}
        self._stopping_since: dict[str, float] = {}
        self._missed: dict[str, _Missed] = {}
        self._broken: dict[str, float] = {}
        """Until when not to try again what needs a person; by the monotonic clock."""
        self._listed_to: str | None = None
        self.finished = 0
        """Batches that were made final, in all."""

    def round(self) -> BatchRound:
        """Look at what is due. Raises BrokerUnavailable, StoreUnavailable, Misconfigured."""
        done = BatchRound()
        self._finishing = {name: thread for name, thread in self._finishing.items() if thread.is_alive()}
        now, found = self._batches.due(LOOK_AT)
        done.full = len(found) == LOOK_AT
        for due in found:
            try:
                until = self._look(due, now, done)
            except (Transient, Misconfigured):
                raise
            except Exception:  # one batch's edge: the others must not wait for it
                log.critical("batch.not_looked_at", exc_info=True, extra={"batch_id": due.id})
                until = now + BROKEN_AGAIN_S
            if until is not None:
                self._batches.defer(due.id, until, seen_at=now)
        return done

    def settle(self) -> None:
        """Wait until what is being made final is."""
        for thread in list(self._finishing.values()):
            thread.join()

    def forget_gone(self) -> None:
        """Take batches whose records have gone off the list of all: a page of it."""
        self._listed_to = self._batches.forget_gone(self._listed_to, FORGET_PAGE)

    def send_again(self, segment_id: str) -> None:
        """A segment whose message is gone for good gets another one, if it still needs that."""
        claim = self._batches.claim_segment(segment_id, self._keeper_id)
        if not isinstance(claim, NoClaim):
            self._batches.release(segment_id, claim.attempt, (), unsent=True)

    # ---- one batch

    def _look(self, due: DueBatch, now: float, done: BatchRound) -> float | None:
        """Returns when to look again, if nothing happens before; None: nobody need."""
        if due.status is None or due.status.final:
            self._batches.not_due([due.id])
            for known in (self._stopping_since, self._broken, self._missed):
                known.pop(due.id, None)
            return None
        waits = due.status in (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)
        if waits and not due.closing:
            if due.expires_at <= now:
                done.full |= self._batches.expire(due.id)
                return now
            return now if self._move(due, done) else min(due.expires_at, self._miss(due, now, done))
        broken_s = self._broken.get(due.id, 0.0) - time.monotonic()
        if broken_s > 0:
            return now + broken_s
        if due.status is not BatchStatus.FINALIZING and due.running and not self._waited_enough(due.id):
            return now + HANDING_IN_S
        return now + (self._hold_s if self._begin_to_finish(due.id) else AGAIN_S)

    def _move(self, due: DueBatch, done: BatchRound) -> bool:
        """Begin to run what has been validated, and send what waits for that. True: there is more to do."""
        validated = due.status is BatchStatus.VALIDATING and not due.unvalidated
        if not validated and (due.paused or not due.unsent):
            return False
        batch = self._batches.get(due.id)
        if batch is None:
            return False
        if not validated:
            more = self._send_some(batch, done)
            done.full |= more
            return more
        self._finisher.join_clients(due.id)  # who opened it may have died before it did: nobody else will
        status = self._batches.begin(batch)
        log.info("batch.validated", extra={"batch_id": due.id, "status": status, "problems": batch.problems})
        done.started += 1
        done.full = True
        return True

    def _send_some(self, batch: Batch, done: BatchRound) -> bool:
        """Messages to segments that have none, the first ones first: long rows stand there. True: there
        are more.
        """
        phase = Phase.VALIDATE if batch.status is BatchStatus.VALIDATING else Phase.RUN
        marks = self._batches.unsent(batch.id, ALL)
        waiting = sorted(marks, key=_place)
        some = waiting[:SEND_AT_ONCE]
        for start in range(0, len(some), SENT_PAGE):
            page = some[start : start + SENT_PAGE]
            for segment in page:
                self._send(batch, segment, phase)
            self._batches.sent(batch.id, {segment: marks[segment] for segment in page})
        done.sent += len(some)
        return len(waiting) > len(some)

    def _miss(self, due: DueBatch, now: float, done: BatchRound) -> float:
        """Ask for other messages in place of those that got lost: a queue was purged, a dead letter trimmed.
        Returns when to look again.
        """
        before = self._missed.get(due.id, _Missed())
        if due.paused or now < before.at + MISSED_EVERY_S:
            return due.expires_at if due.paused else before.at + MISSED_EVERY_S
        if done.searched:
            return now + SEARCH_AGAIN_S
        silent = self._batches.silent(due.id)
        batch = self._batches.get(due.id) if silent else None
        done.searched = batch is not None
        try:
            gone = set[str]() if batch is None else self._lacking(batch, silent)
        except (Transient, Misconfigured) as exc:  # only what has to be sent makes everything wait
            told = {"batch_id": due.id, "code": exc.code, "reason": exc.message}
            log.warning("batch.messages_not_looked_for", extra=told)
            gone = set[str]()
        found = _Missed(now, {segment: silent[segment] for segment in gone})
        lost = dict(found.segments.items() & before.segments.items())
        if asked := self._batches.ask(due.id, lost):
            log.warning("batch.messages_lost", extra={"batch_id": due.id, "segments": asked})
        self._missed[due.id] = found
        return now + MISSED_EVERY_S

    def _waited_enough(self, batch_id: str) -> bool:
        since = self._stopping_since.setdefault(batch_id, time.monotonic())
        return time.monotonic() - since > PATIENCE_S

    # ---- making final, beside the rounds

    def _begin_to_finish(self, batch_id: str) -> bool:
        """False: too many others are under way."""
        if batch_id in self._finishing:
            return True
        if len(self._finishing) >= AT_ONCE:
            return False
        thread = threading.Thread(target=self._finish, args=(batch_id,), name="finish", daemon=True)
        self._finishing[batch_id] = thread
        thread.start()
        return True

    def _finish(self, batch_id: str) -> None:
        """The thread's edge: whatever fails is tried again when the batch is next due."""
        began = time.monotonic()
        try:
            status = self._finisher.finish(batch_id)
        except (Transient, Misconfigured) as exc:
            log.warning(
                "batch.not_final", extra={"batch_id": batch_id, "code": exc.code, "reason": exc.message}
            )
        except GristmillError as exc:
            self._broken[batch_id] = time.monotonic() + BROKEN_AGAIN_S
            log.error("batch.damaged", extra={"batch_id": batch_id, "code": exc.code, "reason": exc.message})
            with suppress(Transient, Misconfigured):  # it is said again after the next try
                self._batches.trouble(batch_id, ErrorInfo.of(exc))
        except Exception:
            self._broken[batch_id] = time.monotonic() + BROKEN_AGAIN_S
            log.critical("batch.not_finished", exc_info=True, extra={"batch_id": batch_id})
        else:
            if status is not None:
                self.finished += 1
                took_s = round(time.monotonic() - began, 3)
                log.info(
                    "batch.final", extra={"batch_id": batch_id, "status": status.value, "took_s": took_s}
                )


def _place(segment: str) -> tuple[int, str]:
    """Segments by their number, what was split off behind what it came from."""
    root, _, mark = segment.rpartition(".s")[2].partition("-")
    return (int(root) if root.isdigit() else 0), mark
