"""Which rows of a step belong to which adapter."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from ..batch import Piece
from ..layers.linear import Linear
from ..models.layout import Joined
from .adapter import Adapter


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows ``first : end`` of the packed step use this adapter."""

    first: int
    end: int
    adapter: Adapter


class Adapted(NamedTuple):
    """The adapters' rows among all rows of a step, and among those whose logits are wanted."""

    fed: tuple[Rows, ...] = ()
    wanted: tuple[Rows, ...] = ()


def adapted(work: Sequence[Piece], adapters: Mapping[str, Adapter], also: Sequence[int] = ()) -> Adapted:
    """Runs of neighbours with the same adapter: slices instead of gathers, and few if ``work`` is grouped.

    ``also``: rows of the step, ascending, whose logits are wanted, too, behind those of the last tokens.
    """
    fed: list[Rows] = []
    wanted: list[Rows] = []
    row = wanted_row = 0
    for name, pieces in groupby(work, key=lambda piece: piece.seq.adapter):
        end, wanted_end = row, wanted_row
        for piece in pieces:
            end += piece.count
            wanted_end += piece.seq.computed + piece.count == piece.seq.length + len(piece.guesses)
        if name is not None:
            fed.append(Rows(row, end, adapters[name]))
            if wanted_end > wanted_row:
                wanted.append(Rows(wanted_row, wanted_end, adapters[name]))
        row, wanted_row = end, wanted_end
    for part in fed if also else ():
        first, end = bisect_left(also, part.first), bisect_left(also, part.end)
        if first < end:
            wanted.append(Rows(wanted_row + first, wanted_row + end, part.adapter))
    return Adapted(tuple(fed), tuple(wanted))


def project(linear: Linear, x: Tensor, rows: Sequence[Rows], layer: int, name: Joined) -> Tensor:
    """``linear(x)``, and for rows with an adapter what that adds. Nothing but ``linear`` where none has."""
    y = linear(x)
    for part in rows:
        part.adapter.add(layer, name, x[part.first : part.end], y[part.first : part.end])
    return y
