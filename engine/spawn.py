"""Processes of an engine: started, or begun before anybody knows what the engine is to do.

What is begun early imports torch while the consumer still imports what it needs itself, and waits for its
settings. Light: whoever calls ``begin_early`` first has not paid for anything else yet.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

log = logging.getLogger(__name__)

REPORT_BUFFER_BYTES = 8192
"""Reports that may lie unread; the kernel takes twice this, its own overhead included. That is some ten steps
of a small batch and one of a large: an engine whose consumer stands still would otherwise make hundreds of
tokens that nobody writes down, and the next attempt makes them again.
"""
SPIN_BRIEFLY = {"GOMP_SPINCOUNT": "1000"}
"""OpenMP threads wait for one another by spinning, by default for milliseconds: on cores shared with the
consumer, or with anybody, a step became 20 times slower. A thousand turns, about 50 us, cover the pause
between two kernels, so that a quiet machine loses nothing."""
WHOLE, QUICK = str(__package__), f"{__package__}.quick_start"
"""Modules: with all of torch; with the part that an engine on a CPU needs."""


@dataclass(frozen=True, slots=True)
class Spawned:
    """A process that reads its settings from its stdin, and our end of its socket."""

    process: subprocess.Popen[bytes]
    sock: socket.socket
    environment: dict[str, str]

    def end(self) -> None:
        """It has no settings and will not get any."""
        self.sock.close()
        assert self.process.stdin
        with suppress(OSError):
            self.process.stdin.close()
        self.process.kill()
        self.process.wait()


def spawn(
    module: str,
    arguments: Sequence[str] = (),
    descriptors: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> Spawned:
    """Start ``python -m module FD arguments…``, which inherits ``descriptors``."""
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, REPORT_BUFFER_BYTES)
    whole = {**SPIN_BRIEFLY, **(environment or {}), **os.environ}
    # -P: a file named like a module in the current directory must not take its place.
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(theirs.fileno()), *arguments],
            stdin=subprocess.PIPE,
            stdout=2,  # our stdout carries data
            pass_fds=[theirs.fileno(), *descriptors],
            start_new_session=True,
            env=whole,
        )
    return Spawned(process, ours, whole)


_early: list[Spawned] = []


def begin_early() -> int:
    """Begin an engine on this machine's CPU; the next EngineProcess that wants one takes it. Returns its pid.

    It ends with this process, and nothing is lost but its time where nobody takes it.
    """
    if not _early:
        _early.append(spawn(QUICK))
    return _early[0].process.pid


def take_early(module: str) -> Spawned | None:
    """What was begun, if it is of this kind, lives, and would be started alike now; else it ends."""
    if not _early:
        return None
    found = _early.pop()
    now = {**SPIN_BRIEFLY, **os.environ}
    changed = sorted(name for name, _ in found.environment.items() ^ now.items())
    if module == QUICK and not changed and found.process.poll() is None:
        return found
    log.info("engine.begun_in_vain", extra={"module": module, "environment": changed})
    found.end()
    return None


def drop_early() -> None:
    """Nobody will want what was begun, if anything was."""
    while _early:
        _early.pop().end()
