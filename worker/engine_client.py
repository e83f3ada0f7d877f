"""EngineClient: the worker's side of the engine process. Starts, feeds and restarts it, finds culprits."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Protocol

from ..engine.messages import EngineInfo, Failed, Output, Request, Stats, Step
from ..engine.process import EngineProcess
from ..engine.settings import EngineSettings
from ..schemas.errors import EngineUnavailable, GristmillError
from .generation import CHOICE_MARK
from .trials import Trials, Verdict

log = logging.getLogger(__name__)

POLL_S = 0.2
HUNG_S = 0.5
"""How long an engine that is given up may take to leave by itself."""
CANARY = Request(id="canary", prompt_ids=[0], max_tokens=1, seed=0, ignore_eos=True)
"""The first request of a new engine. One that cannot bear even this is broken, and no job is to blame."""


def attempt_of(request_id: str) -> str:
    """The attempt that a request belongs to: one of its choices, or its only one."""
    return request_id.partition(CHOICE_MARK)[0]


class Listener(Protocol):
    """Who hears of the engine's steps. Called on the reader thread: be quick, do no I/O."""

    def on_step(self, outputs: list[Output], stats: Stats, now: float) -> None:
        """New tokens."""

    def on_crash(self, reason: str, verdict: Verdict, now: float) -> AbstractSet[str]:
        """The engine died. Returns the suspects that the listener gives up for it."""
        ...

    def arm(self, attempt: str) -> bool:
        """It is about to run alone: put that on record, then call ``armed``. False: it is over."""
        ...

    def awaits_record(self, attempt: str) -> bool:
        """It ran alone, and the record does not say yet that it lived. ``recorded`` will be called."""
        ...

    def resume(self, request_ids: set[str]) -> list[Request]:
        """What the engine has to continue, tokens so far included. Those left out are forgotten."""
        ...

    def on_engine_gone(self, reason: str) -> None:
        """It died for good: too many restarts without progress."""


class EngineClient:
    """Thread-safe. One reader thread turns the engine's messages into calls of the listener.

    A job's choices are a request each, of one attempt: ``a@1#0``, ``a@1#1``. They are tried together: a crash
    is the attempt's.

    Law: ``_trials`` holds every attempt of whose requests one has neither finished nor been aborted;
    ``_open`` says which. Those it calls runnable are in the live engine, or will be given to it or to the
    next one; the others wait for a trial to end.
    """

    def __init__(
        self,
        settings: EngineSettings,
        listener: Listener,
        *,
        start_timeout_s: float,
        stall_s: float,
        restarts: int,
    ) -> None:
        self._settings, self._listener = settings, listener
        self._start_timeout_s, self._stall_s = start_timeout_s, stall_s
        self._restarts = self._restarts_left = restarts
        self._process: EngineProcess | None = None
        self._lock = threading.Lock()
        self._trials = Trials()
        self._open: dict[str, set[str]] = {}  # requests that have not ended, by attempt
        self._inside: set[str] = set()  # given to the live engine; not ended there
        self._leaving: set[str] = set()  # of these: told to stop, for good or for a trial's sake
        self._arming: str | None = None  # the listener was asked to put on record that it runs alone
        self._armed: str | None = None  # and has done so; what became of it is not on record yet
        self._proven = True  # the engine has answered the canary, or its own warm-up
        self._stopping = threading.Event()
        self._reader = threading.Thread(target=self._read, name="engine-reader", daemon=True)
        self._info: EngineInfo | None = None
        self.stats: Stats | None = None
        self._heard_at = time.monotonic()  # the last step, or when there began to be work

    @property
    def info(self) -> EngineInfo:
        """What the engine said of itself when it was ready. Raises EngineUnavailable before that."""
        if self._info is None:
            raise EngineUnavailable("the engine is still starting; try again in a few seconds")
        return self._info

    @property
    def ready(self) -> bool:
        """An engine process is up and has loaded its model."""
        process = self._process
        return self._info is not None and process is not None and process.alive

    @property
    def on_trial(self) -> bool:
        """Jobs are being tried for a crash of the engine: all others wait."""
        return self._trials.on or not self._proven

    @property
    def alive(self) -> bool:
        """Not given up: an engine runs, starts or is being restarted."""
        return not self._stopping.is_set()

    def launch(self) -> None:
        """Start the process; do something else while it loads, then ``wait_ready``."""
        self._process = EngineProcess(self._settings)
        self._process.start()

    def wait_ready(self) -> EngineInfo:
        """Wait for the model, then begin reading. Raises what kept the engine from starting."""
        assert self._process is not None, "wait_ready before launch"
        self._info = self._process.wait_ready(self._start_timeout_s)
        self._reader.start()
        return self._info

    def submit(self, *requests: Request, suspect: bool = False) -> None:
        """Hand an attempt to the engine. Should that die, the next one gets it through ``Listener.resume``.

        A suspect, of whom the journal tells that workers died with it, runs alone until it has made a token.
        """
        self.submit_all([(requests, suspect)])

    def submit_all(self, attempts: Sequence[tuple[Sequence[Request], bool]]) -> None:
        """The same of many attempts: the requests of each, and whether it is a suspect."""
        with self._lock:
            for requests, suspect in attempts:
                attempt = attempt_of(requests[0].id)
                self._open[attempt] = {request.id for request in requests}
                self._trials.add(attempt, suspect=suspect)
            if self._anybody_waits or not self._proven:
                self._arrange()
            else:
                self._give([request for requests, _ in attempts for request in requests])

    def armed(self, attempt: str) -> None:
        """The answer to ``Listener.arm``, any time later."""
        with self._lock:
            if attempt == self._arming:  # not for a trial that was called off
                self._arming, self._armed = None, attempt
                self._arrange()

    def recorded(self) -> None:
        """What became of somebody who ran alone is on record."""
        with self._lock:
            self._arrange()

    def abort(self, name: str) -> None:
        """Free the blocks of a request, or of a whole attempt, within a step. Unknown names are ignored."""
        with self._lock:
            if attempt_of(name) == name:
                self._forget(name)
            else:
                self._close(name)
            self._arrange()

    def stop(self) -> None:
        """End the process and the reader."""
        self._stopping.set()
        if self._process is not None:
            self._process.stop()
        if self._reader.is_alive():
            self._reader.join(timeout=5.0)

    # ---- who is in the engine (the caller holds the lock)

    def _arrange(self) -> None:
        """Bring the engine's requests in line with what the trials allow.

        Before a trial everybody else leaves, and has left, so that a crash meets nobody but the suspects.
        After one nobody else comes before the record says that its suspect lived: should the next one take
        the worker along, whoever stands there as running alone is blamed.
        """
        if not self._proven or self._process is None:
            return
        runnable = self._trials.runnable
        if going := self._inside - self._leaving - self._requests(runnable):
            self._leaving |= going
            with suppress(EngineUnavailable):
                self._process.abort(going)
        if self._leaving:
            return
        while coming := self._requests(self._trials.runnable) - self._inside:
            alone = self._trials.alone
            if self._armed is not None and self._armed != alone:
                if self._listener.awaits_record(self._armed):
                    return
                self._armed = None
            if alone is not None and self._armed != alone:
                if self._arming != alone and not self._listener.arm(alone):
                    self._forget(alone)  # it ended just before it was submitted
                    continue
                self._arming = alone
                return
            requests = self._listener.resume(set(coming))
            for request_id in coming.difference(request.id for request in requests):
                self._close(request_id)
            self._give(requests)

    def _requests(self, attempts: AbstractSet[str]) -> set[str]:
        """Those of these that have not ended."""
        return {name for attempt in attempts for name in self._open.get(attempt, ())}

    def _close(self, request_id: str) -> None:
        """It has ended, and with the last of them its attempt."""
        attempt = attempt_of(request_id)
        requests = self._open.get(attempt, set[str]())
        requests.discard(request_id)
        if not requests:
            self._forget(attempt)

    def _forget(self, attempt: str) -> None:
        self._open.pop(attempt, None)
        self._trials.remove(attempt)

    def _give(self, requests: list[Request]) -> None:
        if not self._inside:
            self._heard_at = time.monotonic()
        self._inside.update(request.id for request in requests)
        if self._process is not None and requests:
            with suppress(EngineUnavailable):  # the reader is about to see it, and resumes these
                self._process.add(requests)

    # ---- reader thread

    def _read(self) -> None:
        while not self._stopping.is_set():
            process = self._process
            assert process is not None
            message = process.recv(POLL_S)
            if isinstance(message, Step):
                self._take(message)
            elif self._stopping.is_set():
                return
            elif isinstance(message, Failed):
                self._recover(f"{message.code}: {message.message}")
            elif self._busy and (silent_s := time.monotonic() - self._heard_at) > self._stall_s:
                self._recover(f"engine_stalled: no step for {silent_s:.0f} s with work in hand")

    @property
    def _busy(self) -> bool:
        return bool(self._inside) or not self._proven

    def _take(self, step: Step) -> None:
        self.stats, self._heard_at = step.stats, time.monotonic()
        if any(output.token_ids for output in step.outputs):
            self._restarts_left = self._restarts
        stopped = {o.id for o in step.outputs if o.finish == "abort" and o.id in self._leaving}
        told = [o for o in step.outputs if o.id not in stopped and o.id != CANARY.id]
        self._listener.on_step(told, step.stats, time.time())
        with self._lock:
            waiting = self._anybody_waits
            self._note(step.outputs)
            if waiting:
                self._arrange()

    @property
    def _anybody_waits(self) -> bool:
        """For a trial to end, for somebody to leave before it, or for the record after it."""
        return self._trials.on or bool(self._leaving) or self._armed is not None

    def _note(self, outputs: list[Output]) -> None:
        for output in outputs:
            if output.id == CANARY.id:
                self._proven = True
                self._arrange()
                continue
            if output.token_ids:
                self._trials.progress(attempt_of(output.id), len(output.token_ids))
            if output.finish is not None:
                self._inside.discard(output.id)
                if output.id in self._leaving:
                    self._leaving.discard(output.id)
                    if output.finish == "abort":
                        continue  # it comes again after the trial
                self._close(output.id)

    def _recover(self, reason: str) -> None:
        """Start another engine and give it everything that was running, tokens so far included."""
        log.error("engine.lost", extra={"reason": reason, "restarts_left": self._restarts_left})
        if self._process is not None:
            self._process.stop(HUNG_S)  # without our lock: whoever waits for a hung engine to listen holds it
        with self._lock:
            untaken = self._process.untaken if self._process is not None else frozenset[str]()
            self._process, self._proven = None, False  # who is submitted now waits for the next one
            # Who had just been sent is not to blame, unless reading it is all that the engine had to do.
            ran = self._inside - untaken or self._inside
            verdict = self._trials.crashed({attempt_of(request_id) for request_id in ran})
            self._inside, self._leaving = set(), set()  # who is being armed is not inside: the answer counts
            if self._armed in verdict.suspects:
                self._armed = None  # the crash itself goes on its record
        self.stats = None  # the next one's cache is empty: room must not be judged by these
        self._blame(reason, verdict)
        while self._restarts_left > 0 and not self._stopping.is_set():
            self._restarts_left -= 1
            process = EngineProcess(self._settings)
            try:
                process.start()
                self._info = process.wait_ready(self._start_timeout_s)
                self._hand_over(process)
            except GristmillError as exc:
                reason = exc.message
                log.warning("engine.restart_failed", extra={"reason": reason})
                process.stop()
                continue
            log.warning("engine.restarted", extra={"restarts_left": self._restarts_left})
            return
        if not self._stopping.is_set():
            self._stopping.set()
            self._listener.on_engine_gone(reason)

    def _blame(self, reason: str, verdict: Verdict) -> None:
        if verdict.suspects:
            log.warning(
                "engine.suspects", extra={"count": len(verdict.suspects), "alone": verdict.alone is not None}
            )
        given_up = self._listener.on_crash(reason, verdict, time.time())
        with self._lock:
            for attempt in given_up:
                self._forget(attempt)

    def _hand_over(self, process: EngineProcess) -> None:
        """Make ``process`` the engine: once it has answered the canary it gets what is runnable.

        Raises EngineUnavailable if it died already; nothing is lost then.
        """
        with self._lock:
            process.add([CANARY])
            self._process, self._heard_at = process, time.monotonic()
