"""A step as bytes, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..batch import Arrays
from ..lora.adapter import Adapter
from ..lora.rows import Adapted, Rows
from .messages import Feed, Run


def told(arrays: Arrays, owners: Adapted, scored: int) -> Feed:
    """What the other ranks must know of a step."""
    return Feed(
        tokens=arrays.tokens.tobytes(),
        positions=arrays.positions.tobytes(),
        slots=arrays.slots.tobytes(),
        wanted=None if arrays.wanted is None else arrays.wanted.tobytes(),
        first_row=arrays.first_row.tobytes(),
        counts=arrays.counts.tobytes(),
        starts=arrays.starts.tobytes(),
        tables=arrays.tables.tobytes(),
        scored=scored,
        fed=_runs(owners.fed),
        wanted_rows=_runs(owners.wanted),
    )


def heard(feed: Feed, adapters: Mapping[str, Adapter]) -> tuple[Arrays, Adapted]:
    """The step that was told; ``adapters`` by digest."""
    counts = _numbers(feed.counts, np.int32)
    arrays = Arrays(
        tokens=_numbers(feed.tokens, np.int64),
        positions=_numbers(feed.positions, np.int64),
        slots=_numbers(feed.slots, np.int64),
        wanted=None if feed.wanted is None else _numbers(feed.wanted, np.int64),
        first_row=_numbers(feed.first_row, np.int32),
        counts=counts,
        starts=_numbers(feed.starts, np.int32),
        tables=_numbers(feed.tables, np.int32).reshape(len(counts), -1),
    )
    return arrays, Adapted(_rows(feed.fed, adapters), _rows(feed.wanted_rows, adapters))


def _runs(rows: Sequence[Rows]) -> list[Run]:
    return [Run(part.first, part.end, part.adapter.digest) for part in rows]


def _rows(runs: Sequence[Run], adapters: Mapping[str, Adapter]) -> tuple[Rows, ...]:
    return tuple(Rows(run.first, run.end, adapters[run.digest]) for run in runs)


def _numbers(data: bytes, kind: type[Any]) -> NDArray[Any]:
    return np.frombuffer(bytearray(data), kind)  # bytes would make an array, and tensors, that are read only
