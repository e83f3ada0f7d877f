"""Charts of what ``bench_scale`` measured: SVG, quartiles as a band."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

WIDE = 10
"""Costs that differ by more than this are shown by a logarithmic axis, the others from 0 on."""


@dataclass(frozen=True)
class Chart:
    """What is written on it."""

    title: str
    grows: str
    costs: str


class Point(Protocol):
    """One measurement: the middle and the quartiles."""

    @property
    def at(self) -> int: ...
    @property
    def low(self) -> float: ...
    @property
    def median(self) -> float: ...
    @property
    def high(self) -> float: ...


def draw(path: Path, chart: Chart, series: Mapping[str, Sequence[Point]]) -> None:
    """One line a series. Without charts nobody needs what draws them: hence imported here."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = chart.title  # the same points give the same file
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, points in series.items():
        at = [point.at for point in points]
        axes.plot(at, [point.median for point in points], marker="o", label=name)
        axes.fill_between(at, [point.low for point in points], [point.high for point in points], alpha=0.2)
    middles = [point.median for points in series.values() for point in points]
    if max(middles) > WIDE * min(middles):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xscale="log", title=chart.title, xlabel=chart.grows, ylabel=chart.costs)
    axes.set_xticks(at, [f"{one:,}" for one in at], rotation=30)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
