"""Keeper: ends the jobs that no worker will end, and sweeps up. START HERE.

Any number may run, in processes of their own and inside workers; one leads. Nothing depends on that: each
duty is safe to do twice, and at the same time, so a leader that slept and wakes does no harm.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ..backends.dead import DeadLetters, job_of, open_dead
from ..backends.message_queue import MessageQueue
from ..backends.outbox import open_outbox
from ..backends.redis import redis_errors
from ..backends.segment_messages import SegmentSender
from ..backends.sink import ResultSink
from ..backends.sqs_dead import SqsDead
from ..backends.state import Due, State, open_state, state_url
from ..backends.store import open_store
from ..schemas.batch import is_segment
from ..schemas.dead import DeadLetter
from ..schemas.errors import BadInput, GristmillError, Misconfigured, Transient
from ..schemas.job import JOB_ID_PATTERN
from ..schemas.result import ErrorInfo, FinishReason
from ..schemas.settings import Settings
from .batch_rounds import BatchRounds
from .courier import Courier
from .endings import Ending, Endings
from .finisher import Finisher
from .pruner import Pruner
from .settings import KeeperSettings, shared_settings

log = logging.getLogger(__name__)

T = TypeVar("T")

ID_PREFIX = "keeper-"
"""Keepers are not among the live workers; by this one knows who fenced an attempt."""
OWNED_AGAIN_S = 5.0
"""A worker that lives has ended its job by then; if it died, we do."""
CRASHED_AGAIN_S = 300.0
"""A job that we cannot end for a mistake of ours stands in nobody's way for so long."""
TIDY_EVERY_S = 60.0
RETRY_S = 1.0
EMBEDDED_RETRY_S = 15.0


@dataclass(slots=True)
class Round:
    """What one round did."""

    ended: int = 0
    deferred: int = 0
    """Due, and a live worker is about to end them."""
    drained: int = 0
    """Dead letters whose jobs got a final state."""
    swept: int = 0
    """Claims of dead workers that went back to their queues."""
    pruned: int = 0
    """Waiting messages of jobs that had ended."""
    sent: int = 0
    """Segments of batches that got a message."""
    full: bool = False
    """There is more to do."""

    @property
    def idle(self) -> bool:
        return not any(getattr(self, name) for name in _DONE)


_DONE = ("ended", "drained", "swept", "pruned", "sent")


class Keeper:
    """``queue``: the broker, if that is a Redis; ``sqs_dead``: if it is SQS. ``prunes``: it holds the jobs'
    states, too."""

    def __init__(
        self,
        settings: KeeperSettings,
        keeper_id: str,
        *,
        state: State,
        sink: ResultSink,
        dead: DeadLetters,
        queue: MessageQueue | None,
        prunes: bool,
        sqs_dead: SqsDead | None = None,
        batches: BatchRounds | None = None,
        check_store: Callable[[], None] = lambda: None,
        courier: Courier | None = None,
    ) -> None:
        self._settings, self.id = settings, keeper_id
        self.courier = courier
        self._state, self._dead, self._queue, self._sqs_dead = state, dead, queue, sqs_dead
        self._endings = Endings(state, sink, keeper_id)
        self._batches = batches
        self._pruner = Pruner(queue) if queue is not None and prunes else None
        self._check_store, self._store_failed = check_store, False
        self._tidied_at = -TIDY_EVERY_S
        self.leads = False
        self.heard_at = time.monotonic()
        """When the last round that did not fail was over; by the monotonic clock."""
        self.totals = Round()

    # ---- rounds

    def run(self, stop: threading.Event) -> None:
        """Go round until ``stop`` is set, or for ever: whatever fails is logged and tried again."""
        if self.courier is not None:
            self.courier.start(lambda: self.leads)
        failing = False
        while not stop.is_set():
            try:
                self._run(stop)
                failing = False
            except (Transient, Misconfigured) as exc:  # a password that was revoked may come back
                if not failing:
                    log.warning("keeper.unavailable", extra={"code": exc.code, "reason": exc.message})
                failing = True
                self._revive()
            except Exception:  # the thread's edge: a keeper inside a worker must not take it down
                log.critical("keeper.crashed", exc_info=True)
            if not stop.is_set():
                stop.wait(RETRY_S)
        self.leave()
        if self.courier is not None:
            self.courier.stop()

    def _run(self, stop: threading.Event) -> None:
        with self._state.wakings() as wakings:
            while not stop.is_set():
                done = self.round() if self.lead() else None
                self.heard_at = time.monotonic()
                if done is None or not done.full:
                    wakings.get_raw(self._settings.keeper_every_s)

    def lead(self) -> bool:
        """Become or stay the leader, if nobody else is."""
        leads = self._state.lead(self.id, self._settings.keeper_lock_s)
        if leads != self.leads:
            log.info("keeper.leads" if leads else "keeper.follows", extra={"keeper": self.id})
        self.leads = leads
        return leads

    def leave(self) -> None:
        """Let another one lead at once."""
        if self.leads:
            self.leads = False
            try:
                self._state.lead(self.id, 0)
            except GristmillError as exc:  # the lock runs out by itself
                log.info("keeper.left_in_silence", extra={"code": exc.code})

    def round(self) -> Round:
        """All duties once, each with a bound. Raises BrokerUnavailable, StoreUnavailable, Misconfigured."""
        done = Round()
        if self._store_failed:  # a claim for nothing, every second, would fill the jobs' logs
            self._check_store()
        self._store_failed = True
        with ThreadPoolExecutor(self._settings.keeper_threads, "keeper") as threads:
            self._end_what_is_due(done, threads)
            self._drain_the_dead(done, threads)
        self._store_failed = False
        self._look_after_batches(done)
        self._sweep_up(done)
        if not done.idle:
            log.info("keeper.round", extra={name: v for name in _DONE if (v := getattr(done, name))})
        for name in (*_DONE, "deferred"):
            setattr(self.totals, name, getattr(self.totals, name) + getattr(done, name))
        return done

    # ---- duties

    def _end_what_is_due(self, done: Round, threads: ThreadPoolExecutor) -> None:
        """Cancelled and expired jobs that no live worker runs."""
        now, found = self._state.due(self._settings.keeper_batch)
        done.full |= len(found) == self._settings.keeper_batch
        self._state.not_due([due.job_id for due in found if due.state is None or due.state.final])
        ready: list[Due] = []
        for due in found:
            if due.state is None or due.state.final:
                continue
            if due.owned:
                self._state.defer(due.job_id, now + OWNED_AGAIN_S)
                done.deferred += 1
            elif due.cancelled or due.expires_at <= now:
                ready.append(due)
            else:
                self._state.defer(due.job_id, due.expires_at)

        def end(due: Due) -> bool:
            try:
                return self._end(_ending(due))
            except (Transient, Misconfigured):
                raise
            except Exception:  # one job's edge: the others must not wait for it
                log.critical("job.not_ended", exc_info=True, extra={"job_id": due.job_id})
                self._state.defer(due.job_id, now + CRASHED_AGAIN_S)
                return False

        done.ended += sum(_all(threads, end, ready))

    def _drain_sqs(self, done: Round, threads: ThreadPoolExecutor) -> None:
        """What SQS gave up on becomes a dead letter like any other. A few queues in each round."""
        sqs = self._sqs_dead
        if sqs is None:
            return

        def drain(model: str) -> bool:
            try:
                return sqs.drain(model)
            except (Transient, Misconfigured) as exc:  # one queue's trouble; another look in a minute
                text = {"model": model, "code": exc.code, "reason": exc.message}
                log.warning("dead_queue.not_drained", extra=text)
                return False

        due = sqs.due(self._state.models())
        done.full |= any(_all(threads, drain, due[: self._settings.keeper_threads]))

    def _drain_the_dead(self, done: Round, threads: ThreadPoolExecutor) -> None:
        """Jobs whose message will not be delivered again fail, if they have no final state yet."""
        self._drain_sqs(done, threads)
        letters = self._dead.undrained(self._settings.keeper_batch)

        def drain(letter: DeadLetter) -> bool:
            try:
                return self._drain(letter)
            except (Transient, Misconfigured):
                raise
            except Exception:  # as above; it is tried again, in no order, so the others get their turn
                log.critical("dead_letter.not_drained", exc_info=True, extra={"letter": letter.id})
                return False

        done.drained += sum(_all(threads, drain, letters))

    def _drain(self, letter: DeadLetter) -> bool:
        ended = False
        if letter.job_id is not None and re.fullmatch(JOB_ID_PATTERN, letter.job_id):
            _, (found,) = self._state.look([letter.job_id])
            if found.owned:
                return False  # its worker's to end
            if is_segment(letter.job_id):  # rows fail one by one; a message that was put aside is no reason
                if self._batches is not None:
                    self._batches.send_again(letter.job_id)
                self._dead.drained(letter.queue, letter.id)
                return False
            if found.state is None or not found.state.final:
                ended = self._end(_ending_of_the_dead(found, letter))
            if self._sqs_dead is not None and (ended or (found.state is not None and found.state.final)):
                self._sqs_dead.forget(letter)
        self._dead.drained(letter.queue, letter.id)
        return ended

    def _end(self, ending: Ending) -> bool:
        result = self._endings.end(ending)
        if result is None:
            return False
        log.info(
            "job.ended",
            extra={
                "job_id": result.job_id,
                "state": result.state.value,
                "attempts": result.attempts,
                "completion_tokens": result.usage.completion_tokens,
                "code": result.error.code if result.error else None,
            },
        )
        return True

    def _look_after_batches(self, done: Round) -> None:
        if self._batches is not None:
            looked = self._batches.round()
            done.sent += looked.sent
            done.full |= looked.full

    def settle(self) -> None:
        """Wait for what goes on beside the rounds."""
        if self._batches is not None:
            self._batches.settle()

    @property
    def batches_finished(self) -> int:
        """Batches that this keeper made final."""
        return 0 if self._batches is None else self._batches.finished

    def _sweep_up(self, done: Round) -> None:
        """What workers do for each other while there are any, and what nobody else does."""
        if time.monotonic() - self._tidied_at >= TIDY_EVERY_S:
            self._tidied_at = time.monotonic()
            self._state.tidy()
            if self._batches is not None:
                self._batches.forget_gone()
        with redis_errors("broker"):
            if self._queue is not None:
                period_s = 0.9 * self._settings.keeper_every_s
                done.swept += self._queue.sweep(period_s=period_s).returned
            if self._pruner is not None:
                models = self._state.models().values()
                done.pruned += self._pruner.walk([name for model in models for name in model.queues])

    def _revive(self) -> None:
        try:
            self._state.revive()
        except GristmillError as exc:
            log.debug("keeper.not_revived", extra={"code": exc.code})


@contextmanager
def open_keeper(settings: KeeperSettings, keeper_id: str) -> Generator[Keeper]:
    """With connections of its own. Raises Misconfigured, BrokerUnavailable (embedded, and does not start)."""
    sqs = settings.broker.startswith("sqs:")
    with ExitStack() as opened:
        state = opened.enter_context(open_state(settings))
        dead = opened.enter_context(closing(open_dead(settings)))
        store = open_store(settings.results, settings)
        sender = opened.enter_context(closing(SegmentSender(settings)))
        finisher = Finisher(state.batches, store, keeper_id, settings.keeper_lock_s)
        outbox = opened.enter_context(closing(open_outbox(settings)))
        sqs_dead = opened.enter_context(closing(SqsDead(settings, dead))) if sqs else None
        yield Keeper(
            settings,
            keeper_id,
            state=state,
            sink=ResultSink(state, store, inline_bytes=settings.inline_result_bytes),
            dead=dead,
            queue=None if sqs else MessageQueue(dead.client, lease_s=settings.visibility_timeout_s),
            prunes=state_url(settings) == settings.broker,
            sqs_dead=sqs_dead,
            batches=BatchRounds(
                state.batches,
                finisher,
                sender,
                sender.lacking,
                keeper_id=keeper_id,
                hold_s=settings.keeper_lock_s,
            ),
            check_store=store.check,
            courier=Courier(outbox, settings),
        )


def keep(settings: Settings, keeper_id: str, stop: threading.Event) -> None:
    """Be a keeper until ``stop`` is set, for who does something else besides. Raises nothing."""
    while not stop.is_set():
        try:
            with open_keeper(shared_settings(settings), keeper_id) as keeper:
                keeper.run(stop)
        except Exception as exc:  # noqa: BLE001 - whatever keeps it from starting, its host goes on
            reason = exc.message if isinstance(exc, GristmillError) else type(exc).__name__
            log.warning("keeper.not_started", extra={"reason": reason})
            stop.wait(EMBEDDED_RETRY_S)


def _all(threads: ThreadPoolExecutor, do: Callable[[T], bool], items: Iterable[T]) -> list[bool]:
    """In parallel; the first error is raised once all have been tried."""
    return [future.result() for future in [threads.submit(do, item) for item in items]]


def _ending(due: Due) -> Ending:
    return Ending(
        job_id=due.job_id,
        model=due.model,
        submitted_at=due.submitted_at,
        expires_at=due.expires_at,
        reason=FinishReason.CANCELLED if due.cancelled else FinishReason.EXPIRED,
        echo=due.echo,
    )


def _ending_of_the_dead(found: Due, letter: DeadLetter) -> Ending:
    """From the state, or where that is lost from the message itself, if it can be read."""
    model, submitted_at, expires_at = found.model, found.submitted_at, found.expires_at
    echo, webhook = found.echo, None
    if found.state is None:
        try:
            job = job_of(letter)
        except BadInput:
            pass
        else:
            model, submitted_at, expires_at = job.model, job.submitted_at, job.expires_at
            webhook = job.webhook
            echo = {"endpoint": job.endpoint, "custom_id": job.custom_id, "retry_of": job.retry_of}
            echo |= {"metadata": job.metadata, "seed": job.sampling.seed, "n": job.sampling.n}
    text = f"its message was put aside and is not delivered again: {letter.reason}; `gristmill dead show`"
    return Ending(
        job_id=found.job_id,
        model=model,
        submitted_at=submitted_at,
        expires_at=expires_at,
        reason=FinishReason.ERROR,
        error=ErrorInfo(code="dead_lettered", message=f"{text} has the rest"),
        echo=echo,
        webhook=webhook,
    )
