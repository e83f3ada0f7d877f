"""Weights of four bits that look up one of sixteen values, scaled block by block: NF4 and FP4."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layers.linear import Linear
from .packed import OnCall, Packed

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""Quantiles of a normal distribution (Dettmers et al. 2023, appendix E)."""
_FP4 = (0.0, 0.0625 / 12, 8 / 12, 12 / 12, 4 / 12, 6 / 12, 2 / 12, 3 / 12)
"""Two bits of exponent, one of mantissa, over the largest, 12; the second is as bitsandbytes has it."""
FP4 = (*_FP4, *(-value for value in _FP4))
VALUES = {"nf4": NF4, "fp4": FP4}
BLOCK = 64
"""Weights that share a scale when we quantize."""


@dataclass(frozen=True, slots=True)
class Codebook:
    """``weight[n, k] = values[code[n, k]] * scales[n, k // block]``.

    codes: uint8 [rows, columns / 2], the even column in the high nibble. values: float32 [16].
    scales: float32 [rows, blocks].
    """

    codes: Tensor
    scales: Tensor
    values: Tensor

    @classmethod
    def nearest(cls, weight: Tensor, kind: str) -> Codebook:
        """``weight`` [rows, columns] rounded to the nearest values; whole blocks of columns."""
        values = torch.tensor(VALUES[kind], device=weight.device)
        rows, columns = weight.shape
        blocks = weight.float().view(rows, -1, BLOCK)
        scales = blocks.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny)
        ranked, order = values.sort()
        between = (ranked[1:] + ranked[:-1]) / 2
        codes = (
            order[torch.bucketize(blocks / scales[..., None], between)].view(rows, columns).to(torch.uint8)
        )
        return cls((codes[:, 0::2] << 4) | codes[:, 1::2], scales, values)

    @property
    def shape(self) -> tuple[int, int]:
        rows, stored = self.codes.shape
        return rows, 2 * stored

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dense(self, dtype: torch.dtype) -> Tensor:
        rows, columns = self.shape
        # Both values of a byte are looked up at once, as the eight bytes of one integer.
        pairs = _pairs(self.values)
        wide = pairs.index_select(0, self.codes.flatten().int()).view(torch.float32)
        blocks = wide.view(rows, self.scales.shape[1], -1)
        return blocks.mul_(self.scales[..., None]).view(rows, columns).to(dtype)

    def part(self, first: int, end: int) -> Codebook:
        return replace(self, codes=self.codes[first:end], scales=self.scales[first:end])

    def beside(self, others: Sequence[Packed]) -> Codebook | None:
        every = [self, *(each for each in others if isinstance(each, Codebook) and self._like(each))]
        if len(every) <= len(others):
            return None
        codes, scales = torch.cat([each.codes for each in every]), torch.cat([each.scales for each in every])
        return Codebook(codes, scales, self.values)

    def _like(self, other: Codebook) -> bool:
        return self.scales.shape[1] == other.scales.shape[1] and torch.equal(self.values, other.values)

    def linear(self, dtype: torch.dtype, bias: Tensor | None) -> Linear:
        return OnCall(self, dtype, bias)


def _pairs(values: Tensor) -> Tensor:
    """int64 [256]: the two float32 that each byte stands for, high nibble first."""
    byte = torch.arange(256, device=values.device)
    return torch.stack((values[byte >> 4], values[byte & 15]), -1).view(torch.int64).flatten()
