"""torch's attention for steps that are described by a frame, and a recorder that records nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gristmill.engine.attention.torch_backend import TorchAttention
from gristmill.engine.batch import Batch
from torch import Tensor


class FramedTorchAttention(TorchAttention):
    """Reads the frame's memory anew in each step, as kernels in a CUDA graph do."""

    graphs = True

    def begin(self, batch: Batch) -> None:
        self._rows = batch.rows
        frame = batch.frame
        if frame is not None:
            contexts = frame.contexts.numpy()
            self._rows = n = int((contexts > 0).sum())
            assert (contexts[:n] > 0).all(), "padding before rows"
            assert (frame.slots[n:] == -1).all(), "padding that writes"
            batch = Batch(
                tokens=batch.tokens[:n],
                positions=frame.positions[:n],
                slots=frame.slots[:n],
                wanted=None,
                rows=n,
                first_row=np.arange(n, dtype=np.int32),
                counts=np.ones(n, np.int32),
                starts=contexts[:n] - 1,
                tables=frame.tables.numpy()[:n],
            )
        super().begin(batch)

    def attend(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        out = super().attend(layer, qkv[: self._rows].contiguous(), q_norm, k_norm)
        return torch.cat([out, out.new_zeros(len(qkv) - self._rows, out.shape[1])])


def rerun(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """In place of a CUDA graph: run the step again, into the same memory."""
    out = step()

    def replay() -> None:
        out.copy_(step())

    return replay, out
