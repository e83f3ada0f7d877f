"""JobHandler: one delivery from claim to commit. START HERE to follow a job through the worker."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from ..backends.sink import ResultSink
from ..backends.state import Claim, Final, State
from ..engine.tokenizer import Tokenizer
from ..keeper.endings import Ending, complete
from ..keeper.keeper import ID_PREFIX
from ..schemas.batch import is_segment
from ..schemas.errors import BadInput, Transient
from ..schemas.job import JOB_ID_PATTERN, Job, JobState, Priority
from ..schemas.result import ErrorInfo, FinishReason, Result
from . import capacity, intake
from .admission import Admission
from .committer import Committer
from .disposition import MAX_ATTEMPTS, Disposition
from .engine_client import EngineClient
from .failures import crashed
from .generation import Generation
from .listener import EngineListener
from .metrics import Metrics
from .patience import Patience
from .publisher import Publisher
from .segment_run import Floor
from .segments import Segments
from .settings import WorkerSettings
from .slots import Slot, Slots
from .spool import Parcel

log = logging.getLogger(__name__)

GIVE_BACK_FLUSH_S = 2.0
"""Beyond it the state server is away: what is not journalled is made again."""
LOOK_AGAIN_S = 1.0
"""How often a fenced delivery looks what has become of its job."""
KEEPER_ENDS_S = 15.0
"""As long as a worker's registration lives on: a keeper that has not ended a job by then is gone, too."""


class JobHandler:
    """Takes deliveries on many threads and returns what becomes of each.

    Order of effects: claim (the fence) → tokens, each in the journal → ``Done`` in the journal → result
    object → state final → ACK. Dying between any two is safe: the next claim finds how far this one came.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        worker_id: str,
        *,
        state: State,
        sink: ResultSink,
        tokenizer: Tokenizer,
        metrics: Metrics,
        on_capacity: Callable[[], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self._settings, self._worker_id = settings, worker_id
        self._state, self._tokenizer, self._metrics = state, tokenizer, metrics
        self._on_capacity = on_capacity
        self._sink = sink
        self._slots = Slots()
        self._closing = threading.Event()
        self._patiently = Patience(self._closing)  # intake stops while anybody waits in it
        self._admission = Admission(settings, tokenizer)
        self.committer = Committer(
            sink,
            metrics,
            home=settings.home,
            worker_id=worker_id,
            max_results=settings.spool_max_results,
            max_bytes=settings.spool_max_bytes,
        )
        self.publisher = Publisher(
            state,
            on_complete=self._on_complete,
            on_fenced=self._on_fenced,
            on_trial_recorded=lambda generation: self.listener.on_trial_recorded(generation),
        )
        self.listener = EngineListener(
            worker_id,
            settings.max_attempts,
            slots=self._slots,
            publisher=self.publisher,
            metrics=metrics,
            on_capacity=self._on_step,
            on_gone=on_gone,
        )
        self.segments = Segments(self._floor(), settings.model_name, self._give_up)
        self.engine: EngineClient
        self.last_busy_at = time.monotonic()

    def attach(self, engine: EngineClient) -> None:
        """The engine whose listener is ours: before anything else."""
        self.engine = self.listener.engine = self._admission.engine = self.segments.engine = engine

    @property
    def fingerprint(self) -> str | None:
        """Of what answers here; None: not known yet."""
        return self._admission.fingerprint

    @fingerprint.setter
    def fingerprint(self, found: str) -> None:
        self._admission.fingerprint = found

    def _floor(self) -> Floor:
        """What segments need of us."""
        return Floor(
            worker_id=self._worker_id,
            batches=self._state.batches,
            store=self._sink.store,
            slots=self._slots,
            publisher=self.publisher,
            admission=self._admission,
            metrics=self._metrics,
            closing=self._closing,
            patiently=self._patiently,
            store_patiently=Patience(self._closing),
            room=lambda: self._room(Priority.BATCH),
            idle_neighbours=self._idle_neighbours,
            end_early=self._end_early,
            write_every_s=self._settings.bulk_write_every_s,
        )

    # ---- a delivery

    def handle(self, job_id: str, body: str) -> Disposition:
        """Run one delivered job, or segment, to its end. Called on a pool thread, which it blocks
        meanwhile.
        """
        if is_segment(job_id):
            try:
                return self.segments.handle(job_id)
            finally:
                self.last_busy_at = time.monotonic()
                self._on_capacity()
        try:
            job = Job.from_json(body)
        except BadInput as exc:
            log.error("job.unreadable", extra={"job_id": job_id, "code": exc.code, "reason": exc.message})
            return self._refuse(job_id, exc)
        return self._run_once(job)

    def _run_once(self, job: Job) -> Disposition:
        slot = Slot(job)
        first = self._slots.take(slot)
        if first is not slot:  # redelivered to the worker that still runs it: both deliveries end alike
            how = first.disposition.result()
            return Disposition.ACK if how is Disposition.BURY else how  # one dead letter is enough
        disposition = Disposition.DROP
        try:
            disposition = self._attempt(slot)
        except BaseException:  # a delivery's edge: the panic of a Rust library is no Exception
            log.critical("delivery.crashed", exc_info=True, extra={"job_id": job.id})
            self._abandon(slot)
        finally:
            self.last_busy_at = time.monotonic()
            self._slots.drop(slot)
            slot.disposition.set_result(disposition)
            self._on_capacity()
        return disposition

    def _attempt(self, slot: Slot) -> Disposition:
        job = slot.job
        claim = self._claim(job.id, job.expires_at, job.webhook, job.submitted_at)
        if isinstance(claim, Disposition):
            return claim
        log.info(
            "job.claimed", extra={"job_id": job.id, "attempt": claim.attempt, "attempts": claim.attempts}
        )
        if claim.attempts > 1:
            self._metrics.on_redelivered()
        slot.expires_at = time.monotonic() + claim.expires_at - claim.now
        generation = self._prepare(job, claim)
        if not generation.complete:
            self._run(slot, generation)
            slot.ended.wait()
            if slot.how is not None:
                return self._let_go(generation, slot.how)
        parcel, attempt = self.committer.take(generation.result()), generation.attempt
        slot.generation = generation = None  # it may take long, and the journal has everything
        return self._commit(parcel, attempt)

    def _claim(
        self, job_id: str, expires_at: float, webhook: str | None = None, submitted_at: float | None = None
    ) -> Claim | Disposition:
        """The right to run an attempt, or what becomes of the delivery: the job has ended, or we close."""
        asked = (job_id, self._worker_id, expires_at, webhook, submitted_at)
        claim = self._patiently(lambda: self._state.claim(*asked))
        if claim is None:
            return Disposition.REQUEUE
        if isinstance(claim, Final):
            return self._after_the_end(job_id, claim.state)
        if not claim.known and (earlier := self._patiently(lambda: self._sink.adopt(job_id))) is not None:
            return self._disposition(earlier.error)
        return claim

    def _after_the_end(self, job_id: str, state: JobState) -> Disposition:
        """Its message is still here: who ended it died before telling the broker, or it came twice."""
        log.info("job.already_final", extra={"job_id": job_id, "state": state})
        if state is not JobState.FAILED:
            return Disposition.ACK
        status = self._patiently(lambda: self._state.status(job_id))
        return Disposition.REQUEUE if status is None else self._disposition(status.error)

    def _disposition(self, error: ErrorInfo | None) -> Disposition:
        """Of a job whose end is durable."""
        return Disposition.BURY if error and error.code == MAX_ATTEMPTS else Disposition.ACK

    def _refuse(self, job_id: str, exc: BadInput) -> Disposition:
        """Answer what cannot be read: its client is newer than this worker, or none of ours."""
        if not re.fullmatch(JOB_ID_PATTERN, job_id):
            return Disposition.ACK  # nobody knows whose it is
        claim = self._claim(job_id, time.time())
        if isinstance(claim, Disposition):
            return claim
        ended = self._patiently(lambda: self._refusal(job_id, exc, claim) or Disposition.DROP)
        if ended is None:
            return Disposition.REQUEUE
        if isinstance(ended, Disposition):
            return ended
        return self._commit(self.committer.take(ended), claim.attempt)

    def _refusal(self, job_id: str, exc: BadInput, claim: Claim) -> Result | None:
        """How it ends, as a keeper would end it: by its log, if a worker that could read it came that far."""
        _, (known,) = self._state.look([job_id])
        ending = Ending(
            job_id=job_id,
            model=known.model or self._settings.model_name,
            submitted_at=known.submitted_at,
            expires_at=known.expires_at,
            reason=FinishReason.ERROR,
            error=ErrorInfo.of(exc),
            echo=known.echo,
        )
        return complete(self._state, ending, claim)

    def _prepare(self, job: Job, claim: Claim) -> Generation:
        """A Generation that stands where the journal stands. Bad input, too, becomes one: with its error."""
        generation = Generation(
            job,
            claim.attempt,
            claim.attempts,
            claim.now,
            self._tokenizer,
            fingerprint=self._admission.fingerprint,
        )
        try:
            generation.replay(claim.entries)
            if not generation.complete:
                over = FinishReason.EXPIRED if claim.now >= claim.expires_at else None
                over = FinishReason.CANCELLED if claim.cancelled else over
                self._admission.admit(generation, claim.now, over)
        except BadInput as exc:
            generation.fail(ErrorInfo.of(exc), claim.now)
        except BaseException as exc:  # noqa: BLE001 - the panic of a Rust library is no Exception
            crashed(generation, exc, claim.now)
        return generation

    def _run(self, slot: Slot, generation: Generation) -> None:
        with self.publisher.lock:  # so that hand_back's flush finds it, or it finds that we are closing
            slot.generation = generation
            if self._closing.is_set():
                slot.end(Disposition.REQUEUE)
                return
            self.publisher.add(generation)
        if generation.done is None:
            self.engine.submit(*intake.engine_requests(generation), suspect=generation.history.doubtful)
            pickup_s = round(time.time() - slot.job.submitted_at, 5)
            log.debug("job.submitted", extra={"job_id": slot.job.id, "pickup_s": pickup_s})

    def _let_go(self, generation: Generation, how: Disposition) -> Disposition:
        """Write nothing more of this attempt. Returns what becomes of its delivery."""
        self.publisher.discard(generation)
        if how is Disposition.DROP:
            return self._give_up(generation.job.id, generation.attempt)
        if self.publisher.healthy:
            with suppress(Transient):  # then the state says running until the next claim
                self._state.release(generation.job.id, generation.attempt)
        return how

    def _give_up(self, job_id: str, attempt: int) -> Disposition:
        """What becomes of a fenced delivery: kept in hand until the job is final, or its new owner is gone.

        That one need not have a message of its own: a worker that was frozen may begin an attempt with a
        claim that was swept meanwhile. Were ours acknowledged now, its death would lose the job. Were ours
        left to its lease now, two messages of one job would fence each other, lease after lease.
        """
        until = time.monotonic() + KEEPER_ENDS_S
        while not self._closing.is_set():
            status = self._patiently(lambda: self._state.status(job_id))
            if status is not None and status.state.final:
                return Disposition.ACK
            if status is None or status.attempt == attempt:  # the server lost the state or the log
                return Disposition.DROP
            if status.state is not JobState.RUNNING or not self._lives(status.worker or "", until):
                return Disposition.DROP
            self._closing.wait(LOOK_AGAIN_S)
        return Disposition.REQUEUE

    def _lives(self, owner: str, keepers_until: float) -> bool:
        """Whether a job's owner may be expected to end it. A keeper has no heartbeat, and little to do."""
        if owner.startswith(ID_PREFIX) and time.monotonic() < keepers_until:
            return True
        return owner in (self._patiently(self._state.workers) or {})

    def _abandon(self, slot: Slot) -> None:
        if (generation := slot.generation) is not None:
            self.publisher.discard(generation)
            self.engine.abort(generation.request_id)

    def _commit(self, parcel: Parcel, attempt: int) -> Disposition:
        committed = self.committer.commit(parcel)
        if committed is None:
            return Disposition.REQUEUE
        result, fresh = committed
        self._metrics.on_finish(result)
        if not fresh:
            self._metrics.on_duplicate_commit()
        log.info(
            "job.finished",
            extra={
                "job_id": result.job_id,
                "attempt": attempt,
                "state": result.state.value,
                "prompt_tokens": result.usage.prompt_tokens,
                "completion_tokens": result.usage.completion_tokens,
                "e2e_s": round(result.timings.e2e_s, 3),
                "code": result.error.code if result.error else None,
            },
        )
        return self._disposition(result.error)

    def _on_step(self) -> None:
        """The engine has moved on: there may be room."""
        self._on_capacity()
        self.segments.poke()

    # ---- the publisher reports (its thread)

    def _on_complete(self, generation: Generation) -> None:
        if slot := self._slots.of(generation):
            slot.complete()

    def _on_fenced(self, generation: Generation) -> None:
        log.warning("job.fenced", extra={"job_id": generation.job.id, "attempt": generation.attempt})
        self._metrics.on_fenced()
        if slot := self._slots.of(generation):
            slot.end(Disposition.DROP)
        self.engine.abort(generation.request_id)

    # ---- control

    def cancel(self, job_id: str) -> None:
        """Stop a running job, or look what was said of a batch; the partial text becomes the result. Unknown
        ids are ignored."""
        if not self._end_early(job_id, FinishReason.CANCELLED):
            self.segments.cancel(job_id)

    def expire(self, now: float) -> None:
        """Stop running jobs whose time is up. ``now``: by the monotonic clock."""
        for slot in self._slots.all():
            if slot.expires_at <= now:
                self._end_early(slot.job.id, FinishReason.EXPIRED)

    def _end_early(self, job_id: str, reason: FinishReason) -> bool:
        with self.publisher.lock:
            slot = self._slots.get(job_id)
            generation = slot.generation if slot else None
            if generation is None or generation.done is not None:
                return False
            generation.end_early(reason, time.time())
            self.publisher.wake()
        self.engine.abort(generation.request_id)
        log.info("job.ended_early", extra={"job_id": job_id, "reason": reason.value})
        return True

    def give_back(self, job_ids: Sequence[str]) -> None:
        """Journal running jobs' tokens and give their deliveries back: they go on from there, somewhere.

        For claims that the broker will not prolong much longer. Unknown ids are ignored. Returns within
        ``GIVE_BACK_FLUSH_S``, however many they are.
        """
        slots = [slot for job_id in job_ids if (slot := self._slots.get(job_id)) is not None]
        running = [(slot, slot.generation) for slot in slots if not slot.ended.is_set()]
        segments = set(job_ids) & set(self.segments.ids)
        if segments or any(generation is not None for _, generation in running):
            self.publisher.flush(GIVE_BACK_FLUSH_S)
        self.segments.give_back(segments)
        for slot, generation in running:
            if generation is not None:
                self._give_back(slot, generation.request_id)

    def _give_back(self, slot: Slot, request_id: str) -> None:
        # Not before the attempt is over: the engine's answer to it would end the job.
        slot.disposition.add_done_callback(lambda _: self.engine.abort(request_id))
        slot.end(Disposition.REQUEUE)
        log.info("job.given_back", extra={"job_id": slot.job.id})

    def hand_back(self, flush_s: float) -> int:
        """Journal every running job's tokens, then give the deliveries back to the queue. How many.

        Returns within ``flush_s``. The engine is not asked to stop: it may hang, and its end is near.
        """
        with self.publisher.lock:
            self._closing.set()
        self.committer.close()
        slots, segments = self._slots.jobs(), self.segments.ids
        self.publisher.flush(flush_s)
        returned = [slot for slot in slots if not slot.ended.is_set()]
        for slot in returned:
            slot.end(Disposition.REQUEUE)
        self.segments.give_back(segments)
        return len(returned) + len(segments)

    def wind_down(self) -> None:
        """Nothing new is to begin: no rows of the segments in hand, either."""
        self.segments.wind_down()

    # ---- capacity

    @property
    def in_hand(self) -> int:
        """Jobs and segments claimed and not yet disposed of, and rows that run."""
        return len(self._slots) + len(self.segments.ids)

    @property
    def unfinished(self) -> int:
        """Those that may yet end here: fenced ones run elsewhere."""
        jobs = sum(slot.how is not Disposition.DROP for slot in self._slots.jobs())
        return jobs + self.segments.unfinished

    def job_ids(self) -> list[str]:
        """The jobs in hand; no rows."""
        return [slot.job.id for slot in self._slots.jobs()]

    @property
    def trouble(self) -> str | None:
        """Why no jobs are taken although the engine could run them, in words; or None."""
        if not self.publisher.healthy:
            return "the journal cannot be written; running jobs wait for the state server"
        if waiting := self._patiently.waiting:
            return f"{waiting} deliveries wait for the state server; see the log"
        return self.committer.trouble

    def claimable(self) -> list[Priority]:
        """The classes of which another job would start soon, the most urgent first: see capacity.py."""
        if not self._may_begin:
            return []
        most = self._settings.max_concurrent_requests
        classes = capacity.claimable(self._held(), self.engine.info, self.engine.stats, most)
        if Priority.BATCH in classes and self.segments.hungry:  # its rows come first
            classes.remove(Priority.BATCH)
        return classes

    def _room(self, priority: Priority) -> capacity.Room | None:
        """What of that class could start soon; None: nothing at all may."""
        if not self._may_begin:
            return None
        most = self._settings.max_concurrent_requests
        return capacity.room(priority.rank, self._held(), self.engine.info, self.engine.stats, most)

    @property
    def _may_begin(self) -> bool:
        if self._closing.is_set() or self.trouble is not None:
            return False
        return self.engine.ready and not self.engine.on_trial

    def _held(self) -> list[capacity.Held]:
        # The others are being committed: the engine has done with them.
        return [slot.held() for slot in self._slots.all() if not slot.ended.is_set()]

    def _idle_neighbours(self) -> int:
        """Other workers that serve the model and had nothing to do at their last heartbeat."""
        others = {i: info for i, info in self._state.workers().items() if i != self._worker_id}
        mine = self._settings.model_name
        return sum(
            mine in info.models and info.state == "ready" and not info.in_hand and info.trouble is None
            for info in others.values()
        )
