"""How far a model's download, copy or check is, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from ..backends.progress import Pace, Progress, size
from .console import say
from .progress import LINE_EVERY_S, bar, duration


@contextmanager
def show_transfer() -> Generator[Callable[[Progress], None]]:
    """Gives what to call with the progress, from one thread at a time."""
    if sys.stderr.isatty():
        with _bytes() as report:
            yield report
    else:
        yield _Lines().report


@contextmanager
def _bytes() -> Generator[Callable[[Progress], None]]:
    pace, stage = Pace(), ""
    with bar("rest") as update:

        def report(progress: Progress) -> None:
            nonlocal stage
            anew, stage = progress.stage != stage, progress.stage
            update(
                anew=anew,
                description=progress.stage,
                completed=progress.done,
                total=progress.total or None,
                rest=rest(progress, pace),
            )

        yield report


class _Lines:
    """A line when a stage begins, then one every ten seconds."""

    def __init__(self) -> None:
        self._pace, self._stage, self._due = Pace(), "", 0.0

    def report(self, progress: Progress) -> None:
        now = time.monotonic()
        words = rest(progress, self._pace)
        if progress.stage == self._stage and now < self._due:
            return
        self._due = now + LINE_EVERY_S
        say(f"{progress.stage}{': ' * bool(words)}{words}" + " …" * (progress.stage != self._stage))
        self._stage = progress.stage


def rest(progress: Progress, pace: Pace) -> str:
    """``1.2 of 16.1 GB, 310 MB/s, ETA 48 s``; of stages that count something else, or nothing: little."""
    rate, left_s = pace.of(progress)
    if progress.unit != "B":
        return f"{progress.done:,} of {progress.total:,}" if progress.total else ""
    parts = [f"{size(progress.done)} of {size(progress.total)}"]
    if rate > 0:
        parts.append(f"{size(rate)}/s")
    if left_s is not None and progress.done < progress.total:
        parts.append(f"ETA {duration(left_s)}")
    return ", ".join(parts)
