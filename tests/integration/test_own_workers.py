"""Worker processes of `gristmill up` and `run`: restarted when they die, given up with their last words."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gristmill.producer.stack import Worker, Workers
from gristmill.schemas.errors import EngineUnavailable, Misconfigured

from ..support.waiting import wait_until


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gristmill.producer.stack.BACKOFF_FIRST_S", 0.01)


def workers(code: str, log: Path, *, max_failures: int | None = 3, stop_s: float = 10.0) -> Workers:
    command = [sys.executable, "-P", "-c", code]
    return Workers([Worker(command, dict(os.environ), log)], max_failures, stop_s)


def watch(some: Workers, news: list[str]) -> bool:
    news += some.check()
    return False


def test_a_worker_that_keeps_dying_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    some = workers("print('out of luck'); raise SystemExit(70)", tmp_path / "log")
    some.start()
    news: list[str] = []
    with pytest.raises(EngineUnavailable, match="out of luck") as caught:
        wait_until(lambda: watch(some, news), 20, "it is given up")
    assert "4 times in a row" in caught.value.message
    assert "code 70" in caught.value.message
    assert some.restarts == 3
    assert len([sentence for sentence in news if "started again" in sentence]) == 3


def test_progress_forgives_earlier_deaths(tmp_path: Path) -> None:
    some = workers("raise SystemExit(70)", tmp_path / "log", max_failures=1)
    some.start()

    def five_restarts() -> bool:
        some.check()
        some.progressed()
        return some.restarts >= 5

    wait_until(five_restarts, 20, "five restarts")


def test_a_worker_that_says_its_settings_are_wrong_is_not_started_again(tmp_path: Path) -> None:
    some = workers("print('error: no such model [model_not_found]'); raise SystemExit(2)", tmp_path / "log")
    some.start()
    with pytest.raises(Misconfigured, match="no such model"):
        wait_until(lambda: watch(some, []), 20, "it is given up")
    assert some.restarts == 0


def test_stop_asks_first_and_kills_later(tmp_path: Path) -> None:
    polite = workers("import signal; print('up', flush=True); signal.pause()", tmp_path / "polite")
    deaf = workers(
        "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True)\n"
        "while True: signal.pause()",
        tmp_path / "deaf",
        stop_s=0.2,
    )
    for some in (polite, deaf):
        some.start()
        wait_until(lambda some=some: "up" in some.workers[0].last_lines(), 20, "it is up")
        some.stop()
    assert polite.workers[0].exit_code == -signal.SIGTERM
    assert deaf.workers[0].exit_code == -signal.SIGKILL


def test_a_worker_is_told_to_stop_when_we_die_without_a_word(tmp_path: Path) -> None:
    """`kill -9` of `gristmill run` must not leave a worker behind that holds the machine's memory."""
    parent = (
        "import os, sys, signal; from pathlib import Path; from gristmill.producer.stack import Worker\n"
        "command = [sys.executable, '-c', 'import signal; signal.pause()']\n"
        f"worker = Worker(command, dict(os.environ), Path({str(tmp_path / 'log')!r}))\n"
        "worker.start(); print(worker.process.pid, flush=True); signal.pause()"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", parent], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.communicate()
    wait_until(lambda: not alive(pid), 20, "the worker is gone")


def alive(pid: int) -> bool:
    """Whether the process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
