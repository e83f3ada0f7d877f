"""Lifecycle: heartbeats, cancellations, deadlines, and the ways a worker ends."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from types import FrameType

from ..backends.state import State, WorkerInfo
from ..schemas.errors import GristmillError, Misconfigured, Transient
from .depth import Depth
from .handler import JobHandler
from .settings import WorkerSettings

log = logging.getLogger(__name__)

TICK_S = 0.25
RECONCILE_EVERY_S = 5.0
LEAVE_S = 20.0
"""From the end of ``drain_s`` to the end of the process, whatever does not answer by then. Grace periods must
exceed the sum."""
FLUSH_S, RETURN_S, THREAD_END_S = 5.0, 8.0, 2.0


class Lifecycle:
    """One thread that ticks, one that listens for cancellations, one that counts what waits, and the signal
    handlers.

    The worker ends by ``stop`` (asked to, or out of work) or by ``give_up`` (the engine, or a thread of ours,
    is gone). Ending means: take nothing more, finish what fits in ``drain_s``, hand the rest back with its
    journal, exit.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        worker_id: str,
        *,
        state: State,
        handler: JobHandler,
        queues: list[str],
        waiting: Callable[[], int],
        exit_loop: Callable[[], None],
        force_exit: Callable[[int], object] = os._exit,
        leave_s: float = LEAVE_S,
    ) -> None:
        self._settings, self._worker_id = settings, worker_id
        self._state, self._handler, self._queues = state, handler, queues
        self._exit_loop, self._force_exit = exit_loop, force_exit
        self._depth = Depth(waiting, settings.heartbeat_every_s)
        self._leave_s = leave_s
        self._begin = threading.Lock()  # whoever takes it drains; it is never given back
        self._stopping = threading.Event()
        self._hurry = threading.Event()
        self._ended = threading.Event()
        self._started_at = time.monotonic()
        self._beat_at = self._reconciled_at = 0.0
        self._left = False  # the registration is withdrawn
        self._threads = (
            threading.Thread(target=self._tick_forever, name="lifecycle", daemon=True),
            threading.Thread(target=self._listen_forever, name="control", daemon=True),
        )
        self.exit_code = 0

    @property
    def draining(self) -> bool:
        """No new jobs: the worker is on its way out."""
        return self._stopping.is_set()

    def start(self) -> None:
        """Announce the worker, then begin ticking and listening. Call once the engine is ready."""
        self._beat(time.monotonic())
        self._depth.start()
        for thread in self._threads:
            thread.start()

    def finish(self, exit_code: int) -> None:
        """The consumer's loop has ended. If nobody here told it to, hand everything back now.

        Celery ends it on a remote ``shutdown`` or an error of its own; then jobs in hand would hold the
        process for ever. Returns when no thread of ours uses the state server any more.
        """
        if not self.draining:
            self.exit_code = exit_code
            self._hurry.set()
            self.stop("the consumer ended by itself")
        self._ended.wait(self._leave_s)
        self._depth.stop(THREAD_END_S)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(THREAD_END_S)

    def install_signal_handlers(self) -> None:
        """SIGTERM, SIGINT and SIGHUP drain; a second one hands back at once.

        Not a second SIGHUP: a terminal that closes may send two. Under ``nohup`` it stays ignored.
        """
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._stopping.is_set() and number != signal.SIGHUP:
            self._hurry.set()
        self.stop(signal.Signals(number).name)

    def stop(self, reason: str) -> None:
        """Begin the drain."""
        if self._begin.acquire(blocking=False):
            self._stopping.set()
            # A new thread: this one may be a signal handler, which must not wait.
            threading.Thread(target=self._drain, args=(reason,), name="drain", daemon=True).start()

    def give_up(self, reason: str, exit_code: int = Transient.exit_code) -> None:
        """Something without which no job can end is gone for good: hand all of them back, and leave."""
        log.error("worker.gives_up", extra={"reason": reason})
        self.exit_code = exit_code
        self._hurry.set()
        self.stop("gives up")

    def on_thread_died(self, death: threading.ExceptHookArgs) -> None:
        """For ``threading.excepthook``. A thread ended by a mistake of ours, and nobody does its work now.

        Whichever it was, jobs would stand still here while their leases are renewed: leave them to others.
        """
        if self._ended.is_set() or issubclass(death.exc_type, SystemExit):
            return
        name = death.thread.name if death.thread else "?"
        trace = death.exc_value and (death.exc_type, death.exc_value, death.exc_traceback)
        log.critical("thread.died", exc_info=trace, extra={"who": name})
        self.give_up(f"the thread {name} died", GristmillError.exit_code)

    def _drain(self, reason: str) -> None:
        try:
            self._empty(reason)
        finally:
            self._ended.set()
            self._exit_loop()

    def _empty(self, reason: str) -> None:
        """Finish what fits in ``drain_s``, hand the rest back. Bounded, whatever does not answer."""
        log.info("worker.draining", extra={"reason": reason, "in_hand": self._handler.in_hand})
        self._handler.wind_down()
        deadline = time.monotonic() + self._settings.drain_s
        while self._handler.unfinished and time.monotonic() < deadline and not self._hurry.is_set():
            self._hurry.wait(0.05)
        self._set_a_limit()
        returned = self._handler.hand_back(flush_s=FLUSH_S)
        deadline = time.monotonic() + RETURN_S
        while self._handler.in_hand and time.monotonic() < deadline:
            time.sleep(0.02)
        self._left = True
        if self._handler.publisher.healthy:  # the registration also expires by itself
            with suppress(Transient, Misconfigured):
                self._state.unregister(self._worker_id)
        log.info("worker.drained", extra={"handed_back": returned})

    def _set_a_limit(self) -> None:
        """Python waits for threads that wait for servers: what is not said by then is left to the leases."""

        def leave() -> None:
            log.warning(
                "worker.forced_exit", extra={"in_hand": self._handler.in_hand, "after_s": self._leave_s}
            )
            self._force_exit(self.exit_code)

        timer = threading.Timer(self._leave_s, leave)
        timer.daemon = True
        timer.start()

    # ---- ticking

    def _tick_forever(self) -> None:
        while not self._ended.wait(TICK_S):
            try:
                self._tick(time.monotonic())
            except (Transient, Misconfigured) as exc:  # a password that was revoked may come back
                log.warning("state.unavailable", extra={"code": exc.code, "reason": exc.message})
                with suppress(GristmillError):  # then the next tick tries again
                    self._state.revive()

    def _tick(self, now: float) -> None:
        self._handler.expire(now)
        if now - self._beat_at >= self._settings.heartbeat_every_s and not self._left:
            self._beat(now)  # while draining, too: its jobs are not anybody else's yet
        if now - self._reconciled_at >= RECONCILE_EVERY_S:
            self._reconciled_at = now
            for job_id in self._state.cancelled(self._handler.job_ids()):
                self._handler.cancel(job_id)
        self._maybe_leave(now)

    def _beat(self, now: float) -> None:
        self._state.register(self._worker_id, self._describe(), 3 * self._settings.heartbeat_every_s)
        self._beat_at = now

    def _describe(self) -> WorkerInfo:
        engine = self._handler.engine
        info, stats = engine.info, engine.stats
        return WorkerInfo(
            models=(self._settings.model_name,),
            queues=tuple(self._queues),
            host=socket.gethostname(),
            pid=os.getpid(),
            version=version("gristmill"),
            fingerprint=self._handler.fingerprint,
            max_model_len=info.max_model_len,
            trouble=self._handler.trouble
            or self._handler.committer.waits_for
            or self._handler.segments.waits_for,
            state="draining" if self.draining else "ready" if engine.ready else "starting",
            in_hand=self._handler.in_hand,
            running=0 if stats is None else stats.running,
            waiting=0 if stats is None else stats.waiting,
            seen_at=time.time(),
        )

    def _maybe_leave(self, now: float) -> None:
        """``--burst`` and ``--idle-exit-s``: end when there is nothing to do."""
        settings = self._settings
        if self.draining or self._handler.in_hand or not (settings.burst or settings.idle_exit_s):
            return
        # A claim may be on its way from the broker to a thread: a moment's patience even in a burst.
        over_at = max(self._handler.last_busy_at, self._started_at) + (settings.idle_exit_s or 1.0)
        if now >= over_at and self._depth.was_none(over_at):
            self.stop("burst" if settings.burst else "idle")

    # ---- cancellations

    def _listen_forever(self) -> None:
        """Cancellations as they are announced. A lost one is found by the reconciliation in ``_tick``."""
        while not self._ended.is_set():
            try:
                for job_id in self._state.cancellations(self._settings.model_name, self._ended):
                    self._handler.cancel(job_id)
            except (Transient, Misconfigured):  # ``_tick`` says so
                self._ended.wait(1.0)
