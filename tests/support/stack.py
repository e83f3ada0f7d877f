"""A whole Gristmill for one test: a real Valkey, a result directory, and real worker processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from gristmill.backends.state import State, open_state
from gristmill.backends.store import ResultStore, open_store
from gristmill.engine.models.tiny import write_tiny
from gristmill.producer import Client
from gristmill.schemas import keys
from gristmill.schemas.result import Result
from gristmill.schemas.settings import Settings

from .valkey import Valkey
from .waiting import wait_until

LEASE = {"GRISTMILL_VISIBILITY_TIMEOUT_S": "3", "GRISTMILL_LEASE_RENEW_EVERY_S": "1"}


class Worker:
    """One `gristmill-worker run` in its own process group; its log is a file."""

    def __init__(self, number: int, argv: list[str], env: dict[str, str], log: Path) -> None:
        self.number, self.log = number, log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                argv, env=env, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def wait_ready(self, timeout_s: float = 90) -> Worker:
        wait_until(
            lambda: self.said("worker.ready") or self.dead, timeout_s, f"worker {self.number} is ready"
        )
        assert not self.dead, f"worker {self.number} ended: {self.log.read_text()[-3000:]}"
        return self

    @property
    def dead(self) -> bool:
        return self.process.poll() is not None

    def said(self, event: str, count: int = 1) -> bool:
        return self.log.read_text().count(event) >= count

    def metric(self, name: str, label: str = "") -> float:
        """The first sample of its page that has ``label``; 0 if there is none."""
        found = re.search(r"health=127\.0\.0\.1:(\d+)", self.log.read_text())
        assert found
        with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/metrics", timeout=10) as page:
            value = re.search(
                rf"^gristmill_{name}\{{[^}}]*{label}[^}}]*\}} (\S+)", page.read().decode(), re.MULTILINE
            )
        return float(value[1]) if value else 0.0

    def kill(self) -> None:
        """SIGKILL to the worker alone: its engine must notice by itself."""
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def terminate(self, timeout_s: float = 60) -> int:
        self.process.terminate()
        return self.process.wait(timeout_s)

    def close(self) -> None:
        if not self.dead:
            self.thaw()
            self.process.terminate()
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.kill()


class Stack:
    """Starts what a test asks for, and stops all of it at the end."""

    def __init__(
        self, valkey: Valkey, directory: Path, model: Path, settings: Settings | None = None
    ) -> None:
        self.valkey, self.directory, self.model = valkey, directory, model
        (directory / "results").mkdir(exist_ok=True)
        self.settings = settings or Settings(
            broker_url=valkey.url,
            results_url=f"file://{directory}/results",
            model="m",
            visibility_timeout_s=3,
            lease_renew_every_s=1,
        )
        self.state: State = open_state(self.settings)
        self.store: ResultStore = open_store(self.settings.results, self.settings)
        self.workers: list[Worker] = []
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = Client(self.settings)
        return self._client

    def worker(
        self, *flags: str, dtype: str = "float32", wait: bool = True, env: Mapping[str, str] | None = None
    ) -> Worker:
        """Start a worker that serves the model as ``m``, and wait until it takes jobs.

        ``env`` is put on top of its environment: settings, or faults (see ``faults.py``).
        """
        number = len(self.workers) + 1
        argv = [sys.executable, "-m", "gristmill.worker", "run", "--model", str(self.model)]
        argv += ["--served-model-name", str(self.settings.model), "--broker", self.settings.broker_url]
        argv += ["--results", self.settings.results_url, "--dtype", dtype, "--health-port", "0", *flags]
        environment = os.environ | LEASE | {"GRISTMILL_STATE_URL": self.settings.state_url} | dict(env or {})
        worker = Worker(number, argv, environment, self.directory / f"worker-{number}.log")
        self.workers.append(worker)
        return worker.wait_ready() if wait else worker

    def result(self, job_id: str) -> Result | None:
        body = self.store.get(keys.result_object(job_id))
        return None if body is None else Result.from_json(body)

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        if self._client is not None:
            self._client.close()
        self.state.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory, kernels: Path) -> Path:
    """A model of two small layers with random weights, which starts sooner than the real one."""
    return write_tiny(tmp_path_factory.mktemp("tiny"), tokenizer=True, vocab_size=5000)


@pytest.fixture
def tiny_stack(valkey: Valkey, tmp_path: Path, tiny: Path) -> Iterator[Stack]:
    """As ``stack``, with the tiny model."""
    stack = Stack(valkey, tmp_path, tiny)
    try:
        yield stack
    finally:
        stack.close()


@pytest.fixture
def stack(valkey: Valkey, tmp_path: Path, smollm2: Path) -> Iterator[Stack]:
    """Empty: start workers with ``stack.worker()``, submit with ``stack.client``."""
    stack = Stack(valkey, tmp_path, smollm2)
    try:
        yield stack
    finally:
        stack.close()
