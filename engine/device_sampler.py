"""DeviceSampler: tokens drawn on the device, so that nobody has to wait for them before the next step.

For rows whose token follows from their logits and their noise alone. What it draws is what ``Sampler`` draws.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .batch import tensor
from .noise import GOLDEN64, M64
from .sampler import best_few
from .sequence import Row
from .torch_noise import gumbel, noise_bits

NOT_NUMBERS = -2
"""In place of a token: the row's logits are not numbers."""
UNSETTLED = -3
"""In place of a token: the filters leave more than was looked at, and somebody has to look again."""
WIDTH = 1024
"""How many of the best tokens of a row with filters are looked at."""
ROWS = 16
"""Rows of full-vocabulary noise made at once: bounds memory."""


class Ids:
    """Token ids on their way to the host."""

    def __init__(self, ids: Tensor) -> None:
        """ids: [n] int64 on the device; NOT_NUMBERS or UNSETTLED for none."""
        self.ids = ids
        self._host, self._event = ids, None
        if ids.is_cuda:
            self._host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
            self._host.copy_(ids, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> list[int | None]:
        """The tokens, None for rows whose logits are not numbers, or UNSETTLED. Waits for the step that draws
        them, and for nothing that was launched behind it."""
        if self._event is not None:
            self._event.synchronize()
        ids: list[int] = self._host.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        return [None if token == NOT_NUMBERS else token for token in ids]


class DeviceSampler:
    """Greedy rows take the largest logit, ties the lowest id; others the largest logit over temperature, plus
    noise. Where filters leave more than the best ``WIDTH`` tokens, or nobody can tell, it says UNSETTLED."""

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
        free = [row for row in noisy if not rows[row].request.filtered]
        cuts = [free[start : start + ROWS] for start in range(0, len(free), ROWS)]
        filtered = [row for row in noisy if rows[row].request.filtered]
        for some in [*cuts, filtered] if filtered else cuts:
            at = tensor(np.array(some, np.int64), self.device)
            draw = self._filtered if some is filtered else self._free
            ids.index_copy_(0, at, draw(logits[at], [rows[row] for row in some]))
        return Ids(torch.where(best.isfinite(), ids, NOT_NUMBERS))

    def _free(self, logits: Tensor, rows: Rows[Row]) -> Tensor:
        """logits: [n, vocab]. All in float64, as the definition has it."""
        scaled = logits.double() / self._column([one.request.temperature for one in rows])
        return scaled.add_(gumbel(noise_bits(self._tokens, self._keys(rows)))).argmax(1)

    def _filtered(self, logits: Tensor, rows: Rows[Row]) -> Tensor:
        """What ``sampler._filter`` does at one width, without a look at what comes of it."""
        vocab, requests = logits.shape[1], [one.request for one in rows]
        temperature = self._column([one.temperature for one in requests])
        top_p, min_p = (self._column([getattr(r, name) for r in requests]) for name in ("top_p", "min_p"))
        top_k = self._column([float(one.top_k) for one in requests])
        limited = (top_k > 0) & (top_k < vocab)
        values, ids = best_few(logits, min(WIDTH, vocab))
        scaled, width = values.double() / temperature, values.shape[1]
        keep = ~limited | (self._tokens[:width] < top_k)
        mass = (scaled - scaled[:, :1]).exp() * keep
        total = mass.sum(1, keepdim=True)
        if width < vocab:
            wide = logits.float()
            rest = (wide - wide.amax(1, keepdim=True)).div_(temperature.float()).exp_()
            total = torch.where(limited, total, rest.sum(1, keepdim=True, dtype=torch.float64))
        keep &= (top_p >= 1.0) | (mass.cumsum(1) - mass < top_p * total)
        keep &= scaled >= scaled[:, :1] + min_p.log()
        noise = gumbel(noise_bits(ids.int(), self._keys(rows)))
        column = (scaled + noise).masked_fill_(~keep, -math.inf).argmax(1, keepdim=True)
        drawn = ids.gather(1, column)[:, 0]
        if width == vocab:
            return drawn
        last_kept = values.masked_fill(~keep, math.inf).amin(1)  # an equal one outside may rank before it
        return torch.where(~keep[:, -1] & (last_kept > values[:, -1]), drawn, UNSETTLED)

    def _column(self, numbers: list[float]) -> Tensor:
        """[n, 1] float64."""
        bits = np.array(numbers, np.float64).view(np.int64)
        return tensor(bits, self.device).view(torch.float64)[:, None]

    def _keys(self, rows: Rows[Row]) -> Tensor:
        return tensor(noise_keys(rows).view(np.int32), self.device)


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
