"""Run: a batch from an input to its answers while somebody waits, with workers of its own if need be.

Nothing is queued before a worker is ready, and what a run leaves unfinished is paused: nobody else's worker
takes it up. The same command goes on with it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ...schemas.batch import Batch, BatchStatus
from ...schemas.errors import InvalidRequest, JobNotFound, ResultsDamaged, Transient
from ..link import Link
from ..settings import ProducerSettings
from .answers import Answers, find, standing
from .cache import Cache
from .crew import Crew
from .forecast import Forecast, Progress
from .intake import Intake
from .speed import Speed, measured
from .submission import OwnRows, Submission, Uploaded

PATIENCE_S = 60.0
"""How long a broker may be away in the middle of a run."""
UNKNOWN_IDS = 2
"""So many in a row are the end of an input's runs."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a run asks of its surroundings, on each turn of its loop."""

    stopping: Callable[[], bool]
    report: Callable[[Progress], None]


class Run:
    """One input's. ``known``: as it stood before, if an earlier run began it."""

    def __init__(
        self,
        link: Link,
        settings: ProducerSettings,
        intake: Intake,
        batch: Batch,
        cache: Cache | None = None,
    ) -> None:
        self._cache = cache
        self._link, self._settings, self._intake = link, settings, intake
        self._submission = Submission(link, intake, batch)
        self.batch = self._submission.known or batch
        self.over = self.batch.status.final
        """Nothing is left to do but to fetch the answers."""
        self.resumed = self.batch.request_counts.completed + self.batch.request_counts.failed
        """Rows that had ended before this run …"""
        self._objects_before = None if self.over else link.state.batches.object_count(batch.id)
        """… and how many objects they are in; None: there is nothing to do."""
        self._mended_at = self.batch.trouble_at
        """What an earlier run could not finish for may be mended by now; a keeper has to try."""
        self._trouble_since: float | None = None
        if self.batch.status in (BatchStatus.CANCELLED, BatchStatus.EXPIRED, BatchStatus.CANCELLING):
            raise InvalidRequest(
                f"batch {batch.id} of this input was {self.batch.status}; see `gristmill batch results`, "
                f"run the rest with `gristmill batch retry --failed {batch.id}`, or all again with --fresh"
            )

    def execute(self, crew: Crew, hooks: Hooks) -> bool:
        """Until it is final: True; or until ``stopping``: False. Workers end with it.

        Raises EngineUnavailable, Misconfigured, Transient: then it is paused, if anything was queued.
        """
        try:
            if not crew.ready(lambda: self._waits(hooks)):
                return False
            uploaded = self._submit()
            self._follow(crew, hooks, uploaded)
        finally:
            self._pause()
            crew.stop()
            with suppress(Transient):
                self.batch = self._link.state.batches.get(self.batch.id) or self.batch
        return self.over

    def _waits(self, hooks: Hooks) -> bool:
        """For a worker: True if it need not go on."""
        hooks.report(Progress(rows=self.batch.request_counts.total))
        return hooks.stopping()

    def _pause(self) -> None:
        """What is left of it; nothing is, if it was never opened."""
        with suppress(Transient, JobNotFound):
            if not self.over:
                self._link.state.batches.pause(self.batch.id)

    def keep_answers(self) -> None:
        """In the cache, if there is one."""
        if self._cache is not None:
            self._cache.keep(self.batch, Answers(self._link, self.batch).lines("output"))

    def speed(self) -> Speed | None:
        """Of what this run has made. None: nobody can tell."""
        if self._objects_before is None:
            return None
        try:
            return measured(self._link.state.batches.objects(self.batch.id, self._objects_before))
        except Transient:
            return None

    def _submit(self) -> Uploaded:
        batches, known = self._link.state.batches, self._submission.known
        if known is not None and known.paused:
            batches.resume(self.batch.id)
        uploaded = self._upload()
        self._submission.open(uploaded)
        return uploaded

    def _upload(self) -> Uploaded:
        cache, batch = self._cache, self.batch
        if cache is None:
            return self._submission.upload()
        own = OwnRows(self._link.store, batch.id)
        serving = {info.fingerprint for info in self._link.state.alive(batch.model) if info.fingerprint}
        return self._submission.upload(lambda row: cache.taken(batch, own, row, serving), own)

    def _follow(self, crew: Crew, hooks: Hooks, uploaded: Uploaded) -> None:
        forecast, ended = Forecast(uploaded.parts), self.resumed
        while not hooks.stopping():
            try:
                self.batch = self._now()
                self._trouble_since = None
            except Transient as exc:
                self._endure(exc)
            counts = self.batch.request_counts
            progress = forecast.progress(self.batch)
            hooks.report(progress)
            if self.batch.status.final:
                self.over = True
                return
            if self.batch.trouble is not None and self.batch.trouble_at != self._mended_at:
                raise ResultsDamaged(f"{self.batch.id} cannot be finished: {self.batch.trouble.message}")
            crew.watch(progress.ended > ended)
            ended = counts.completed + counts.failed
            time.sleep(self._settings.bulk_poll_s)

    def _now(self) -> Batch:
        return find(self._link, self.batch.id)

    def _endure(self, exc: Transient) -> None:
        """Wait for a broker that is away, but not for ever."""
        now = time.monotonic()
        self._trouble_since = self._trouble_since or now
        if now - self._trouble_since > PATIENCE_S:
            raise exc


def latest(link: Link, intake: Intake, batch: Batch, *, fresh: bool) -> Batch:
    """Runs over one input make batches whose ids follow from one another. The one that was made last; or one
    behind them all, if that is asked for or a worker has refused the last one.

    Not each id is known: one that failed is forgotten with its record, and old ones are taken away, the first
    before those behind it; its id may have been used again since.
    """
    last: Batch | None = None
    name = free = batch.id
    unknown = 0
    while unknown < UNKNOWN_IDS:
        known = standing(link, name)
        name = intake.batch_id("run_", "after", name)
        if known is None:
            unknown += 1
            continue
        unknown, free = 0, name
        if last is None or (known.created_at or 0.0) >= (last.created_at or 0.0):
            last = known
    if last is None or fresh or last.status is BatchStatus.FAILED:
        return batch.model_copy(update={"id": free})
    return batch.model_copy(update={"id": last.id})


@contextmanager
def only_run(settings: ProducerSettings, batch_id: str) -> Generator[None]:
    """Be the only run of this batch on this machine; a kill lets go of it, too. Raises Transient."""
    path = settings.home / "runs" / f"{batch_id}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(fd)
            raise Transient("another `gristmill run` works on this input; wait for it, or end it") from exc
        if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
            break
        os.close(fd)  # its owner removed it as we opened it
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)
