"""A batch while its workers are killed, frozen and handed the same message twice: its output is
the clean run's.

One stack for all: two workers live, in deterministic mode, and a third starts for each that dies. A row's
text depends on its request alone, so that the sorted lines of a disturbed run are those of a clean one.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from gristmill.backends import broker
from gristmill.backends.state import State
from gristmill.engine.models.tiny import write_tiny
from gristmill.schemas.batch import Batch, BatchStatus, segment_id
from gristmill.schemas.job import Priority
from gristmill.schemas.queues import queue_name
from gristmill.schemas.sampling import SamplingParams

from ..support.batches import message, open_batch, row
from ..support.faultpoints.sitecustomize import BATCH_POINTS
from ..support.faults import KillPoints
from ..support.stack import Stack, Worker
from ..support.valkey import Valkey
from ..support.waiting import wait_until

pytestmark = pytest.mark.slow

ROWS, TOKENS = 60, 48
SHORT, LONG = SamplingParams(max_tokens=4, seed=1, ignore_eos=True), SamplingParams(max_tokens=TOKENS, seed=2)
POINTS = [
    ("after:Batches.validated", 1),
    ("after:Batches.begin_rows", 3),
    ("before:State.publish", 3),
    ("after:FileStore.put_new", 2),
    ("after:Batches.accept", 2),
    ("after:Batches.end_segment", 1),
]


class Range:
    """Workers that die at points, and what batches say undisturbed."""

    def __init__(self, stack: Stack, directory: Path) -> None:
        self.stack = stack
        (directory / "points").mkdir()
        self.points = KillPoints(directory / "points")
        self._env = self.points.env | {"OMP_NUM_THREADS": "1", "GRISTMILL_BULK_WRITE_EVERY_S": "0.2"}
        self._app = broker.make_app(stack.settings)
        self._count = 0
        self._clean = ""
        self.refill()

    @property
    def state(self) -> State:
        return self.stack.state

    def refill(self) -> None:
        """Two workers live."""
        flags = ("--num-threads", "1", "--max-num-seqs", "8", "--max-total-tokens", "256", "--deterministic")
        while len(self.living()) < 2:
            self.stack.worker(*flags, wait=False, env=self._env)
        for worker in self.living():
            worker.wait_ready()

    def living(self) -> list[Worker]:
        return [worker for worker in self.stack.workers if not worker.dead]

    def open(self) -> str:
        """A batch of two segments with its messages sent: short rows, long ones, one that must fail."""
        self._count += 1
        name = f"batch_{self._count}"
        rows = [
            row(n, name, prompt=f"row {n}", sampling=LONG if n % 3 else SHORT) for n in range(1, ROWS + 1)
        ]
        rows[7] = row(8, name, prompt="x" * 10, sampling=SamplingParams(max_tokens=4, stop=("a",) * 17))
        options = {"on_invalid": "skip"}
        open_batch(self.state, self.stack.store, rows[:40], rows[40:], batch=name, options=options)
        for number in (1, 2):
            self.send(segment_id(name, number))
        self.state.batches.sent(name, self.state.batches.unsent(name))
        return name

    def send(self, segment: str) -> None:
        queue = queue_name("m", Priority.BATCH)
        broker.publish(self._app, queue, message(segment), segment, priority=Priority.BATCH)

    def completed(self, name: str) -> Batch:
        def final() -> Batch | None:
            batch = self.state.batches.get(name)
            return batch if batch is not None and batch.status.final else None

        return wait_until(final, 120, f"{name} is final")

    def digest(self, name: str) -> str:
        """Of all its lines, sorted, as if each batch had the same name."""
        batch = self.completed(name)
        assert batch.status is BatchStatus.COMPLETED
        assert (batch.request_counts.completed, batch.request_counts.failed) == (ROWS - 1, 1)
        lines: list[bytes] = []
        for file in (batch.output, batch.error_output):
            assert file is not None
            lines += self.stack.store.get(file).splitlines()  # type: ignore[union-attr]
        used = [json.loads(line)["response"]["body"].get("usage", {}) for line in lines]
        spent = sum(usage.get("completion_tokens", 0) for usage in used)
        assert batch.usage.completion_tokens == spent, "each token is counted once"
        joined = b"\n".join(sorted(line.replace(name.encode(), b"batch") for line in lines))
        return hashlib.sha256(joined).hexdigest()

    def clean(self) -> str:
        if not self._clean:
            self._clean = self.digest(self.open())
        return self._clean

    def close(self) -> None:
        broker.close(self._app)


@pytest.fixture(scope="module")
def batch_range() -> Iterator[Range]:
    with tempfile.TemporaryDirectory(prefix="gm-bulk-") as name:
        directory = Path(name)
        model = write_tiny(directory / "model", tokenizer=True)
        (directory / "broker").mkdir()
        valkey = Valkey(directory / "broker").start()
        stack = Stack(valkey, directory, model)
        try:
            found = Range(stack, directory)
            yield found
            found.close()
            valkey.check_keys()
        finally:
            stack.close()
            valkey.close()


@pytest.mark.parametrize(("point", "nth"), POINTS)
def test_a_worker_killed_between_two_effects_costs_a_batch_nothing(
    point: str, nth: int, batch_range: Range
) -> None:
    clean = batch_range.clean()
    batch_range.refill()
    batch_range.points.arm(point, nth)
    name = batch_range.open()
    batch_range.points.wait_struck()
    batch_range.refill()
    assert batch_range.digest(name) == clean


def test_a_segment_delivered_twice_ends_once(batch_range: Range) -> None:
    clean = batch_range.clean()
    batch_range.refill()
    name = batch_range.open()
    batch_range.send(segment_id(name, 1))
    assert batch_range.digest(name) == clean


def test_a_frozen_worker_that_thaws_adds_nothing(batch_range: Range) -> None:
    clean = batch_range.clean()
    batch_range.refill()
    name = batch_range.open()
    first = segment_id(name, 1)

    def owner() -> str | None:
        status = batch_range.state.status(first)
        begun = [batch_range.state.read_log(f"{name}.{line}") for line in range(1, 5)]
        return status.worker if status is not None and any(len(log) > 1 for log in begun) else None

    held_by = wait_until(owner, 60, "its rows run")
    frozen = next(w for w in batch_range.living() if w.process.pid == int(held_by.split("-")[-2]))
    frozen.freeze()
    try:
        wait_until(lambda: (found := owner()) and found != held_by, 60, "somebody else has it")
    finally:
        frozen.thaw()
    assert batch_range.digest(name) == clean
    assert not frozen.dead


def test_every_point_of_a_batch_is_tried() -> None:
    assert {point for point, _ in POINTS} >= set(BATCH_POINTS)
