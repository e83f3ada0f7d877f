"""Sections of the check: each is tried within its time, and what became of it is kept."""

from __future__ import annotations

import gc
import signal
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

Row = dict[str, Any]


class OverBudget(Exception):
    """A section took longer than it may."""


@dataclass
class Context:
    """What a section is told, and what sections tell each other."""

    device: str
    tiny: bool
    """Shapes that a CPU runs in a second: tries every line but those that need a card."""
    quick: bool
    facts: dict[str, float] = field(default_factory=dict[str, float])
    """Measured: bytes_s, flops, fp8_flops."""
    deadline: float = float("inf")

    @property
    def left_s(self) -> float:
        """Of the section's time."""
        return self.deadline - time.monotonic()

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


@dataclass
class Section:
    """A part of the check. ``run`` gives rows for the table; one whose ``ok`` is False is a failure."""

    name: str
    what: str
    budget_s: float
    run: Callable[[Context], list[Row]]
    needs: tuple[str, ...] = ()
    """Python packages besides those that every section needs."""


@dataclass
class Outcome:
    """What became of a section."""

    name: str
    seconds: float
    rows: list[Row]
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and all(row.get("ok", True) for row in self.rows)


def attempt(section: Section, context: Context) -> Outcome:
    """Run one section; whatever goes wrong is its own failure, and the next one starts with memory free."""
    started = time.monotonic()
    context.deadline = started + section.budget_s
    rows: list[Row] = []
    error = None
    try:
        with _ended_after(1.5 * section.budget_s):
            rows = section.run(context)
    except Exception as exc:  # noqa: BLE001  # the edge of a section: whatever it is, it is told
        where = traceback.extract_tb(exc.__traceback__)[-1]
        error = f"{type(exc).__name__}: {exc} ({where.filename.rpartition('/')[2]}:{where.lineno})"
        traceback.print_exc()
    free_memory(context)
    return Outcome(section.name, time.monotonic() - started, rows, error)


def free_memory(context: Context) -> None:
    gc.collect()
    if context.cuda:
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def _ended_after(seconds: float) -> Generator[None]:
    """Raise OverBudget in a section that does not look at its time, unless somebody else has the timer."""

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise OverBudget(f"stopped after {seconds:.0f} s")

    if signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(rows: list[Row]) -> str:
    """Rows with the same columns as Markdown; another set of columns begins another table."""
    lines: list[str] = []
    columns: list[str] = []
    for row in rows:
        if list(row) != columns:
            columns = list(row)
            lines += ["", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines.append(f"| {' | '.join(shown(row[name]) for name in columns)} |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "NO", None: "-"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(part)}" for name, part in value.items())
    return str(value)


def case(name: str, worst: float, allowed: float) -> Row:
    """A comparison: ``worst`` is how far off, in units that ``allowed`` bounds. Not a number is wrong."""
    return {"case": name, "off": worst, "allowed": allowed, "ok": worst <= allowed}


def summed_up(cases: list[Row], kind: str) -> list[Row]:
    """One row for all that are right, and each that is wrong."""
    wrong = [row for row in cases if not row["ok"]]
    nearest = max((row["off"] / row["allowed"] for row in cases if row["ok"]), default=0.0)
    return [
        {
            "compared": kind,
            "cases": len(cases),
            "right": len(cases) - len(wrong),
            "worst, of what is allowed": nearest,
            "ok": not wrong and bool(cases),
        },
        *wrong,
    ]
