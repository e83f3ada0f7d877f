"""EngineClient: the worker's side of the engine process. Starts it, feeds it, restarts it."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Protocol

from ..engine.messages import EngineInfo, Failed, Output, Request, Stats, Step
from ..engine.process import EngineProcess
from ..engine.settings import EngineSettings
from ..schemas.errors import EngineUnavailable, GristmillError

log = logging.getLogger(__name__)

POLL_S = 0.2
HUNG_S = 0.5
"""How long an engine that is given up may take to leave by itself."""


class Listener(Protocol):
    """Who hears of the engine's steps. Called on the reader thread: be quick, do no I/O."""

    def on_step(self, outputs: list[Output], stats: Stats, now: float) -> None:
        """New tokens."""

    def resume(self, request_ids: set[str]) -> list[Request]:
        """The engine died with these; return what the next one has to continue."""
        ...

    def on_engine_gone(self, reason: str) -> None:
        """It died for good: too many restarts without progress."""


class EngineClient:
    """Thread-safe. One reader thread turns the engine's messages into calls of the listener.

    Law: ``_submitted`` holds every request that was submitted and has neither finished nor been aborted, and
    each of them is in the live engine, or will be given to the next one.
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
        self._submitted: set[str] = set()
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

    def submit(self, request: Request) -> None:
        """Hand a request to the engine. Should that die, the next one gets it through ``Listener.resume``."""
        with self._lock:
            if not self._submitted:
                self._heard_at = time.monotonic()
            self._submitted.add(request.id)
            if self._process is not None:
                with suppress(EngineUnavailable):  # the reader is about to see it, and resumes this request
                    self._process.add([request])

    def abort(self, request_id: str) -> None:
        """Free the request's blocks within a step. Unknown ids are ignored."""
        with self._lock:
            self._submitted.discard(request_id)
            if self._process is not None:
                with suppress(EngineUnavailable):
                    self._process.abort([request_id])

    def stop(self) -> None:
        """End the process and the reader."""
        self._stopping.set()
        if self._process is not None:
            self._process.stop()
        if self._reader.is_alive():
            self._reader.join(timeout=5.0)

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
            elif self._submitted and (silent_s := time.monotonic() - self._heard_at) > self._stall_s:
                self._recover(f"engine_stalled: no step for {silent_s:.0f} s with work in hand")

    def _take(self, step: Step) -> None:
        self.stats, self._heard_at = step.stats, time.monotonic()
        if any(output.token_ids for output in step.outputs):
            self._restarts_left = self._restarts
        self._forget({output.id for output in step.outputs if output.finish is not None})
        self._listener.on_step(step.outputs, step.stats, time.time())

    def _forget(self, finished: set[str]) -> None:
        if finished:
            with self._lock:
                self._submitted -= finished

    def _recover(self, reason: str) -> None:
        """Start another engine and give it everything that was running, tokens so far included."""
        log.error("engine.lost", extra={"reason": reason, "restarts_left": self._restarts_left})
        if self._process is not None:
            self._process.stop(HUNG_S)  # without our lock: whoever waits for a hung engine to listen holds it
        with self._lock:
            self._process = None
        self.stats = None  # the next one's cache is empty: room must not be judged by these
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

    def _hand_over(self, process: EngineProcess) -> None:
        """Make ``process`` the engine. Raises EngineUnavailable if it died already; nothing is lost then."""
        with self._lock:
            requests = self._listener.resume(set(self._submitted))
            self._submitted = {request.id for request in requests}
            process.add(requests)
            self._process, self._heard_at = process, time.monotonic()
