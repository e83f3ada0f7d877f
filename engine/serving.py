"""The engine in its own process: commands off a socket, reports onto it.

Two threads. The reader takes commands off the socket as they come, so that a step keeps no consumer waiting,
and ends the process at once when the consumer is gone. The main thread steps while there is work and blocks
while there is none.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import NoReturn

import torch

from ..schemas.errors import BadInput, GristmillError
from . import pipe
from .engine import Engine
from .memory import OUT_OF_MEMORY, OutOfStep, is_out_of_memory
from .messages import Abort, Add, Failed, Output, Ready, Report, Step, Stop, Taken
from .parallel.link import BLAME_S, RANK_GONE, Links
from .parallel.ranks import ONE_RANK, Group, Ranks, meet
from .settings import EngineSettings

log = logging.getLogger(__name__)

MAX_QUEUED_COMMANDS = 1024
"""Beyond this the reader pauses and, a socket buffer later, so does the consumer's ``add``."""
CONSUMER_GONE = 3
"""Exit status when the consumer closed its end: nothing is left to do, and nobody to tell."""
CHECK_AFTER_IDLE_S = 0.5
"""The books are checked once the engine has been idle for so long, so that no request waits for it."""

_SENDING = threading.Lock()
"""Of reports: the last one may be another thread's."""

Commands = queue.Queue[Add | Abort | Stop]


def serve_consumer(settings: EngineSettings) -> NoReturn:
    """Load, say Ready, serve until Stop. Exit status 0, or that of the error tree after a Failed."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    commands: Commands = queue.Queue(MAX_QUEUED_COMMANDS)
    threading.Thread(target=_read, args=(sock, commands), name="reader", daemon=True).start()
    links = Links([socket.socket(fileno=int(fd)) for fd in sys.argv[3:]], partial(_lost, sock))
    try:
        engine = Engine(settings, ranks=_ranks(settings, links))
        gc.freeze()  # what a start has made stays: no collection needs to look at it again
        gc.enable()
        _send(sock, Ready(engine.info))
        serve(engine, sock, commands)
        os._exit(0)  # all is said: taking torch apart module by module would cost half a second
    except Exception as exc:  # the process's edge: whatever it is, the consumer is told
        if sys.argv[3:] and not isinstance(exc, GristmillError):
            time.sleep(BLAME_S)  # an exchange that broke: the link to whoever is gone knows more, and ends us
        failed, status = _explain(exc)
        log.error("engine.failed", extra={"code": failed.code}, exc_info=status == 1)
        _send(sock, failed)
        sys.exit(status)


def _ranks(settings: EngineSettings, links: Links) -> Ranks:
    size = settings.tensor_parallel_size
    if size == 1:
        return ONE_RANK
    ends = meet(0, size, sys.argv[2], cuda=settings.device != "cpu" and torch.cuda.is_available())
    return Group(0, size, ends, links.tell)


def _lost(sock: socket.socket, rank: int, failed: Failed | None) -> NoReturn:
    """Another rank is gone, and with it the model. The consumer hears why: from it, or from its status."""
    log.error("engine.rank_lost", extra={"rank": rank, "code": failed.code if failed else None})
    if failed:
        _send(sock, failed)
    os._exit(RANK_GONE)


def serve(engine: Engine, sock: socket.socket, commands: Commands) -> None:
    """Obey and step until Stop. One Taken for each Add, one Step for each step, whatever came out of it."""
    report_s = 0.0
    while True:
        outputs: list[Output] = []
        for command in _take(commands, engine):
            if isinstance(command, Stop):
                return
            if isinstance(command, Add):
                _send(sock, Taken([request.id for request in command.requests]))
                outputs += _add(engine, command)
            else:
                outputs += _abort(engine, command)
        outputs += engine.step()
        stats = replace(engine.stats, report_s=report_s)
        ended = time.monotonic()
        _send(sock, Step(outputs, stats))
        report_s = time.monotonic() - ended


def _take(commands: Commands, engine: Engine) -> Iterator[Add | Abort | Stop]:
    """What has arrived; while the engine has no work, wait for something to arrive."""
    if not engine.has_work:
        try:
            yield commands.get(timeout=CHECK_AFTER_IDLE_S)
        except queue.Empty:
            engine.check()
            yield commands.get()
    for _ in range(commands.qsize()):
        yield commands.get_nowait()


def _add(engine: Engine, command: Add) -> Iterator[Output]:
    """Take requests in; one that cannot be run is answered, and the others do not notice."""
    for request in command.requests:
        try:
            engine.add(request)
        except BadInput as exc:
            yield Output.failed(request.id, exc.code, exc.message)


def _abort(engine: Engine, command: Abort) -> Iterator[Output]:
    for request_id in command.ids:
        if engine.abort(request_id):
            yield Output(id=request_id, token_ids=[], finish="abort")


def _read(sock: socket.socket, commands: Commands) -> NoReturn:
    """Commands into the queue until the consumer is gone, dead or alive; then nobody wants this process."""
    try:
        for message in pipe.read(sock):
            assert isinstance(message, Add | Abort | Stop), f"not a command: {type(message).__name__}"
            commands.put(message)
    except (OSError, pipe.BrokenFrame, AssertionError):
        log.exception("engine.pipe_broken")
    os._exit(CONSUMER_GONE)


def _send(sock: socket.socket, message: Report) -> None:
    """Blocks while the consumer does not read: a slow consumer slows the engine instead of filling memory."""
    try:
        with _SENDING:
            sock.sendall(pipe.encode(message))
    except OSError:
        os._exit(CONSUMER_GONE)


def _explain(exc: Exception) -> tuple[Failed, int]:
    """The last message, and the exit status."""
    if isinstance(exc, GristmillError):
        return Failed(exc.code, exc.message), exc.exit_code
    memory = isinstance(exc, OutOfStep) or is_out_of_memory(exc)
    code = OUT_OF_MEMORY if memory else "engine_failed"
    return Failed(code, f"{type(exc).__name__}: {exc}"), 1
