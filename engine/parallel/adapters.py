"""An adapter's matrices as one rank needs them: cut as the linears are that they add to."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.layout import Joined
from .shard import Shard


def narrow(shard: Shard, linear: Joined, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """``down`` [ranks, columns] and ``up`` [rows, ranks] of the whole linear → this rank's.

    Where inputs are cut, what ranks add to their parts of the output adds up to what one would.
    """
    cut = shard.linears.get(linear)
    if cut is None:
        return down, up
    places = torch.cat([torch.arange(run.start, run.stop) for run in cut.runs])
    return (down, up[places]) if cut.side == "rows" else (down[:, places], up)
