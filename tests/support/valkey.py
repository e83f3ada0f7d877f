"""A real Valkey on a unix socket for one test: up in 0.1 s: can be killed, frozen, restarted."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from gristmill.backends.embedded import find_server
from gristmill.backends.supervisor import die_with_parent
from gristmill.schemas.errors import Misconfigured

from .waiting import wait_until


class Valkey:
    """One server process. It dies with the test process."""

    def __init__(self, directory: Path, **config: str) -> None:
        self.directory = directory
        self.socket = directory / "v.sock"
        self.config = {"appendonly": "yes", "appendfsync": "everysec", "save": "", "port": "0"} | config
        self.process: subprocess.Popen[bytes] | None = None
        self.loads_slowly = False
        self._clients: list[redis.Redis] = []

    @property
    def url(self) -> str:
        """For redis-py, and for ``make_app``."""
        return f"unix://{self.socket}?db=0"

    def start(self) -> Valkey:
        settings = self.config | {
            "dir": str(self.directory),
            "unixsocket": str(self.socket),
            "logfile": str(self.directory / "valkey.log"),
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        self.process = subprocess.Popen([find_server(), *arguments], preexec_fn=die_with_parent())
        wait_until(self._answers, 20, f"Valkey in {self.directory} answers", poll_s=0.003)
        return self

    def kill(self) -> None:
        """SIGKILL; the append-only file stays."""
        self._signal(signal.SIGKILL)
        assert self.process is not None
        self.process.wait()

    def restart(self) -> None:
        """Kill it if it lives, and start it on the same data and socket."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self.start()

    @contextmanager
    def loading(self) -> Generator[None]:
        """Killed and started again, with so much to load that until the block ends it answers LOADING."""
        client = self.client()
        client.config_set("rdbcompression", "no")
        with client.pipeline() as pads:
            for n in range(1000):  # between two of 1 KiB it looks at its connections
                pads.set(f"pad:{n}", "x" * 1024, ex=3600)
            pads.execute()
        client.bgrewriteaof()
        busy = ("aof_rewrite_in_progress", "aof_rewrite_scheduled")
        wait_until(lambda: not any(client.info("persistence")[name] for name in busy), 20, "it is rewritten")
        self.config |= {"key-load-delay": "50000", "loading-process-events-interval-bytes": "1024"}
        self.loads_slowly = True
        self.restart()
        try:
            yield
        finally:
            self.loads_slowly = False
            self.config["key-load-delay"] = "0"
            self.client().config_set("key-load-delay", 0)
            wait_until(self._answers, 20, "everything is loaded")

    def freeze(self) -> None:
        """SIGSTOP: connected, but silent."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def drop_clients(self) -> None:
        """Cut every connection but the one that says so."""
        for kind in ("normal", "pubsub"):
            self.client().execute_command("CLIENT", "KILL", "TYPE", kind)

    def listen(self) -> int:
        """Open a TCP port for replicas, which know no unix sockets."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port: int = probe.getsockname()[1]
        self.config |= {"port": str(port)}  # after a restart, too
        self.client().config_set("port", port)
        return port

    def replicate(self, primary: Valkey) -> None:
        """Become its replica. Returns once in step with it."""
        self.client().replicaof("127.0.0.1", str(primary.listen()))
        wait_until(lambda: self.client().info("replication")["master_link_status"] == "up", 20, "in step")

    def promote(self) -> None:
        """Be a primary from now on."""
        self.client().replicaof("NO", "ONE")

    def client(self, **options: Any) -> redis.Redis:
        """A plain client; closed with the server."""
        client = redis.Redis.from_url(self.url, **{"socket_timeout": 10, **options})
        self._clients.append(client)
        return client

    def check_keys(self) -> None:
        """Raises AssertionError for a key of a job that stays for ever. A server that is away has none."""
        assert self.process is not None
        if self.process.poll() is not None:
            return
        try:
            with redis.Redis(unix_socket_path=str(self.socket), socket_timeout=1, retry=None) as probe:
                forever = [key for key in probe.scan_iter("gm:{*", count=1000) if probe.pttl(key) == -1]
        except redis.RedisError:
            return
        assert not forever, f"keys of jobs without an expiry: {forever}"

    def close(self) -> None:
        for client in self._clients:
            client.close()
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def _signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (
            f"Valkey exited: {(self.directory / 'valkey.log').read_text()[-2000:]}"
        )
        try:
            with redis.Redis(unix_socket_path=str(self.socket), socket_timeout=1, retry=None) as probe:
                return bool(probe.ping())
        except redis.BusyLoadingError:
            return self.loads_slowly
        except redis.RedisError:
            return False


def _require_server() -> None:
    try:
        find_server()
    except Misconfigured as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))


@contextmanager
def fresh_server() -> Generator[Valkey]:
    _require_server()
    # not tmp_path: a unix socket's path is at most 107 bytes long
    directory = Path(tempfile.mkdtemp(prefix="gm-valkey-"))
    server = Valkey(directory)
    try:
        yield server.start()
        server.check_keys()
    finally:
        server.close()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def valkey() -> Iterator[Valkey]:
    """A fresh, empty server, gone after the test."""
    with fresh_server() as server:
        yield server


@pytest.fixture
def valkey_replica(valkey: Valkey) -> Iterator[Valkey]:
    """A real replica of it."""
    with fresh_server() as server:
        valkey.client().config_set("repl-diskless-sync-delay", 0)
        server.replicate(valkey)
        yield server
