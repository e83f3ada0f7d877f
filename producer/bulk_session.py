"""What surrounds a bulk run: the check of its input, the choice of its model, its workers, its lock."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from ..schemas.errors import BadInput, EmptyFile, EngineUnavailable, Misconfigured, ModelNotFound, Transient
from ..schemas.model_names import served_name
from . import bulk_input, core, local_model
from .bulk import BulkRun, Hooks, Progress, batch_id
from .bulk_input import Checked, LineError, Rules
from .bulk_output import Spool
from .link import EMBEDDED, Link
from .settings import ProducerSettings
from .stack import Workers, lives, make_workers

LOOK_EVERY_S = 2.0
DRAIN_S = "1"
"""Rows that would take longer are handed back with what they have; the next run continues them."""


class InvalidLines(BadInput):
    """The input has lines that are no requests, and nothing ran."""

    code = "invalid_input"

    def __init__(self, checked: Checked) -> None:
        count = checked.invalid
        super().__init__(
            f"{count:,} of {checked.rows + count:,} lines not valid, nothing ran; "
            "fix the input, or use --on-invalid skip"
        )
        self.errors: list[LineError] = checked.errors


@dataclass(frozen=True, slots=True)
class Prepared:
    """An input that may run."""

    checked: Checked
    rules: Rules
    batch: str
    name: str
    """The model as jobs name it."""
    model: str | None
    """The model as a worker of our own would load it; None: workers are somewhere else."""


def prepare(
    file: BinaryIO,
    settings: ProducerSettings,
    link: Link,
    *,
    model: str | None,
    revision: str | None,
    defaults: Mapping[str, Any],
    skip_invalid: bool,
    salt: str,
) -> Prepared:
    """Check the whole input and find its model, before anything runs.

    Raises InvalidLines, EmptyFile, ModelNotFound, ModelInvalid, BrokerUnavailable.
    """
    wanted, here = model or settings.model, settings.broker.startswith(EMBEDDED)
    if wanted is not None:  # a wrong name is known before a long file is read
        _choose(wanted, settings, link, revision, here)
    names = None if wanted is None else frozenset({wanted, served_name(wanted)})
    rules = Rules(settings, names, defaults)
    checked = bulk_input.check(file, rules)
    if not checked.rows and not checked.invalid:
        raise EmptyFile("the input has no lines; put one request on each")
    if checked.invalid and not (skip_invalid and checked.rows):
        raise InvalidLines(checked)
    chosen = _choose(wanted or checked.model, settings, link, revision, here)
    name = served_name(chosen) if here else chosen
    if names is None and checked.model is not None:
        rules = Rules(settings, frozenset({checked.model}), defaults)
    return Prepared(checked, rules, batch_id(checked, name, rules, salt), name, chosen if here else None)


def _choose(
    wanted: str | None, settings: ProducerSettings, link: Link, revision: str | None, here: bool
) -> str:
    if not here:
        return core.pick_model(wanted, link.state.models(), settings)
    try:
        return local_model.choose(wanted, settings, revision)
    except ModelNotFound:
        if wanted is not None and link.state.alive(wanted):  # `gristmill up` serves it from another cache
            return wanted
        raise


class Session:
    """Runs one prepared input; owns its workers. A context manager."""

    def __init__(
        self,
        settings: ProducerSettings,
        link: Link,
        job: Prepared,
        *,
        knobs: Sequence[str],
        workers: int,
        warn: Callable[[str], None],
    ) -> None:
        self._settings, self._link, self._job, self._warn = settings, link, job, warn
        self._workers: Workers | None = None
        if job.model is not None:
            self._workers = make_workers(
                settings,
                job.model,
                [*knobs, "--drain-s", DRAIN_S],
                count=workers,
                logs=settings.home / "logs",
                max_failures=settings.worker_restarts,
                stop_s=settings.worker_stop_s,
            )
        self._started = False
        self._looked_at = self._started_at = 0.0
        self._ready = self._told = False
        self._cleanup = ExitStack()
        self._run: BulkRun | None = None

    def __enter__(self) -> Self:
        """Claim the batch, check the store, and start workers if nobody serves the model yet."""
        self._cleanup.callback(self._lock())
        try:
            self._link.state.ping()
            self._link.store.check()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def _lock(self) -> Callable[[], None]:
        """Become the only run of this batch; returns how to let go. If we are killed, the kernel does it."""
        path = self._settings.home / "runs" / f"{self._job.batch}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as exc:
                os.close(fd)
                raise Transient(
                    "another `gristmill run` works on this input; wait for it, or end it"
                ) from exc
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                break
            os.close(fd)  # its owner removed it as we opened it

        def let_go() -> None:
            path.unlink(missing_ok=True)
            os.close(fd)

        return let_go

    def execute(
        self,
        source: BinaryIO,
        spool: Spool,
        stopping: Callable[[], bool],
        report: Callable[[Progress], None],
    ) -> bool:
        """Run until all rows ended (True) or ``stopping`` (False). The workers end with it in any case."""
        self._run = run = BulkRun(
            self._link,
            self._settings,
            source=source,
            rules=self._job.rules,
            checked=self._job.checked,
            batch=self._job.batch,
            model=self._job.name,
            spool=spool,
            hooks=Hooks(stopping, self._watch, report),
        )
        try:
            return run.run()
        finally:
            if self._workers is not None:
                self._workers.stop()
            run.collect_last()
            report(run.progress)

    @property
    def progress(self) -> Progress:
        """Where the run stands, or stood when it ended."""
        return self._run.progress if self._run else Progress(rows=self._job.checked.rows)

    @property
    def logs(self) -> list[str]:
        """Log files of the workers that ran."""
        started = self._workers.workers if self._workers is not None and self._started else []
        return [str(worker.log) for worker in started if worker.log is not None]

    def kill(self) -> None:
        """End the workers without waiting."""
        if self._workers is not None:
            self._workers.kill()

    def __exit__(self, *exc: object) -> None:
        self.kill()
        if self._run is not None:
            self._run.close()
        self._cleanup.close()

    # ---- on each turn

    def _watch(self, progressed: bool) -> None:
        """Start workers if nobody serves the model, restart ours if they die, say so if there is nobody."""
        now = time.monotonic()
        if self._workers is not None and self._started:
            if progressed:
                self._ready = True
                self._workers.progressed()
            for sentence in self._workers.check():
                self._warn(sentence)
        if self._ready and not self._told and now - self._looked_at >= core.SAY_AFTER_S:
            self._looked_at = now
            with suppress(Transient):
                sentence = core.in_trouble(self._link.state.alive(self._job.name))
                if sentence is not None:
                    self._told = True
                    self._warn(sentence)
        if not self._ready and now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            self._look(now)

    def _look(self, now: float) -> None:
        with suppress(Transient):
            alive = [info for info in self._link.state.alive(self._job.name) if lives(info)]
            if self._workers is None:
                self._ready = True
                if not alive:
                    self._warn(core.nobody_alive(self._job.name, self._settings))
            elif not self._started:
                if not alive:
                    self._workers.start()
                    self._started, self._started_at = True, now
            elif any(info.pid in self._workers.pids for info in alive):
                self._ready = True
        limit_s = self._settings.worker_start_s
        if self._started and not self._ready and now - self._started_at > limit_s:
            raise EngineUnavailable(f"the worker was not ready after {limit_s:g} s; its log: {self.logs[0]}")


def refuse_same_files(source: str, output: str, errors: str | None) -> None:
    """Raises Misconfigured if two names are one file: the run would overwrite what it reads or wrote."""
    names = {"input": source, "--output": output, "--errors": errors}
    seen: dict[Path, str] = {}
    for what, name in names.items():
        if name is None or name == "-":
            continue
        path = Path(name).resolve()
        if path in seen:
            raise Misconfigured(f"{seen[path]} and {what} are the same file ({name}); choose another name")
        seen[path] = what
