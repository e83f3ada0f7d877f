"""`gristmill` in this process, for speed; ``tests/e2e`` starts it as a user does."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from gristmill.backends.state import State, WorkerInfo
from gristmill.producer.cli import cli
from gristmill.producer.console import run_guarded

from .valkey import Valkey

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    valkey: Valkey,
    state: State,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    """(exit code, stdout, stderr) of a command line, on a broker where a silent somebody serves "tiny"."""
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GRISTMILL_BROKER_URL", valkey.url)
    monkeypatch.setenv("GRISTMILL_CONNECT_TIMEOUT_S", "1")
    monkeypatch.setenv("GRISTMILL_BULK_POLL_S", "0.01")
    monkeypatch.delenv("GRISTMILL_MODEL", raising=False)
    state.register("w1", WorkerInfo(models=("tiny",), host="here", pid=1, version="0"), 600)

    def run_it(*args: object, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(stdin)))
        capfd.readouterr()
        code = run_guarded(cli, [str(arg) for arg in args])
        return code, *capfd.readouterr()

    return run_it
