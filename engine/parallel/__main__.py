"""Another rank than 0: ``python -m gristmill.engine.parallel RANK LINK PLACE``, started by ``Followers``.

Two threads, as the engine process has: one takes what rank 0 tells off the link, and ends the process at once
when rank 0 is gone, whatever exchange the other is waiting in.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import NoReturn

import torch

from ...schemas.errors import GristmillError
from .. import pipe
from ..log_line import LogLine
from ..memory import OUT_OF_MEMORY, OutOfStep, is_out_of_memory
from ..messages import Failed
from ..runner import Runner
from ..settings import EngineSettings
from .follower import Follower
from .link import BLAME_S, LEAD_GONE
from .messages import Told
from .ranks import Group, meet

log = logging.getLogger(__name__)

MAX_QUEUED = 4096
"""Beyond this the reader pauses and, a socket buffer later, so does rank 0."""

Inbox = queue.Queue[Told]


def main() -> None:
    """Load this rank's part, then follow until rank 0 is gone."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the consumer ends us, after it has drained
    rank, place = int(sys.argv[1]), sys.argv[3]
    handler = logging.StreamHandler()
    handler.setFormatter(LogLine())
    logging.basicConfig(handlers=[handler])
    link = socket.socket(fileno=int(sys.argv[2]))
    settings = EngineSettings.model_validate_json(sys.stdin.buffer.read())
    inbox: Inbox = queue.Queue(MAX_QUEUED)
    threading.Thread(target=_read, args=(link, inbox), name="reader", daemon=True).start()
    try:
        Follower(_runner(settings, rank, place), settings).serve(_taken(inbox))
    except Exception as exc:  # noqa: BLE001  (the process's edge: rank 0 is told, and tells the consumer)
        _end(link, rank, exc)


def _runner(settings: EngineSettings, rank: int, place: str) -> Runner:
    size = settings.tensor_parallel_size
    ends = meet(rank, size, place, cuda=settings.device != "cpu" and torch.cuda.is_available())
    return Runner(settings, ranks=Group(rank, size, ends, _nobody))


def _taken(inbox: Inbox) -> Iterator[Told]:
    while True:
        yield inbox.get()


def _nobody(message: Told) -> None:
    raise AssertionError(f"only rank 0 leads: {type(message).__name__}")


def _read(link: socket.socket, inbox: Inbox) -> NoReturn:
    """What rank 0 tells, into the inbox, until it is gone."""
    try:
        for message in pipe.read(link):
            assert isinstance(message, Told), f"not for a follower: {type(message).__name__}"
            inbox.put(message)
    except (OSError, pipe.BrokenFrame, AssertionError):
        log.exception("rank.link_broken")
    os._exit(LEAD_GONE)


def _end(link: socket.socket, rank: int, exc: Exception) -> NoReturn:
    """Say why. An exchange that broke is another rank's doing: then rank 0 is about to end us all."""
    if isinstance(exc, GristmillError):
        failed = Failed(exc.code, exc.message)
    else:
        memory = isinstance(exc, OutOfStep) or is_out_of_memory(exc)
        if not memory:
            time.sleep(BLAME_S)
        log.error("rank.failed", extra={"rank": rank}, exc_info=exc)
        failed = Failed(
            OUT_OF_MEMORY if memory else "engine_failed", f"rank {rank}: {type(exc).__name__}: {exc}"
        )
    try:
        link.sendall(pipe.encode(failed))
    finally:
        os._exit(1)


if __name__ == "__main__":
    main()
