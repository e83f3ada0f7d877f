"""Segments: the segments of batches that a worker has in hand, from delivery to acknowledgement.

A delivery claims its segment, which fences whoever held it before. While its batch is being validated, its
rows are looked at; then they run (``segment_run.py``).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from ..backends.batches import Accepted, NoClaim, SegmentClaim
from ..schemas.batch import LineSet, Phase, batch_of, row_of
from ..schemas.result import ErrorInfo
from .disposition import Disposition
from .engine_client import EngineClient
from .row_writer import RowWriter
from .segment_rows import SegmentRows
from .segment_run import Floor, SegmentRun
from .validation import Findings, validate

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Hand:
    """A segment in hand: ``disposition`` answers a second delivery."""

    id: str
    run: SegmentRun | None = None
    validating: bool = False
    fenced: bool = False
    disposition: Future[Disposition] = field(default_factory=Future[Disposition])
    stopping: threading.Event = field(default_factory=threading.Event)


class Segments:
    """Thread-safe. ``give_up``: what becomes of a fenced delivery, by segment and attempt; blocks."""

    engine: EngineClient
    """Set by ``JobHandler.attach``."""

    def __init__(self, floor: Floor, model: str, give_up: Callable[[str, int], Disposition]) -> None:
        self._floor, self._model, self._give_up = floor, model, give_up
        self._hands: dict[str, _Hand] = {}
        self._lock = threading.Lock()
        self._leaving = False

    def handle(self, segment_id: str) -> Disposition:
        """Run one delivered segment to its end. Called on a pool thread, which it blocks meanwhile."""
        hand = _Hand(segment_id)
        while (first := self._take(hand)) is not hand:  # redelivered to the worker that still runs it
            before = first.disposition.result()
            if before is not Disposition.ACK:  # else this message may be a later one, for what comes next
                return before
        disposition = Disposition.DROP
        try:
            disposition = self._attempt(hand)
        except BaseException:  # a delivery's edge: the panic of a Rust library is no Exception
            log.critical("delivery.crashed", exc_info=True, extra={"segment": segment_id})
        finally:
            with self._lock:
                del self._hands[segment_id]
            hand.disposition.set_result(disposition)
        return disposition

    def _take(self, hand: _Hand) -> _Hand:
        """Take a segment in hand. Returns ``hand``, or the one that has it already."""
        with self._lock:
            return self._hands.setdefault(hand.id, hand)

    def _attempt(self, hand: _Hand) -> Disposition:
        floor = self._floor
        claim = floor.patiently(partial(floor.batches.claim_segment, hand.id, floor.worker_id))
        if claim is None:
            return Disposition.REQUEUE
        if isinstance(claim, NoClaim):
            log.info("segment.not_needed", extra={"segment": hand.id, "why": claim.why})
            return Disposition.ACK
        told = {"segment": hand.id, "attempt": claim.attempt, "attempts": claim.attempts}
        log.info("segment.claimed", extra=told | {"phase": claim.phase.value, "rows": claim.info.rows})
        body = floor.store_patiently(lambda: floor.store.get(claim.info.input) or b"")
        if body is None:
            return self._release(claim)
        if not body:
            return self._cannot_run(claim)
        disposition = (self._validate if claim.phase is Phase.VALIDATE else self._run)(hand, claim, body)
        if disposition is Disposition.DROP:
            log.warning("segment.fenced", extra=told)
            hand.fenced = True
            floor.metrics.on_fenced()
            return self._give_up(hand.id, claim.attempt)
        log.info("segment.done", extra=told | {"disposition": disposition.value})
        return disposition

    def _cannot_run(self, claim: SegmentClaim) -> Disposition:
        """Somebody took the rows away: nobody can ever run them."""
        name = claim.info.input
        log.error("segment.input_missing", extra={"segment": claim.info.id, "object": name})
        text = f"{name} is not in the result store; submit the batch again"
        reason = ErrorInfo(code="input_missing", message=text)
        if self._floor.patiently(partial(self._floor.batches.cancel, claim.batch.id, reason)) is None:
            return Disposition.REQUEUE
        self._floor.patiently(partial(self._floor.batches.end_segment, claim.info.id, claim.attempt))
        return Disposition.ACK

    def _run(self, hand: _Hand, claim: SegmentClaim, body: bytes) -> Disposition:
        run = SegmentRun(self._floor, self.engine, claim, SegmentRows(body, claim.info, claim.ended))
        hand.run = run
        if self._floor.closing.is_set():
            run.end(Disposition.REQUEUE)
        elif self._leaving:
            run.wind_down()
        try:
            return run.run()
        except BaseException:
            run.abandon()
            raise

    # ---- validation

    def _validate(self, hand: _Hand, claim: SegmentClaim, body: bytes) -> Disposition:
        floor, hand.validating = self._floor, True
        rows = SegmentRows(body, claim.info, LineSet())
        found = validate(claim, rows, floor.admission, self._model, lambda: self._stops(hand))
        if found is None:
            return self._release(claim)
        if found.refused and (joined := self._join(claim, found)) is not True:
            return Disposition.DROP if joined is None else self._release(claim)
        said = floor.patiently(partial(self._say, claim, found))
        if said is None:
            return Disposition.REQUEUE
        return Disposition.ACK if said else Disposition.DROP

    def _stops(self, hand: _Hand) -> bool:
        return self._floor.closing.is_set() or self._leaving or hand.stopping.is_set()

    def _join(self, claim: SegmentClaim, found: Findings) -> bool | None:
        """The refused rows' error lines. None: fenced. False: we close."""
        answers: list[Accepted | None] = []
        answered = threading.Condition()

        def on_answer(answer: Accepted | None) -> None:
            with answered:
                answers.append(answer)
                answered.notify_all()

        floor = self._floor
        writer = RowWriter(
            claim.info.id,
            claim.attempt,
            batches=floor.batches,
            store=floor.store,
            patiently=floor.store_patiently,
            on_answer=on_answer,
        )
        try:
            for row in found.refused:
                writer.add(row)
            writer.close_pile()
            with answered:
                while not (writer.idle or None in answers or floor.closing.is_set()):
                    answered.wait(0.1)
            return None if None in answers else writer.idle
        finally:
            writer.stop()

    def _say(self, claim: SegmentClaim, found: Findings) -> bool:
        return self._floor.batches.validated(
            claim.info.id,
            claim.attempt,
            rows=found.rows,
            tokens=found.tokens,
            problems=found.problems,
            count=found.count,
            told=claim.batch.options.max_errors,
        )

    def _release(self, claim: SegmentClaim) -> Disposition:
        self._floor.patiently(partial(self._floor.batches.release, claim.info.id, claim.attempt, ()))
        return Disposition.REQUEUE

    # ---- control

    def cancel(self, name: str) -> None:
        """Something was said of a batch, or one of its rows was cancelled that does not run. Unknown ids are
        ignored.
        """
        row = row_of(name)
        for run in self._runs():
            if batch_of(run.id) != batch_of(name):
                continue
            if row is not None:
                run.stop_row(row[1])
            else:
                run.look_again()

    def poke(self) -> None:
        """There may be room for more rows."""
        for run in self._runs():
            if run.unstarted:
                run.poke()

    def wind_down(self) -> None:
        """Begin no more rows; segments go back once those that run have ended."""
        self._leaving = True
        for run in self._runs():
            run.wind_down()

    def give_back(self, segment_ids: Iterable[str]) -> None:
        """Let go of these at once: their rows' tokens are in their logs. Unknown ids are ignored."""
        for segment_id in segment_ids:
            if (hand := self._hands.get(segment_id)) is not None:
                hand.stopping.set()
                if hand.run is not None:
                    hand.run.end(Disposition.REQUEUE)

    @property
    def ids(self) -> list[str]:
        """In hand."""
        with self._lock:
            return list(self._hands)

    @property
    def unfinished(self) -> int:
        """Those that may yet end here: fenced ones run elsewhere."""
        with self._lock:
            return sum(not hand.fenced for hand in self._hands.values())

    @property
    def hungry(self) -> bool:
        """Rows wait to be begun here, or are being looked at: no more batch work should come."""
        with self._lock:
            hands = list(self._hands.values())
        return any(hand.run.unstarted if hand.run else not hand.fenced for hand in hands)

    @property
    def waits_for(self) -> str | None:
        """What finished rows wait for, in words; None while they do not."""
        if not self._floor.store_patiently.waiting:
            return None
        return "finished rows wait for the result store or the state server; see the log"

    def _runs(self) -> list[SegmentRun]:
        with self._lock:
            return [hand.run for hand in self._hands.values() if hand.run is not None]
