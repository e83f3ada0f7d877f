"""SegmentRun: one attempt at running a segment's rows. START HERE for a row's way through the worker.

Its thread is the delivery's. Each turn takes the rows that ended into the writer, and begins as many as there
is room for: their logs' first entries in one call, then each joins the engine's batch as any job does. What
rows write is fenced by the segment's attempt. A row that fails is an error line.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..backends.batches import Accepted, Batches, SegmentClaim, Standing
from ..backends.calls import Entry
from ..backends.store import ResultStore
from ..schemas.batch import BatchStatus, child_segment, row_id, row_of
from ..schemas.batch_lines import default_custom_id, error_line, output_line
from ..schemas.errors import BadInput, GristmillError
from ..schemas.events import Started
from ..schemas.job import Job, JobState
from ..schemas.result import ErrorInfo, FinishReason, Usage
from . import intake
from .admission import Admission, Fit
from .capacity import Room
from .disposition import Disposition
from .engine_client import EngineClient
from .failures import crashed
from .generation import Generation
from .metrics import Metrics
from .patience import Patience
from .publisher import Publisher
from .row_writer import Ended, RowWriter
from .segment_rows import SegmentRows, parse_row
from .slots import RowSlot, Slots

log = logging.getLogger(__name__)

AHEAD = 32
"""Rows whose prompts are tokens already, so that a free place is filled at once."""
BEGIN_AT_ONCE = 256
"""Rows that cannot run take no room."""
LOOK_S = 1.0
"""How often a run looks around although nobody told it to: room may come unheard."""
STANDING_EVERY_S = 5.0
"""What is announced meanwhile comes at once; this finds what got lost."""
SPLIT_EVERY_S = 12.0
"""Longer than two heartbeats: who took the last gift is no longer idle to us."""
SPLIT_FIRST_S = 3.0
"""From the claim on: others have claimed what there was by then."""
SPLIT_ROWS = 8
"""Fewer unstarted rows are soon begun here."""


@dataclass(frozen=True, slots=True)
class Floor:
    """What all segments of a worker share."""

    worker_id: str
    batches: Batches
    store: ResultStore
    slots: Slots
    publisher: Publisher
    admission: Admission
    metrics: Metrics
    closing: threading.Event
    patiently: Patience
    """For Redis: intake stops while anybody waits in it."""
    store_patiently: Patience
    """For finished rows on their way: the others go on."""
    room: Callable[[], Room | None]
    """For rows; None: nothing may be begun now."""
    idle_neighbours: Callable[[], int]
    """Other workers that serve the model and have nothing to do."""
    end_early: Callable[[str, FinishReason], object]
    """Stop a running row."""
    write_every_s: float


@dataclass(frozen=True, slots=True)
class _Next:
    """A row whose turn comes next: what it is to the engine, or why it cannot be."""

    line: int
    job: Job | None
    fit: Fit | None = None
    error: BadInput | None = None


class SegmentRun:
    """Law: a row of the segment is in exactly one place: it has ended in an accepted object, it was given
    away, or it waits in ``_rows`` or ``_next``, is in ``_running``, or is on its way through ``_over`` and
    the writer; or it is a copy of a row between ``_next`` and the writer, and waits in ``_copies`` for its
    answer. What is handed back or split apart from the row it copies is run by itself.
    """

    def __init__(self, floor: Floor, engine: EngineClient, claim: SegmentClaim, rows: SegmentRows) -> None:
        self._floor, self._engine = floor, engine
        self.claim, self.id, self._attempt = claim, claim.info.id, claim.attempt
        self._batch_id = claim.batch.id
        self._began_at = time.monotonic()
        self._ends_at = self._began_at + claim.expires_at - claim.now
        self._rows, self._next = rows, deque[_Next]()
        self._running: dict[str, RowSlot] = {}
        self._open = set[int]()
        """Rows between ``_next`` and the writer."""
        self._copies: dict[int, list[Job]] = {}
        self._over: deque[RowSlot] = deque()
        self._news = threading.Condition()
        self._told = False
        self._how: Disposition | None = None
        self._ending: FinishReason | None = None
        self._paused = self._leaving = False
        self._stopped = set(claim.stopped)
        self._standing_at = self._began_at
        self._split_at = self._began_at - SPLIT_EVERY_S + SPLIT_FIRST_S
        self._look = False
        self._writer = RowWriter(
            self.id,
            self._attempt,
            batches=floor.batches,
            store=floor.store,
            patiently=floor.store_patiently,
            on_answer=self._on_answer,
            close_s=floor.write_every_s,
        )

    # ---- from other threads

    @property
    def unstarted(self) -> int:
        """Rows that wait to be begun here."""
        return 0 if self._over_and_out else len(self._rows) + len(self._next)

    @property
    def writing(self) -> bool:
        """Finished rows wait for the store."""
        return self._writer.full

    def poke(self) -> None:
        """There may be room."""
        with self._news:
            self._told = True
            self._news.notify_all()

    def look_again(self) -> None:
        """Something was said of the batch: ask what."""
        self._look = True
        self.poke()

    def stop_row(self, line: int) -> None:
        """One row was cancelled; it may not have begun."""
        self._stopped.add(line)
        self.poke()

    def wind_down(self) -> None:
        """Begin no more rows, and hand the rest back once those that run have ended."""
        self._leaving = True
        self.poke()

    def end(self, how: Disposition) -> None:
        """Let go at once: DROP (fenced) or REQUEUE (the running rows' tokens are in their logs)."""
        with self._news:
            self._how = self._how or how
            self._told = True
            self._news.notify_all()

    def _on_answer(self, answer: Accepted | None) -> None:
        """The writer's thread: rows joined, or must not."""
        if answer is None:
            self.end(Disposition.DROP)
            return
        self._take_standing(answer.standing)
        self.poke()

    def _on_row_over(self, slot: RowSlot) -> None:
        """Any thread: a row's log is complete, or somebody else owns the segment."""
        with self._news:
            self._over.append(slot)
            self._told = True
            self._news.notify_all()

    # ---- the segment's thread

    def run(self) -> Disposition:
        """Until every row has ended or is to be run elsewhere. Returns what becomes of the delivery: DROP
        means that somebody else owns it now.
        """
        try:
            while self._how is None and not self._done:
                self._turn()
                self._wait()
            return self._leave()
        finally:
            self._writer.stop()

    @property
    def _over_and_out(self) -> bool:
        """No more rows are begun."""
        return self._ending is not None or self._paused or self._leaving or self._how is not None

    @property
    def _done(self) -> bool:
        """Nothing runs, nothing is to be begun, and everything has joined."""
        if self._running or self._over or self.unstarted:
            return False
        self._writer.close_pile()
        return self._writer.idle

    def _turn(self) -> None:
        while self._over:
            self._take_ended(self._over.popleft())
        now = time.monotonic()
        if self._look or now - self._standing_at >= STANDING_EVERY_S:
            self._look, self._standing_at = False, now
            ask = partial(self._floor.batches.standing, self._batch_id)
            if (standing := self._floor.patiently(ask)) is not None:
                self._take_standing(standing)
        if self._ends_at <= now:
            self._stop_all(FinishReason.EXPIRED)
        if self._ending is not None:  # some may have begun just as it was said
            for row in list(self._running):
                self._floor.end_early(row, self._ending)
        if not self._over_and_out and not self._writer.full:
            self._begin_rows()
            self._prepare_ahead()
            self._share(now)
        if self._writer.due_in() == 0.0:
            self._writer.close_pile()

    def _wait(self) -> None:
        due_s = self._writer.due_in()
        with self._news:
            if not self._told:
                self._news.wait(LOOK_S if due_s is None else min(LOOK_S, due_s))
            self._told = False

    # ---- what the batch says

    def _take_standing(self, standing: Standing) -> None:
        self._stopped |= standing.stopped
        if standing.status is None:
            self.end(Disposition.DROP)  # deleted, or lost with the server: the next claim finds out
        elif standing.over and standing.status is not BatchStatus.FINALIZING:
            self._stop_all(FinishReason.EXPIRED if standing.closing else FinishReason.CANCELLED)
        self._paused = standing.paused
        for line in standing.stopped:
            if (row := row_id(self._batch_id, line)) in self._running:
                self._floor.end_early(row, FinishReason.CANCELLED)

    def _stop_all(self, reason: FinishReason) -> None:
        if self._ending is None:
            self._ending = reason
            self.poke()

    # ---- rows begin

    def _begin_rows(self) -> None:
        room = self._floor.room()
        chosen: list[_Next] = []
        while room is not None and len(self._rows) + len(self._next) and len(chosen) < BEGIN_AT_ONCE:
            row = self._next.popleft() if self._next else self._prepare()
            if row is None:
                continue
            tokens = len(row.fit.prompt_ids) if row.fit else 0
            sequences = row.job.sampling.choices if row.job else 0
            if row.fit is not None and not room.take(tokens, sequences):
                self._next.appendleft(row)
                break
            chosen.append(row)
        if chosen:
            self._set_copies_aside()
            self._begin(chosen)

    def _set_copies_aside(self) -> None:
        """Those of the last row that was prepared, if it is about to begin: they lie behind it, and it may
        end before anybody comes to them."""
        while not self._next and len(self._rows):
            if (row := self._prepare()) is not None:
                self._next.append(row)

    def _prepare_ahead(self) -> None:
        while len(self._next) < AHEAD and len(self._rows) and not self._told:
            if (row := self._prepare()) is not None:
                self._next.append(row)

    def _prepare(self) -> _Next | None:
        """The next row. None: it is a copy of one that is under way, and waits for that one's answer."""
        line, body = self._rows.take()
        job: Job | None = None
        try:
            job = parse_row(body)
            return None if self._set_aside(line, job) else self._fitted(line, job)
        except BadInput as exc:
            return _Next(line, job, error=exc)
        except BaseException as exc:
            log.critical("row.crashed", exc_info=exc, extra={"job_id": row_id(self._batch_id, line)})
            return _Next(line, job, error=_mistake(exc))

    def _fitted(self, line: int, job: Job) -> _Next:
        self._open.add(line)
        try:
            return _Next(line, job, fit=self._floor.admission.fit(job))
        except BadInput as exc:
            return _Next(line, job, error=exc)

    def _set_aside(self, line: int, job: Job) -> bool:
        where = row_of(job.copy_of or "")
        if where is None or where[1] not in self._open or line in self._stopped:
            return False
        self._copies.setdefault(where[1], []).append(job)
        return True

    def _begin(self, chosen: list[_Next]) -> None:
        lines = [row.line for row in chosen]
        begin = partial(self._floor.batches.begin_rows, self.id, self._attempt, self._floor.worker_id, lines)
        logs = self._floor.patiently(lambda: begin() or Disposition.DROP)
        if logs is None or isinstance(logs, Disposition):  # we close, or are fenced
            self._next.extendleft(reversed(chosen))
            self.end(logs or Disposition.REQUEUE)
            return
        now = self.claim.now + time.monotonic() - self._began_at
        begun = [self._slot(row, entries, now) for row, entries in zip(chosen, logs, strict=True)]
        self._start([slot for slot in begun if slot is not None])

    def _slot(self, row: _Next, entries: list[Entry], now: float) -> RowSlot | None:
        """A row that is to run, from where its log ends. None: it has ended, and is with the writer."""
        if row.job is None:
            assert row.error is not None, f"row {row.line} was neither read nor refused"
            self._refuse(row.line, None, row.error)
            return None
        attempts = 1 + sum(isinstance(event, Started) for _, event in entries)
        admission = self._floor.admission
        generation = Generation(
            row.job,
            self._attempt,
            attempts,
            now,
            admission.tokenizer,
            owner=self.id,
            fingerprint=admission.fingerprint,
        )
        try:
            generation.replay(entries)
            if not generation.complete:
                if row.error is not None and row.line not in self._stopped:
                    raise row.error
                over = FinishReason.CANCELLED if row.line in self._stopped else None
                admission.admit(generation, now, over, row.fit)
        except BadInput as exc:
            generation.fail(ErrorInfo.of(exc), now)
        except BaseException as exc:  # noqa: BLE001 - the panic of a Rust library is no Exception
            crashed(generation, exc, now)
        if generation.done is not None:
            self._finish(row.line, generation)
            return None
        return RowSlot(row.job, generation, self._ends_at, on_end=self._on_row_over)

    def _start(self, slots: list[RowSlot]) -> None:
        floor = self._floor
        for slot in slots:
            if floor.slots.take(slot) is not slot:  # a run that was fenced and does not know it has the row
                self.end(Disposition.REQUEUE)
                return
            self._running[slot.job.id] = slot
        with floor.publisher.lock:  # so that hand_back's flush finds them, or they find that we are closing
            if floor.closing.is_set():
                self.end(Disposition.REQUEUE)
                return
            floor.publisher.add(*(slot.generation for slot in slots if slot.generation is not None))
        running = [g for slot in slots if (g := slot.generation) is not None and g.done is None]
        self._engine.submit_all([(intake.engine_requests(g), g.history.doubtful) for g in running])

    # ---- rows end

    def _take_ended(self, slot: RowSlot) -> None:
        if self._running.pop(slot.job.id, None) is None:
            return
        self._floor.slots.drop(slot)
        generation = slot.generation
        assert generation is not None, f"row {slot.job.id} ended before it began"
        if slot.how is not None:  # fenced
            self.end(slot.how)
            return
        self._finish(_line_of(slot.job), generation)

    def _finish(self, line: int, generation: Generation) -> None:
        job = generation.job
        try:
            result = generation.result()
            said = output_line(result, job.custom_id or default_custom_id(line)).to_line()
        except Exception as exc:  # one row's edge
            log.critical("row.crashed", exc_info=True, extra={"job_id": job.id})
            self._refuse(line, job, _mistake(exc))
            return
        self._floor.metrics.on_row(result)
        times = result.timings if result.attempts == 1 else None
        self._writer.add(Ended(line, said, result.state, result.usage, times))
        alone = self._ending is None and result.state in (JobState.CANCELLED, JobState.EXPIRED)
        for copy in self._end(line):
            number = _line_of(copy)
            if alone:  # that row was stopped, and not its batch
                self._next.append(self._fitted(number, copy))
                continue
            own = result.model_copy(update={"job_id": copy.id, "custom_id": copy.custom_id})
            said = output_line(own, copy.custom_id or default_custom_id(number)).to_line()
            self._writer.add(
                Ended(number, said, result.state, Usage())
            )  # what was computed was computed once

    def _refuse(self, line: int, job: Job | None, exc: GristmillError) -> None:
        custom_id = (job.custom_id if job else None) or default_custom_id(line)
        said = error_line(row_id(self._batch_id, line), custom_id, ErrorInfo.of(exc)).to_line()
        self._writer.add(Ended(line, said, JobState.FAILED, Usage()))
        for copy in self._end(line):
            self._refuse(_line_of(copy), copy, exc)

    def _end(self, line: int) -> list[Job]:
        """A row is with the writer; its copies."""
        self._open.discard(line)
        return self._copies.pop(line, [])

    # ---- neighbours

    def _share(self, now: float) -> None:
        """Give rows that would wait long to workers that have nothing to do."""
        if len(self._rows) < SPLIT_ROWS or now - self._split_at < SPLIT_EVERY_S:
            return
        self._split_at = now
        idle = self._floor.patiently(self._floor.idle_neighbours) or 0
        for share in range(idle + 1, 1, -1):
            if not self._give_away(len(self._rows) // share):
                return

    def _give_away(self, count: int) -> bool:
        if not count:
            return False
        child = child_segment(self.id, secrets.token_hex(4))
        lines = self._rows.give_away(count)
        given, kept = self._rows.give(child, lines), self._rows.keep()
        split = partial(self._floor.batches.split, self.id, self._attempt, kept, given)
        done = self._floor.patiently(split)
        if not done:  # fenced, or we close: the next claim reads what Redis says, and so do we no more
            self.end(Disposition.REQUEUE if done is None else Disposition.DROP)
            return False
        log.info(
            "segment.split", extra={"segment": self.id, "child": child, "rows": count, "kept": kept.rows}
        )
        return True

    # ---- the way out

    def abandon(self) -> None:
        """Write nothing more: a mistake of ours ended the run, and the lease brings the segment back."""
        self.end(Disposition.DROP)
        self._leave()

    def _leave(self) -> Disposition:
        floor = self._floor
        while self._over:
            self._take_ended(self._over.popleft())
        running, self._running = list(self._running.values()), {}
        generations = [slot.generation for slot in running if slot.generation is not None]
        floor.publisher.discard(*generations)
        for slot in running:
            floor.slots.drop(slot)
        if not floor.closing.is_set():  # else the engine may hang, and its end is near
            for generation in generations:
                self._engine.abort(generation.request_id)
        if self._how is Disposition.DROP:
            return Disposition.DROP
        left = len(self._rows) + len(self._next)
        if self._how is None and (self._ending is not None or not left):
            return self._after(partial(floor.batches.end_segment, self.id, self._attempt))
        lines = [_line_of(slot.job) for slot in running]
        unsent = self._how is None and self._paused
        after = self._after(partial(floor.batches.release, self.id, self._attempt, lines, unsent=unsent))
        return after if unsent else Disposition.REQUEUE

    def _after(self, call: Callable[[], bool]) -> Disposition:
        """What becomes of the delivery: it may go once the server has heard us, and the segment was ours."""
        said = self._floor.patiently(call) if self._floor.publisher.healthy else None
        if said is None:
            return Disposition.REQUEUE
        return Disposition.ACK if said else Disposition.DROP


def _line_of(job: Job) -> int:
    return int(job.id.rpartition(".")[2])


def _mistake(exc: BaseException) -> BadInput:
    name = type(exc).__name__
    return _RowCrashed(f"the worker made a mistake with this row ({name}); its log has the details")


class _RowCrashed(BadInput):
    """A mistake of ours that one row's text brought out: it would do so again, so the row has failed."""

    code = GristmillError.code
