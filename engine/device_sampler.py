"""DeviceSampler: tokens drawn on the device, so that nobody has to wait for them before the next step.

For rows whose token follows from their logits and their noise alone. What it draws is what ``Sampler`` draws.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch import tensor
from .noise import GOLDEN64, M64
from .sequence import Row
from .torch_noise import gumbel, noise_bits

NOT_NUMBERS = -2
"""In place of a token: the row's logits are not numbers."""
ROWS = 16
"""Rows of full-vocabulary noise made at once: bounds memory."""


class Ids:
    """Token ids on their way to the host."""

    def __init__(self, ids: Tensor) -> None:
        """ids: [n] int64 on the device; NOT_NUMBERS for none."""
        self.ids = ids
        self._host, self._event = ids, None
        if ids.is_cuda:
            self._host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
            self._host.copy_(ids, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[int | None]:
        """The tokens, None for rows whose logits are not numbers. Waits for the step that draws them, and for
        nothing that was launched behind it."""
        if self._event is not None:
            self._event.synchronize()
        ids: list[int] = self._host.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return [None if token < 0 else token for token in ids]


class DeviceSampler:
    """Greedy rows take the largest logit, ties the lowest id; others the largest logit over temperature, plus
    noise."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self._tokens = torch.arange(vocab_size, dtype=torch.int32, device=device)

    @torch.inference_mode()
    def draw(self, logits: Tensor, rows: Rows[Row]) -> Ids:
        """logits: [rows, vocab]; not written to. One row for each of ``rows``, each of which is ``plain``."""
        if not rows:
            return Ids(torch.empty(0, dtype=torch.int64, device=self.device))
        ids, best = logits.argmax(1), logits.amax(1)
        noisy = [row for row, one in enumerate(rows) if not one.request.greedy]
        for start in range(0, len(noisy), ROWS):
            some = noisy[start : start + ROWS]
            at = tensor(np.array(some, np.int64), self.device)
            ids.index_copy_(0, at, self._noisy(logits[at], [rows[row] for row in some]))
        return Ids(torch.where(best.isfinite(), ids, NOT_NUMBERS))

    def _noisy(self, logits: Tensor, rows: Rows[Row]) -> Tensor:
        """logits: [n, vocab]. All in float64, as the definition has it."""
        temperature = np.array([one.request.temperature for one in rows], np.float64)
        keys = tensor(noise_keys(rows).view(np.int32).astype(np.int64), self.device).int()
        scaled = (
            logits.double() / tensor(temperature.view(np.int64), self.device).view(torch.float64)[:, None]
        )
        return scaled.add_(gumbel(noise_bits(self._tokens, keys))).argmax(1)


def noise_keys(rows: Rows[Row]) -> NDArray[np.uint32]:
    """``noise.noise_key`` of each row: [n, 2]."""
    seeds = np.array([one.request.seed for one in rows], np.uint64)
    places = np.array([one.request.choice << 32 | one.output_len for one in rows], np.uint64)
    keys = _mix64(_mix64(seeds + np.uint64(GOLDEN64)) ^ places)
    return np.stack([keys & np.uint64(0xFFFFFFFF), keys >> np.uint64(32)], 1).astype(np.uint32)


def _mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """As in ``noise.py``; products wrap."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9 & M64)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB & M64)
    return x ^ (x >> np.uint64(31))
