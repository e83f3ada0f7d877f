"""How far a download, a copy or a check is."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

log = logging.getLogger(__name__)

REPORT_EVERY_S, LOG_EVERY_S = 0.1, 5.0


@dataclass(frozen=True, slots=True)
class Progress:
    """``done`` of ``total`` units of the stage are behind us; total 0 means that nobody can tell."""

    stage: str
    done: int = 0
    total: int = 0
    unit: str = ""
    """``B``: bytes."""


Reporter = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """For who does not want to know."""


class Meter:
    """Counts the bytes of one stage, from any thread; reports now and then, and at the end."""

    def __init__(self, stage: str, total: int, report: Reporter, done: int = 0) -> None:
        self._stage, self._total, self._report = stage, total, report
        self._done, self._due = done, 0.0
        self._lock = threading.Lock()
        report(Progress(stage, done, total, "B"))

    def add(self, count: int) -> None:
        """So many more; fewer, if negative: they have to be done again."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now >= self._due or self._done == self._total:
                self._due = now + REPORT_EVERY_S
                self._report(Progress(self._stage, self._done, self._total, "B"))


class Pace:
    """Units per second of the stage that is under way, and the seconds that it will still take."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stage, self._began_s, self._began_at = "", 0.0, 0

    def of(self, progress: Progress) -> tuple[float, float | None]:
        """(rate, seconds left). What was there when the stage began has cost no time and does not count."""
        now = self._clock()
        if progress.stage != self._stage:
            self._stage, self._began_s, self._began_at = progress.stage, now, progress.done
        made, elapsed_s = progress.done - self._began_at, now - self._began_s
        rate = made / elapsed_s if elapsed_s > 0 else 0.0
        left = progress.total - progress.done
        return rate, left / rate if rate > 0 and progress.total else None


class LoggedProgress:
    """Progress as log events: when a stage begins, then every few seconds, with bytes, rate and ETA."""

    def __init__(self, event: str, **fields: str) -> None:
        self._event, self._fields, self._pace = event, fields, Pace()
        self._stage, self._due = "", 0.0

    def __call__(self, progress: Progress) -> None:
        """May be called from any thread, one at a time."""
        rate, left_s = self._pace.of(progress)
        now = time.monotonic()
        if progress.stage == self._stage and now < self._due:
            return
        self._stage, self._due = progress.stage, now + LOG_EVERY_S
        extra: dict[str, object] = {**self._fields, "stage": progress.stage}
        if progress.unit == "B":
            extra |= {"bytes": progress.done, "total_bytes": progress.total, "mb_per_s": round(rate / 1e6, 1)}
            extra |= {} if left_s is None else {"eta_s": round(left_s)}
        log.info(self._event, extra=extra)


def size(count: float) -> str:
    """``1.5 GB``, ``310 MB``, ``12 kB``: decimal, as disks and networks are sold."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:,.{1 if count < 100 * factor and factor > 1e6 else 0}f} {unit}"
    return f"{count:,.0f} B"
