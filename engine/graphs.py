"""Graphs: the launches of a step of decodes, recorded once for a size of batch, replayed as one."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .batch import Arrays, Batch, Coming, Frame, Piece, tensor
from .memory import is_out_of_memory

log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, *range(16, 256, 16), *range(256, 513, 32))
"""Sizes of batches that are recorded: a step takes the next larger one, and what is more than needed is
padding. Above the last, launches are hidden behind the work."""
SHORTEST = 512
"""Keys of the longest sequence: recorded for this and its doubles, since kernels are launched for as many."""
MOST_GRAPHS = 128
"""Each takes some memory, and a moment when it is recorded."""

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""Takes a step, gives what runs it again and where its outcome is then."""


@dataclass(slots=True)
class _Size:
    """What is kept for batches of up to so many rows and keys."""

    frame: Frame
    tokens: Tensor
    """[rows] int64."""
    replay: Callable[[], None] | None = None
    hidden: Tensor | None = None
    """[rows, hidden]: what the last replay gave."""
    used: bool = False
    """It has run once: its kernels are compiled."""


class Graphs:
    """Runs steps in which every sequence is fed one token; says None to others.

    The first step of a size is run as it is, the second is recorded: a size that a batch only passes through
    is not worth it. Should recording fail, everything goes on without.
    """

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        *,
        rows: int,
        longest: int,
        block_size: int,
        device: torch.device,
        record: Record | None = None,
    ) -> None:
        """``forward``: hidden states of all rows. ``rows``, ``longest``: the most there will be."""
        self._forward, self._block_size, self._device = forward, block_size, device
        self._rows = [*(size for size in ROWS if size < rows), *([rows] if rows <= ROWS[-1] else [])]
        self._longest = longest
        self._record: Record | None = record or CudaGraphs()
        self._sizes: dict[tuple[int, int], _Size] = {}

    @property
    def recorded(self) -> int:
        """So many sizes are replayed by now."""
        return sum(size.replay is not None for size in self._sizes.values())

    def run(self, arrays: Arrays, coming: Coming | None, work: Sequence[Piece]) -> Tensor | None:
        """Hidden states [rows, hidden], valid until the next call. None: this step has to run otherwise."""
        if self._record is None or arrays.wanted is not None or len(arrays.tokens) != len(arrays.counts):
            return None
        size = self._size(len(arrays.counts), int(arrays.starts.max()) + 1)
        if size is None:
            return None
        n = len(arrays.tokens)
        size.frame.fill(arrays)
        size.tokens[:n].copy_(tensor(arrays.tokens, self._device))
        if coming is not None:
            coming.put(size.tokens, work)
        if size.replay is None and (not size.used or not self._try_to_record(size)):
            size.used = True
            return self._step(size)[:n]
        assert size.replay is not None
        assert size.hidden is not None
        size.replay()
        return size.hidden[:n]

    def _size(self, rows: int, keys: int) -> _Size | None:
        """The smallest that fits. None: there is none, or too many are kept already."""
        at = bisect_left(self._rows, rows)
        if at == len(self._rows):
            return None
        longest = SHORTEST
        while longest < keys:
            longest *= 2
        key = self._rows[at], min(longest, self._longest)
        if key not in self._sizes:
            if len(self._sizes) >= MOST_GRAPHS:
                return None
            frame = Frame.allocate(*key, self._block_size, self._device)
            self._sizes[key] = _Size(frame, torch.zeros(key[0], dtype=torch.int64, device=self._device))
        return self._sizes[key]

    def _step(self, size: _Size) -> Tensor:
        return self._forward(size.frame.step(size.tokens))

    def _try_to_record(self, size: _Size) -> bool:
        assert self._record is not None
        try:
            size.replay, size.hidden = self._record(lambda: self._step(size))
        except Exception as exc:
            if not isinstance(exc, RuntimeError) and not is_out_of_memory(exc):
                raise
            # Some operation cannot be recorded, or there is no memory for it.
            log.warning("graphs.unavailable", extra={"reason": str(exc)[:200], "recorded": self.recorded})
            self._record = None
            return False
        log.info("graphs.recorded", extra={"rows": size.frame.rows, "keys": size.frame.longest})
        return True


class CudaGraphs:
    """Records with CUDA graphs, all in one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads (adapters being read) may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = step()
        return graph.replay, hidden
