"""How far a batch is, on stderr: a bar on a terminal, a line now and then otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from ..schemas.batch import BatchStatus
from .batch.forecast import Progress
from .console import say

LINE_EVERY_S = 10.0
_DOING = {
    None: "starting the worker",
    BatchStatus.VALIDATING: "validating",
    BatchStatus.FINALIZING: "writing",
    BatchStatus.CANCELLING: "stopping",
}


@contextmanager
def show_progress() -> Generator[Callable[[Progress], None]]:
    """Gives what to call with the progress, as often as you like."""
    if sys.stderr.isatty():
        with _rows() as report:
            yield report
    else:
        yield Lines().report


@contextmanager
def silent() -> Generator[Callable[[Progress], None]]:
    """The same for who does not want to see it."""
    yield lambda _progress: None


@contextmanager
def bar(*names: str) -> Generator[Callable[..., None]]:
    """A bar on stderr, gone at its end: a description, the bar, and ``names``: fields of it, or ``count`` and
    ``elapsed``. Gives what to call with what has changed; ``anew=True`` begins it from nothing.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    known: dict[str, ProgressColumn] = {"count": MofNCompleteColumn(), "elapsed": TimeElapsedColumn()}
    columns = [known.get(name, TextColumn(f"{{task.fields[{name}]}}")) for name in names]
    console = Console(stderr=True)
    shown = Bar(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        console=console,
        transient=True,
        refresh_per_second=5,
    )
    with shown:
        task = shown.add_task("starting", total=None, rest="")

        def update(*, anew: bool = False, **fields: Any) -> None:
            if anew:
                shown.reset(task)
            shown.update(task, **fields)

        yield update


@contextmanager
def _rows() -> Generator[Callable[[Progress], None]]:
    with bar("count", "rest", "elapsed") as update:

        def report(progress: Progress) -> None:
            validating = progress.status is BatchStatus.VALIDATING
            update(
                description=_doing(progress),
                total=progress.rows or None,
                completed=progress.validated if validating else progress.ended,
                rest="" if validating or progress.status is None else rest(progress),
            )

        yield report


class Lines:
    """A line when the first rows have ended, and every ten seconds, whether anything has happened or not."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._due = self._began + LINE_EVERY_S
        self._any_ended = False

    def report(self, progress: Progress) -> None:
        now, news = self._clock(), bool(progress.ended) and not self._any_ended
        if now >= self._due or news:
            self._due, self._any_ended = now + LINE_EVERY_S, self._any_ended or news
            say(_line(progress, now - self._began))


def _line(progress: Progress, seconds: float) -> str:
    validating = progress.status is BatchStatus.VALIDATING
    if progress.ended and not validating:
        return f"{progress.ended:,}/{progress.rows:,} rows, {rest(progress)}"
    done = progress.validated if validating else 0
    return f"{_doing(progress)}, {done:,}/{progress.rows:,} rows after {duration(seconds)}"


def _doing(progress: Progress) -> str:
    return _DOING.get(progress.status, "running")


def rest(progress: Progress) -> str:
    """What stands beside the bar."""
    parts = [f"{progress.failed:,} failed"] if progress.failed else []
    parts.append(f"{progress.completion_tokens:,} tokens")
    if progress.tokens_per_s:
        parts.append(f"{progress.tokens_per_s:,.0f} tok/s")
    if progress.eta_s is not None and progress.ended < progress.rows:
        parts.append(f"ETA {'' if progress.live else 'about '}{duration(progress.eta_s)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """``1 h 02 min``, ``3 min 20 s``, ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"
