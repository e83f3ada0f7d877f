"""The parent of an embedded Valkey: starts it, restarts it, and stops it when its last user has left.

Run by ``embedded.py`` as ``python -m gristmill.backends.supervisor DIR FD``; it detaches itself, and writes
one word to FD: ``ready``, ``busy`` (another supervisor has the directory) or ``failed WHY``.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from .embedded import Endpoint, find_server, read_endpoint, socket_path, try_lock, write_endpoint

POLL_S = 0.1
START_S = 60.0
"""A large append-only file takes a while to load."""
STOP_S = 10.0
MAX_RESTARTS = 5
RESTART_WINDOW_S = 60.0
MAX_LOG_BYTES = 4 * 1024 * 1024
PR_SET_PDEATHSIG = 1

# appendfsync always: a job counts as accepted once the broker has answered, so the answer must survive a
# power cut. Measured on a 2-core VM: a put takes 0.25 ms instead of 0.09, and 16 clients still make
# 4,000 a second because one fsync serves all of them; the engine finishes far fewer jobs than that.
CONFIG = """\
dir {directory}
logfile {directory_log}
unixsocket {socket}
unixsocketperm 700
bind 127.0.0.1
port {port}
requirepass {password}
appendonly yes
appendfsync always
save ""
maxmemory-policy noeviction
daemonize no
"""


class Server:
    """A Valkey process of ours. It inherits ``lock_fd``: the data stay locked as long as it lives."""

    def __init__(self, directory: Path, lock_fd: int) -> None:
        self.directory = directory
        self.socket = socket_path(directory)
        # Only a crash leaves one behind: its users want to find the server again.
        previous = read_endpoint(directory)
        self.password = previous.password if previous else secrets.token_hex(24)
        self.port = previous.port if previous else 0
        self._lock_fd = lock_fd
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Endpoint:
        """Launch and wait until it answers. Raises OSError or TimeoutError."""
        log = self.directory / "valkey.log"
        if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
            log.replace(log.with_suffix(".log.1"))
        self.port = _usable_port(self.port)
        config = CONFIG.format(
            directory=_quoted(self.directory),
            directory_log=_quoted(log),
            socket=_quoted(self.socket),
            port=self.port,
            password=self.password,
        )
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [find_server(), "-"],  # settings through stdin: the password stays out of `ps`
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(self._lock_fd,),
                preexec_fn=die_with_parent(),  # safe: this process has one thread
            )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(config.encode())
        endpoint = Endpoint(str(self.socket), self.port, self.password, os.getpid(), self._process.pid)
        deadline = time.monotonic() + START_S
        while not endpoint.answers():
            if not self.alive:
                raise ChildProcessError(f"it exited with status {self._process.returncode}")
            if time.monotonic() >= deadline:
                self.stop()
                raise TimeoutError(f"no answer within {START_S:g} s")
            time.sleep(0.005)
        return endpoint

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def wait(self, timeout_s: float) -> None:
        """Return when it dies, at the latest after ``timeout_s``."""
        assert self._process is not None
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return

    def stop(self) -> None:
        """SIGTERM lets Valkey flush and close its file; what does not react in time is killed."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def supervise(directory: Path, ready_fd: int) -> int:
    """Own ``directory`` until its last user has left, or SIGTERM. Returns the exit status."""
    stopping: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopping.append(number))
    for ignored in (signal.SIGINT, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    os.umask(0o077)

    lock_fd = os.open(directory / "server", os.O_RDWR | os.O_CREAT, 0o600)
    if not try_lock(lock_fd, fcntl.LOCK_EX):
        os.write(ready_fd, b"busy")
        return 0
    users_fd = os.open(directory / "users", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        server = Server(directory, lock_fd)
        write_endpoint(directory, server.start())
    except Exception as exc:  # noqa: BLE001 -- the edge of this process: the user who waits must hear of it
        os.write(ready_fd, f"failed {exc}".encode()[:4000])
        return 1
    os.write(ready_fd, b"ready")
    os.close(ready_fd)

    restarts: deque[float] = deque(maxlen=MAX_RESTARTS)
    while not stopping and not try_lock(users_fd, fcntl.LOCK_EX):
        server.wait(POLL_S)
        if server.alive:
            continue
        if len(restarts) == MAX_RESTARTS and time.monotonic() - restarts[0] < RESTART_WINDOW_S:
            print(f"Valkey died {MAX_RESTARTS} times in {RESTART_WINDOW_S:g} s: giving up", file=sys.stderr)  # noqa: T201
            return 1
        restarts.append(time.monotonic())
        write_endpoint(directory, server.start())
    server.stop()
    for leftover in (directory / "endpoint.json", server.socket):
        leftover.unlink(missing_ok=True)
    return 0


def die_with_parent(number: int = signal.SIGKILL) -> Callable[[], None]:
    """A ``preexec_fn``: the kernel sends ``number`` to the child when its parent dies, even by kill -9.

    SIGKILL loses nothing: Valkey answers only after the append-only file has the command.
    """
    libc = ctypes.CDLL(None)
    parent = os.getpid()

    def arm() -> None:
        libc.prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:  # it died before the kernel knew
            os._exit(1)

    return arm


def _usable_port(preferred: int) -> int:
    """The port of last time if it is free, so that clients find the server again; else any free one."""
    for port in (preferred, 0):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(sock.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")


def _quoted(path: Path) -> str:
    """As Valkey's configuration reads strings."""
    return '"' + str(path).replace("\\", "\\\\").replace('"', '\\"') + '"'


def main() -> None:
    """Detach: whoever started us waits for this process only, and the supervisor is nobody's child."""
    if os.fork():
        os._exit(0)
    sys.exit(supervise(Path(sys.argv[1]), int(sys.argv[2])))


if __name__ == "__main__":
    main()
