"""EngineProcess: an ``Engine`` in a process of its own, seen from the consumer."""

from __future__ import annotations

import select
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable
from typing import Self

from ..schemas.errors import (
    BadInput,
    EngineUnavailable,
    InvalidRequest,
    Misconfigured,
    ModelInvalid,
    ModelNotFound,
)
from . import pipe
from .messages import Abort, Add, Command, EngineInfo, Failed, Ready, Report, Request, Step, Stop, Taken
from .parallel.launch import Followers, told_of
from .parallel.link import RANK_GONE
from .quick_torch import will_do
from .settings import EngineSettings
from .spawn import QUICK, WHOLE, spawn, take_early

DIED = "engine_died"
STOPPED = "engine_stopped"
START_UP_ERRORS: dict[str, type[BadInput]] = {c.code: c for c in (Misconfigured, ModelInvalid, ModelNotFound)}


class EngineProcess:
    """Starts an engine and talks to it, so that its crashes and its GIL are not the consumer's.

    ``add``, ``abort`` and ``stop`` may be called from any thread; ``recv`` from one at a time, and somebody
    has to call it: an engine whose reports are not read stops stepping.

    The process ends when this object's end of the socket closes, be it through ``stop`` or because the
    consumer died, however it died. (Not by PR_SET_PDEATHSIG: that fires when the *thread* that called
    ``start`` ends.) It has its own session, so that a terminal's Ctrl-C leaves it to the consumer to stop it.
    An instance is started once; after a Failed, make a new one.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._followers = Followers(settings)
        self._sock: socket.socket
        """There once there is a process."""
        self._sending = threading.Lock()
        self._frames = pipe.FrameReader()
        self._received: deque[Report] = deque()
        self._info: EngineInfo | None = None
        self._failed: Failed | None = None
        self._stopping = False
        self._ids: set[str] = set()
        self._untaken: set[str] = set()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def rank_pids(self) -> list[int]:
        """Of all ranks, the engine's own process first."""
        return [self._process.pid, *self._followers.pids] if self._process else []

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def untaken(self) -> frozenset[str]:
        """Requests that were sent and that the engine has not said it took: if it died of one of them, it was
        of reading it."""
        return frozenset(self._untaken)

    def start(self) -> None:
        """Start the process and return at once; ``wait_ready`` waits for the model to be loaded."""
        assert self._process is None, "an EngineProcess is started once"
        assert not self._stopping, "it has been stopped"
        module, followers = QUICK if will_do(self._settings) else WHOLE, self._followers
        spawned = take_early(module) or spawn(
            module, followers.arguments, followers.descriptors, followers.environment
        )
        self._process, self._sock = spawned.process, spawned.sock
        followers.start(spawned.environment)
        assert self._process.stdin
        self._process.stdin.write(self._settings.model_dump_json().encode())
        self._process.stdin.close()

    def wait_ready(self, timeout_s: float) -> EngineInfo:
        """Wait until the model is loaded.

        Raises Misconfigured, ModelInvalid or ModelNotFound as the engine did, and EngineUnavailable if it
        died otherwise or is not ready in time; it goes on loading in the latter case.
        """
        deadline = time.monotonic() + timeout_s
        while self._info is None:
            report = self._next(deadline - time.monotonic())
            if isinstance(report, Failed):
                raise START_UP_ERRORS.get(report.code, EngineUnavailable)(report.message)
            if report is None:
                raise EngineUnavailable(f"the engine (pid {self.pid}) is not ready after {timeout_s:g} s")
        return self._info

    def add(self, requests: Iterable[Request]) -> None:
        """Send requests. One that cannot be run is answered with an output, ``finish="error"``.

        Raises InvalidRequest for an id that has not ended yet (then nothing is sent), EngineUnavailable.
        """
        batch = list(requests)
        ids = [request.id for request in batch]
        with self._sending:
            known = self._ids.intersection(ids)
            if known or len(set(ids)) < len(ids):
                raise InvalidRequest(f"running already, or given twice: {', '.join(sorted(known or ids))}")
            self._ids.update(ids)
            self._untaken.update(ids)
            self._send(Add(batch))

    def abort(self, ids: Iterable[str]) -> None:
        """End these; each that has not ended by then has one more output. Raises EngineUnavailable."""
        with self._sending:
            self._send(Abort(list(ids)))

    def recv(self, timeout_s: float | None = None) -> Step | Failed | None:
        """The next report, in the engine's order. None: nothing within ``timeout_s`` (None: wait for ever).

        Failed is the last word: every later call returns it again.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            report = self._next(None if deadline is None else deadline - time.monotonic())
            if not isinstance(report, Ready | Taken):
                return report

    def stop(self, timeout_s: float = 5.0) -> None:
        """End the process, after the step in hand if that takes less than ``timeout_s``. Idempotent."""
        self._stopping = True
        if self._process is None:
            return
        try:
            if self._process.poll() is None:
                deadline = time.monotonic() + timeout_s
                self._send_stop(timeout_s)
                self._process.wait(max(0.0, deadline - time.monotonic()))
        except (EngineUnavailable, subprocess.TimeoutExpired):
            self._process.kill()
        self._process.wait()
        self._followers.kill()

    def _send_stop(self, timeout_s: float) -> None:
        """Say Stop, unless the engine takes nothing: whoever is stuck in a send to it holds the lock.

        Killing the engine frees that one. A socket with room takes a frame this small whole.
        """
        if not self._sending.acquire(timeout=timeout_s):
            return
        try:
            room = select.poll()
            room.register(self._sock, select.POLLOUT)
            if room.poll(timeout_s * 1000):
                self._send(Stop())
        finally:
            self._sending.release()

    def _send(self, message: Command) -> None:
        if self._process is None or self._failed:
            raise EngineUnavailable(self._failed.message if self._failed else "the engine is not started")
        try:
            self._sock.sendall(pipe.encode(message))
        except OSError as exc:
            raise EngineUnavailable(f"the engine (pid {self.pid}) takes no more requests: {exc}") from exc

    def _next(self, timeout_s: float | None) -> Report | None:
        """One report off the socket; keeps the books that depend on it."""
        if not self._received:
            if self._failed:
                return self._failed
            self._receive(timeout_s)
        report = self._received.popleft() if self._received else None
        if isinstance(report, Step):
            self._ids.difference_update(output.id for output in report.outputs if output.finish)
        elif isinstance(report, Taken):
            self._untaken.difference_update(report.ids)
        elif isinstance(report, Ready):
            self._info = report.info
        elif isinstance(report, Failed):
            self._failed = report
        return report

    def _receive(self, timeout_s: float | None) -> None:
        """Wait for bytes and decode them; the end of the stream becomes a Failed."""
        poll = select.poll()  # select() cannot take descriptors above 1023
        poll.register(self._sock, select.POLLIN)
        deadline = None if timeout_s is None else time.monotonic() + max(0.0, timeout_s)
        while not self._received:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not poll.poll(None if left is None else left * 1000):
                return
            try:
                data = self._sock.recv(pipe.RECEIVE_BYTES)
            except ConnectionResetError:  # it died with unread commands
                data = b""
            if not data:
                self._received.append(self._end())
                return
            for message in self._frames.feed(data):
                assert isinstance(message, Report), f"not a report: {type(message).__name__}"
                self._received.append(message)

    def _end(self) -> Failed:
        """Why the stream ended: the socket is closed, so the process has ended or is about to."""
        assert self._process
        try:
            status = self._process.wait(5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return Failed(DIED, f"the engine (pid {self.pid}) closed its pipe and hung; it was killed")
        if self._stopping:
            return Failed(STOPPED, f"the engine (pid {self.pid}) was stopped")
        gone = self._followers.end()
        if status == RANK_GONE and gone:
            return Failed(DIED, f"the engine (pid {self.pid}) lost {gone}")
        return Failed(DIED, f"the engine (pid {self.pid}) {told_of(status)}")
