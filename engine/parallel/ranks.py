"""What the ranks of one model say to one another in a step, over torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as nnf
from torch import Tensor

from ..layers.across import ALONE, Across
from .messages import Told
from .shard import Shard

TIMEOUT = timedelta(minutes=30)
"""Of one exchange. A rank that is gone is noticed by its link, long before; this bounds a slow start."""


class Ranks(Protocol):
    """One rank's view of all: who it is, how it reaches the others, and, at rank 0, how it leads them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def least(self, value: int) -> int:
        """The smallest that any rank gives; each gives one."""
        ...

    def total(self, value: int) -> int:
        """The sum of what the ranks give; each gives one."""
        ...

    def across(self, shard: Shard) -> Across:
        """How layers of these parts are put together."""
        ...

    def tell(self, message: Told) -> None:
        """From rank 0 to the others, who do these things in the order in which they are told. Any thread."""
        ...


class OneRank:
    """The usual: a model on one device."""

    rank, size = 0, 1

    def least(self, value: int) -> int:
        return value

    def total(self, value: int) -> int:
        return value

    def across(self, shard: Shard) -> Across:
        assert shard.size == 1, f"one of {shard.size} parts, and nobody else"
        return ALONE

    def tell(self, message: Told) -> None:
        """Nobody listens."""


ONE_RANK = OneRank()


def meet(rank: int, size: int, place: str, *, cuda: bool) -> Any:
    """This rank's end of a process group of ``size``; waits until all have come to the file ``place``."""
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.FileStore(place, size),  # pyright: ignore[reportPrivateImportUsage]  (documented)
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
    )
    return dist.group.WORLD


class Group:
    """Ranks that each have a process group's end."""

    def __init__(self, rank: int, size: int, ends: Any, tell: Callable[[Told], None]) -> None:
        """``ends``: a ProcessGroup of torch, or a backend of one."""
        self.rank, self.size, self._ends, self._tell = rank, size, ends, tell

    def least(self, value: int) -> int:
        return self._reduced(value, dist.ReduceOp.MIN)

    def total(self, value: int) -> int:
        return self._reduced(value, dist.ReduceOp.SUM)

    def across(self, shard: Shard) -> Across:
        return Parts(self._ends, shard)

    def tell(self, message: Told) -> None:
        self._tell(message)

    def _reduced(self, value: int, operation: Any) -> int:
        options = dist.AllreduceOptions()
        options.reduceOp = operation
        number = torch.tensor([value])
        self._ends.allreduce([number], options).wait()
        return int(number)


class Parts:
    """``Across`` for layers that are cut as ``shard`` says."""

    alone = False

    def __init__(self, ends: Any, shard: Shard) -> None:
        self._ends, self._shard = ends, shard
        self._first = shard.vocab[shard.rank].start
        self._widest = max(len(part) for part in shard.vocab)
        self._at_root = dist.GatherOptions()
        self._at_root.rootRank = 0

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        local = tokens - self._first
        mine = (local >= 0) & (local < len(weight))
        x = nnf.embedding(local.clamp(0, len(weight) - 1), weight)
        return self.total(x.masked_fill_(~mine[:, None], 0))  # a sum of one number and zeros: exact

    def total(self, x: Tensor) -> Tensor:
        if len(x):
            self._ends.allreduce([x]).wait()
        return x

    def mean(self, x: Tensor) -> Tensor:
        sums = x.float().sum(-1, keepdim=True)
        both = self.total(torch.cat((sums, torch.full_like(sums, x.shape[-1])), -1))
        return both[:, :1] / both[:, 1:]

    def joined(self, logits: Tensor) -> Tensor:
        rows, mine = logits.shape
        if not rows:
            return logits.new_empty(0, self._shard.whole.vocab_size)
        padded = nnf.pad(logits, (0, self._widest - mine)).contiguous()
        at_root = self._shard.rank == 0
        found = [torch.empty_like(padded) for _ in self._shard.vocab] if at_root else []
        self._ends.gather([found] if at_root else [], [padded], self._at_root).wait()
        if not at_root:
            return logits
        return torch.cat([part[:, : len(cut)] for part, cut in zip(found, self._shard.vocab, strict=True)], 1)
