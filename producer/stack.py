"""Worker processes of one's own: started, watched, restarted with back-off, and ended in order.

Used by `gristmill up` and `gristmill run`. A worker is another program (`python -m gristmill.worker`), and
nothing of it is imported here.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..backends.supervisor import die_with_parent
from ..schemas.errors import EngineUnavailable, Misconfigured
from ..schemas.settings import Settings
from ..schemas.status import WorkerInfo
from .settings import child_environment

NEEDED = ("torch", "tokenizers", "safetensors", "msgspec", "jinja2")
"""What the worker extra brings; the client alone has none of it."""
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.5, 30.0
HEALTHY_S = 60.0
"""A worker that lived so long starts with a clean slate when it dies."""
BAD_INPUT = 2
LAST_LINES = 8
KEPT_LOGS = 20


@dataclass(slots=True)
class Worker:
    """One worker process and the file its words go to (None: our own stderr)."""

    command: Sequence[str]
    env: dict[str, str]
    log: Path | None
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    failures: int = 0
    restart_at: float = 0.0

    def start(self) -> None:
        """Run it in a session of its own, so that Ctrl-C reaches it through us only.

        Should we die without a word, the kernel asks it to stop. Call from the main thread: the end of the
        calling thread is what the kernel takes for our death.
        """
        output = None if self.log is None else self.log.open("ab")
        try:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output if output is not None else sys.stderr,
                stderr=output if output is not None else sys.stderr,
                start_new_session=True,
                preexec_fn=die_with_parent(signal.SIGTERM),  # it makes two system calls, nothing else
            )
        finally:
            if output is not None:
                output.close()
        self.started_at = time.monotonic()

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self.process is None else self.process.poll()

    def last_lines(self) -> str:
        """The end of its log, for an error message; empty when it went to our stderr."""
        if self.log is None:
            return ""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 16_384))
                lines = file.read().decode(errors="replace").splitlines()[-LAST_LINES:]
        except OSError:
            return ""
        return "".join(f"\n  {line}" for line in lines)


@dataclass(slots=True)
class Workers:
    """Several workers. More than ``max_failures`` deaths without ``progressed`` are an error; None: never."""

    workers: list[Worker]
    max_failures: int | None
    stop_s: float
    restarts: int = field(default=0, init=False)

    def start(self) -> None:
        """Start all of them."""
        for worker in self.workers:
            worker.start()

    @property
    def pids(self) -> set[int]:
        """Of those that were started."""
        return {worker.process.pid for worker in self.workers if worker.process is not None}

    def progressed(self) -> None:
        """Work was finished: what died before is forgiven."""
        for worker in self.workers:
            worker.failures = 0

    def check(self) -> list[str]:
        """Restart what died and is due. Returns a sentence for each death and each restart.

        Raises Misconfigured if a worker says its settings or its model are wrong, EngineUnavailable after
        ``max_failures`` deaths in a row.
        """
        news: list[str] = []
        now = time.monotonic()
        for worker in self.workers:
            code = worker.exit_code
            if code is None:
                continue
            if worker.restart_at == 0.0:
                news.append(self._note_death(worker, code, now))
            elif now >= worker.restart_at:
                worker.restart_at = 0.0
                self.restarts += 1
                worker.start()
                assert worker.process is not None
                news.append(f"worker started again (pid {worker.process.pid})")
        return news

    def _note_death(self, worker: Worker, code: int, now: float) -> str:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        if code == BAD_INPUT:
            raise Misconfigured(f"the worker cannot start:{worker.last_lines() or ' see its message above'}")
        worker.failures = 1 if now - worker.started_at > HEALTHY_S else worker.failures + 1
        if self.max_failures is not None and worker.failures > self.max_failures:
            where = f"; its log is {worker.log}, which ends:{worker.last_lines()}" if worker.log else ""
            raise EngineUnavailable(f"the worker died {worker.failures} times in a row ({how} last){where}")
        pause_s = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2 ** (worker.failures - 1))
        worker.restart_at = now + pause_s
        return f"worker {how}; starting it again in {pause_s:g} s"

    def stop(self) -> None:
        """SIGTERM to all, then wait: they hand their jobs back. SIGKILL after ``stop_s``."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + self.stop_s
        for worker in self.workers:
            if worker.process is None:
                continue
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()

    def kill(self) -> None:
        """SIGKILL to all: their leases run out, and others continue from the journal."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        for worker in self.workers:
            if worker.process is not None and worker.process.poll() is None:
                worker.process.send_signal(number)


def lives(info: WorkerInfo) -> bool:
    """Whether an announced worker still runs: one that was killed stays announced for a few seconds.

    One on another machine is believed.
    """
    if info.host != socket.gethostname():
        return True
    try:
        os.kill(info.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def require_worker() -> None:
    """Raises Misconfigured where only the client is installed."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Misconfigured(
            f"running a model here needs {', '.join(missing)}; run: pip install 'gristmill[worker]'"
        )


def make_workers(
    settings: Settings,
    model: str,
    knobs: Sequence[str],
    *,
    count: int,
    logs: Path | None,
    max_failures: int | None,
    stop_s: float,
) -> Workers:
    """``count`` workers for ``model`` on our broker. ``knobs``: more flags of `gristmill-worker run`.

    Connections travel in the environment, where passwords belong. ``logs``: a directory for their log files.
    """
    require_worker()
    env = child_environment(settings)
    command = [sys.executable, "-P", "-m", "gristmill.worker", "run", "--model", model, *knobs]
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)
        for old in sorted(logs.glob("worker-*.log"), key=lambda log: log.stat().st_mtime)[:-KEPT_LOGS]:
            old.unlink(missing_ok=True)
    return Workers(
        [
            Worker(
                [*command, *([] if "--health-port" in knobs else ["--health-port", "0"])],
                env,
                None if logs is None else logs / f"worker-{os.getpid()}-{number}.log",
            )
            for number in range(1, count + 1)
        ],
        max_failures,
        stop_s,
    )
