"""A bulk run: rows of a checked file go through the queue as jobs ``<batch>.<line>``; results come in order.

What is finished is decided by the result store alone, so a run that was stopped, however hard, goes on where
it was: ids follow from the file's content, and a row whose result object exists is read, never run.
"""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import BinaryIO

from ..schemas import keys
from ..schemas.batch_lines import Row, error_line, output_line
from ..schemas.errors import BadInput, BrokerUnavailable, Misconfigured, StoreUnavailable, Transient
from ..schemas.job import JobState, Priority
from ..schemas.result import Result
from . import bulk_input, core
from .bulk_input import Checked, LineError, Rules
from .bulk_output import Spool
from .link import Link
from .settings import ProducerSettings

FILL_AT_ONCE = 64
LOADERS = 16
PATIENCE_S = 60.0
"""How long a broker or a store may be away in the middle of a run."""


@dataclass(slots=True)
class Progress:
    """Where a run stands. Counts are rows."""

    rows: int
    invalid: int = 0
    succeeded: int = 0
    failed: int = 0
    resumed: int = 0
    """Of those that ended: how many had ended before this run."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    fresh_tokens: int = 0
    """Completion tokens made in this run, not in an earlier one."""
    first_at: float | None = None
    last_at: float | None = None
    ttfts: array[float] = field(default_factory=lambda: array("d"))

    @property
    def ended(self) -> int:
        """Rows that need nothing more."""
        return self.succeeded + self.failed

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens of this run by the time between its first claim and its last end."""
        if self.first_at is None or self.last_at is None or self.last_at <= self.first_at:
            return 0.0
        return self.fresh_tokens / (self.last_at - self.first_at)

    def eta_s(self, now: float) -> float | None:
        """Seconds to go at this run's pace; None before anything ended."""
        fresh = self.ended - self.resumed
        if self.first_at is None or fresh == 0:
            return None
        return (now - self.first_at) / fresh * (self.rows - self.ended)

    def ttft_s(self, quantile: float) -> float | None:
        """Seconds from claim to first token."""
        if not self.ttfts:
            return None
        return sorted(self.ttfts)[round(quantile * (len(self.ttfts) - 1))]


def batch_id(checked: Checked, model: str, rules: Rules, salt: str = "") -> str:
    """The same file, model, defaults and tenant give the same id."""
    parts = json.dumps(
        [checked.digest, model, dict(rules.defaults), rules.settings.tenant, salt], sort_keys=True
    )
    return "run_" + hashlib.sha256(parts.encode()).hexdigest()[:24]


@dataclass(slots=True)
class Hooks:
    """What a run asks of its surroundings, on each turn of its loop."""

    stopping: Callable[[], bool]
    watch: Callable[[bool], None]
    """Look after the workers; told whether rows ended since. May raise."""
    report: Callable[[Progress], None]


class BulkRun:
    """One run over one file. Memory: the window, and some bytes a row; time: the model's.

    Law: a row is in exactly one place: not yet read, ``_waiting``, ``_done``, ``_in_flight`` or the spool.
    """

    def __init__(
        self,
        link: Link,
        settings: ProducerSettings,
        *,
        source: BinaryIO,
        rules: Rules,
        checked: Checked,
        batch: str,
        model: str,
        spool: Spool,
        hooks: Hooks,
    ) -> None:
        self._link, self._settings, self._hooks = link, settings, hooks
        self._source, self._rules, self._checked = source, rules, checked
        self.batch, self._model, self._spool = batch, model, spool
        self._in_flight: dict[str, tuple[int, str]] = {}
        self._finished = bytearray()  # one byte a line number: has a result object from an earlier run
        self._waiting: tuple[int, Row] | None = None
        self._done: list[tuple[int, Row]] = []  # finished by an earlier run, not read yet
        self._trouble_since: float | None = None
        self._loaders = ThreadPoolExecutor(LOADERS, thread_name_prefix="bulk-load")
        self.progress = Progress(rows=checked.rows, invalid=checked.invalid)

    def run(self) -> bool:
        """Until every row has ended: True; or until ``stopping``: False.

        Raises Transient when a backend stays away, and whatever ``watch`` raises.
        """
        self._find_finished()
        rows = self._rows()
        exhausted = False
        while not self._hooks.stopping():
            ended = 0
            try:
                exhausted = exhausted or self._fill(rows)
                ended = self._collect()
                self._trouble_since = None
            except Transient as exc:
                self._endure(exc)
            if self._in_flight or ended:  # a run that finds all rows finished needs no worker
                self._hooks.watch(ended > 0)
            self._hooks.report(self.progress)
            if exhausted and not self._in_flight and not self._done:
                assert self.progress.ended == self.progress.rows, f"{self.batch}: a row was lost on the way"
                return True
            if not ended:
                time.sleep(self._settings.bulk_poll_s)
        return False

    def collect_last(self) -> None:
        """After the workers stopped: what they still finished."""
        with suppress(Transient):  # it is in the store, and the next run finds it there
            self._collect()

    def close(self) -> None:
        self._loaders.shutdown(cancel_futures=True)

    # ---- in

    def _find_finished(self) -> None:
        prefix = keys.result_object(f"{self.batch}.0").removesuffix("0.json")
        for name in self._link.store.list(prefix):
            line = name.removeprefix(prefix).removesuffix(".json")
            if line.isdigit():
                number = int(line)
                if number >= len(self._finished):
                    self._finished.extend(bytes(number + 1 - len(self._finished)))
                self._finished[number] = 1

    def _rows(self) -> Iterator[tuple[int, Row]]:
        """(index, row) of each valid row. Invalid ones go to the spool on the way."""
        self._source.seek(0)
        lines = bulk_input.read_lines(self._source, bulk_input.line_limit(self._settings))
        for index, (number, line) in enumerate(lines):
            row = self._row(index, number, line)
            if row is not None:
                yield index, row

    def _row(self, index: int, number: int, line: bytes | int) -> Row | None:
        try:
            row = bulk_input.parse_row(number, line, self._rules)
        except BadInput as exc:
            self._reject(index, bulk_input.line_error(number, line, exc))
            return None
        if number in self._checked.duplicates:
            self._reject(index, bulk_input.duplicate_error(number, row))
            return None
        return row

    def _reject(self, index: int, problem: LineError) -> None:
        if not self._checked.invalid:
            raise Misconfigured("the input changed while it was running; run the same command again")
        line = error_line(f"{self.batch}.{problem.line}", problem.custom_id, problem.error)
        self._spool.add(index, line, failed=True)

    def _fill(self, rows: Iterator[tuple[int, Row]]) -> bool:
        """Submit rows until the window is full, a few at a time. True: there are no more.

        Nothing is forgotten when the broker or the store fails in between: call again.
        """
        for _ in range(FILL_AT_ONCE):
            if len(self._in_flight) >= self._settings.bulk_window:
                return False
            self._waiting = self._waiting or next(rows, None)
            if self._waiting is None or len(self._done) >= FILL_AT_ONCE:
                self._take_finished()
            if self._waiting is None:
                return True
            index, row = self._waiting
            if row.number < len(self._finished) and self._finished[row.number]:
                self._done.append((index, row))
            else:
                self._submit(index, row)
            self._waiting = None
        return False

    def _submit(self, index: int, row: Row) -> None:
        """On a second run this may repeat a message: its claim finds the job running or final."""
        job_id = self._job_id(row)
        job = core.job_of_row(row, job_id, self._model, Priority.BATCH, self._settings, time.time())
        self._link.submit(job)
        self._in_flight[job_id] = index, row.custom_id

    def _take_finished(self) -> None:
        results = self._load_all([self._job_id(row) for _, row in self._done])
        for (index, row), result in zip(self._done, results, strict=True):
            self._record(index, row.custom_id, result, resumed=True)
        self._done.clear()

    def _job_id(self, row: Row) -> str:
        return f"{self.batch}.{row.number}"

    # ---- out

    def _collect(self) -> int:
        """Take what ended since the last look; how many rows."""
        job_ids = list(self._in_flight)
        states = self._link.state.states(job_ids)
        ended = [job_id for job_id, state in zip(job_ids, states, strict=True) if _is_final(job_id, state)]
        for job_id, result in zip(ended, self._load_all(ended), strict=True):
            index, custom_id = self._in_flight.pop(job_id)
            self._record(index, custom_id, result, resumed=False)
        return len(ended)

    def _load_all(self, job_ids: list[str]) -> list[Result]:
        """All or an error: nothing is recorded of a list that could be read only in part."""
        return list(self._loaders.map(self._load, job_ids))

    def _load(self, job_id: str) -> Result:
        body = self._link.result_body(job_id)
        if body is None:
            raise StoreUnavailable(
                f"job {job_id} has ended and its result cannot be read; is the store complete?"
            )
        return Result.from_json(body)

    def _record(self, index: int, custom_id: str, result: Result, *, resumed: bool) -> None:
        ok = result.state is JobState.SUCCEEDED
        self._spool.add(index, output_line(result, custom_id), failed=not ok)
        progress, timings = self.progress, result.timings
        progress.succeeded += ok
        progress.failed += not ok
        progress.prompt_tokens += result.usage.prompt_tokens
        progress.completion_tokens += result.usage.completion_tokens
        if resumed:
            progress.resumed += 1
            return
        progress.fresh_tokens += result.usage.completion_tokens
        started = timings.started_at or timings.finished_at
        progress.first_at = min(progress.first_at or started, started)
        progress.last_at = max(progress.last_at or 0.0, timings.finished_at)
        if timings.first_token_at is not None and timings.started_at is not None:
            progress.ttfts.append(max(0.0, timings.first_token_at - timings.started_at))

    def _endure(self, exc: Transient) -> None:
        """Wait for a broker or a store that is away, but not for ever."""
        now = time.monotonic()
        self._trouble_since = self._trouble_since or now
        if now - self._trouble_since > PATIENCE_S:
            raise exc


def _is_final(job_id: str, state: JobState | None) -> bool:
    if state is None:
        raise BrokerUnavailable(
            f"the broker has forgotten job {job_id}: its data were lost; run again to go on"
        )
    return state.final
