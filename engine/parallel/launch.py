"""The consumer's side of the other ranks: they are started beside the engine process, and end with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress

from ..settings import EngineSettings
from .link import LEAD_GONE

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
"""Ranks are on one machine. By itself gloo asks for the host's name, which containers cannot always tell."""
END_S = 5.0


class Followers:
    """Processes of ranks 1 and up; none with ``tensor_parallel_size`` 1.

    ``arguments`` and ``descriptors`` are what the process of rank 0 must be started with.
    """

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pairs = [socket.socketpair() for _ in range(settings.tensor_parallel_size - 1)]
        # Where ranks meet: a file without a name, so that none is left behind however they end.
        self._place = tempfile.TemporaryFile(prefix="gristmill-ranks-") if self._pairs else None  # noqa: SIM115

    @property
    def arguments(self) -> list[str]:
        """The place, and rank 0's ends of the links."""
        if self._place is None:
            return []
        return [_path(self._place.fileno()), *(str(ours.fileno()) for ours, _ in self._pairs)]

    @property
    def descriptors(self) -> list[int]:
        if self._place is None:
            return []
        return [self._place.fileno(), *(ours.fileno() for ours, _ in self._pairs)]

    @property
    def environment(self) -> dict[str, str]:
        """For all ranks."""
        return LOOPBACK if self._pairs else {}

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def start(self, environment: dict[str, str]) -> None:
        """After rank 0's process, which has its ends of the links then: what is left here is closed."""
        if self._place is None:
            return
        for rank, (ours, theirs) in enumerate(self._pairs, 1):
            argv = [str(rank), str(theirs.fileno()), _path(self._place.fileno())]
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", str(__package__), *argv],
                stdin=subprocess.PIPE,
                stdout=2,
                pass_fds=[theirs.fileno(), self._place.fileno()],
                start_new_session=True,
                env=environment,
            )
            self._processes.append(process)
            ours.close()
            theirs.close()
            assert process.stdin
            with suppress(BrokenPipeError):  # it is gone already, as rank 0 will notice
                process.stdin.write(self._settings.model_dump_json().encode())
                process.stdin.close()
        self._place.close()

    def end(self) -> str | None:
        """See to it that all have ended, as they do once rank 0 has.

        What happened to the first that did not end because of that, if there was one.
        """
        first: str | None = None
        for rank, process in enumerate(self._processes, 1):
            try:
                status = process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                continue
            if first is None and status != LEAD_GONE:
                first = f"rank {rank} (pid {process.pid}), which {told_of(status)}"
        return first

    def kill(self) -> None:
        """At once: nothing of theirs is worth keeping."""
        for process in self._processes:
            process.kill()
            process.wait()


def told_of(status: int) -> str:
    """What became of a process with this exit status."""
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
    if status == -signal.SIGKILL:
        how += "; the kernel does that when memory runs out: lower max_batch_total_tokens, or add memory"
    return how


def _path(descriptor: int) -> str:
    """The same path in every process that has the descriptor."""
    return os.fspath(f"/dev/fd/{descriptor}")
