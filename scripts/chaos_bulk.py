"""Chaos over one batch: its sorted output must have the checksum of an undisturbed run's.

Both batches run in the same workers, in deterministic mode, so that not even a near tie may differ: the first
one in peace, the second one under faults. Their rows are the same but for the batch's name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chaos_fleet import Fault, Fleet
from chaos_jobs import MODEL, WORDS, write_model
from chaos_stacks import Gristmill
from gristmill.backends import broker
from gristmill.backends.state import open_state
from gristmill.backends.store import open_store
from gristmill.schemas.batch import Batch, segment_id
from gristmill.schemas.errors import GristmillError
from gristmill.schemas.job import Job, Priority
from gristmill.schemas.queues import queue_name
from gristmill.schemas.sampling import SamplingParams

from tests.support.batches import message, open_batch, row
from tests.support.valkey import Valkey

PEACE, STORM = "run_4a8f60c1d2e3", "run_97b05e3fa6c8"
"""Names that no row's text holds."""
SEGMENT_ROWS = 250
START_S, DRAIN_S = 180.0, 180.0
WRITE_EVERY_S = 1.0
# What the prefix cache had is told in the usage, and depends on who ran beside.
_CACHED = re.compile(rb'"cached_tokens": ?[0-9]+')


@dataclass(frozen=True)
class Told:
    """The lines of a batch that has ended."""

    sha256: str
    rows: Counter[str]
    """How many lines there are of each custom_id."""


class BulkRun:
    """One run: a broker, workers, two batches, and the faults over the second."""

    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self._args = args
        for name in ("broker", "results", "ledger", "logs"):
            (directory / name).mkdir()
        model = write_model("tiny", directory / "model")
        self._broker = Valkey(directory / "broker", appendfsync="always").start()
        self._side = Gristmill(
            self._broker,
            directory,
            model,
            lease_s=args.lease_s,
            small=True,
            flags=("--deterministic",),
            env={"GRISTMILL_BULK_WRITE_EVERY_S": WRITE_EVERY_S},
        )
        settings = self._side.settings
        self._state, self._store = open_state(settings), open_store(settings.results, settings)
        self._app = broker.make_app(settings)
        self.fleet = Fleet(
            self._broker, self._side.launch, args.workers, args.seed, ready_word=self._side.ready_word
        )

    def clean(self) -> Told:
        """Of a run that nothing disturbs."""
        self._until(lambda: self.fleet.all_ready, START_S, "the workers are ready")
        self._open(PEACE)
        self._until(lambda: self._ended(PEACE), 600, "the undisturbed batch has ended")
        return self._told(PEACE)

    def disturbed(self, faults: Sequence[Fault]) -> Told:
        """Of one that is disturbed until it has ended or the time is over."""
        self._open(STORM)
        began, todo = time.monotonic(), list(faults)
        while (elapsed := time.monotonic() - began) < 60 * self._args.minutes and not self._ended(STORM):
            self.fleet.tick()
            while todo and todo[0].at_s <= elapsed:
                fault = todo.pop(0)
                getattr(self.fleet, fault.name)(fault.seconds)
            time.sleep(0.1)
        self.fleet.calm()
        self._until(lambda: self._ended(STORM), DRAIN_S + 60 * self._args.minutes, "the batch has ended")
        return self._told(STORM)

    def close(self) -> None:
        self.fleet.close()
        broker.close(self._app)
        self._state.close()
        self._side.close()
        self._broker.close()

    def _open(self, name: str) -> None:
        rows = draw_rows(self._args.seed, self._args.jobs, name)
        segments = [rows[i : i + SEGMENT_ROWS] for i in range(0, len(rows), SEGMENT_ROWS)]
        open_batch(self._state, self._store, *segments, batch=name)
        names = [segment_id(name, number) for number in range(1, len(segments) + 1)]
        for segment in names:
            queue = queue_name(MODEL, Priority.BATCH)
            broker.publish(self._app, queue, message(segment), segment, priority=Priority.BATCH)
        self._state.batches.sent(name, self._state.batches.unsent(name, len(names)))

    def _batch(self, name: str) -> Batch | None:
        try:
            return self._state.batches.get(name)
        except GristmillError:  # the broker is down: that is what this is for
            return None

    def _ended(self, name: str) -> bool:
        batch = self._batch(name)
        return batch is not None and batch.status.final

    def _until(self, true: Any, seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        told = 0.0
        while not true():
            self.fleet.tick()
            if time.monotonic() > deadline:
                raise SystemExit(f"chaos: waited {seconds:.0f} s, and not: {what}; {self._batch('chaos')}")
            if not self._args.json and time.monotonic() - told > 5:
                told = time.monotonic()
                print(f"chaos: until {what}: {self._counts()}", file=sys.stderr, flush=True)
            time.sleep(0.1)

    def _counts(self) -> str:
        batches = [self._batch(name) for name in (PEACE, STORM)]
        ended = [f"{b.id} {b.request_counts.completed}/{b.request_counts.total}" for b in batches if b]
        return f"{', '.join(ended)}, {self.fleet.kills} kills"

    def _told(self, name: str) -> Told:
        batch = self._batch(name)
        assert batch is not None, f"{name} is forgotten"
        lines: list[bytes] = []
        for file in (batch.output, batch.error_output):
            lines += (self._store.get(file) or b"").splitlines() if file else []
        counts = batch.request_counts
        assert counts.completed + counts.failed == len(lines), f"{counts} and {len(lines)} lines"
        alike = sorted(_CACHED.sub(b"", line.replace(name.encode(), b"batch")) for line in lines)
        rows = Counter[str](json.loads(line)["custom_id"] for line in lines)
        return Told(hashlib.sha256(b"\n".join(alike)).hexdigest(), rows)


def draw_rows(seed: int, count: int, batch: str) -> list[Job]:
    """The same for every name but for that: their texts follow from prompts and seeds."""
    draw = random.Random(f"rows {seed}")
    rows: list[Job] = []
    for line in range(1, count + 1):
        prompt = " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))
        sampling = SamplingParams(
            max_tokens=draw.choice((1, 8, 32, 64, 128)),
            temperature=draw.choice((0.0, 0.8, 1.2)),
            seed=draw.getrandbits(32),
        )
        rows.append(row(line, batch, prompt=prompt, sampling=sampling, model=MODEL))
    return rows


def run(args: argparse.Namespace, directory: Path, faults: Sequence[Fault]) -> tuple[dict[str, Any], bool]:
    """The report, and whether all is well."""
    bulk = BulkRun(args, directory)
    try:
        clean = bulk.clean()
        began = time.monotonic()
        told = bulk.disturbed(faults)
        took_s = time.monotonic() - began
    finally:
        bulk.close()
        (directory / "events.log").write_text("\n".join(bulk.fleet.log) + "\n")
    report = {
        "rows": args.jobs,
        "kills": bulk.fleet.kills,
        "lost": args.jobs - len(told.rows),
        "doubled": sum(count - 1 for count in told.rows.values()),
        "same_sha256": told.sha256 == clean.sha256,
        "sha256": told.sha256,
        "took_s": round(took_s, 1),
        "seed": args.seed,
        "workers": args.workers,
    }
    return report, told == clean
