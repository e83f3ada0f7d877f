"""Linear layers whose rows do not depend, to the last bit, on how many rows there are, or which.

A matrix library picks a kernel by the number of rows, and kernels add up in different orders. Here it is only
ever asked for row counts that were found to add up alike on this machine; other counts are cut and padded.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..native import products
from .linear import Linear

log = logging.getLogger(__name__)

COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Row counts that are tried. The smallest that is used pads single rows, the largest cuts long prefills."""
ALIGNED_BYTES = 64
MAX_TRIED = 2**23
"""Numbers that come out of one trial at most: an output layer over a vocabulary is cut finer."""

Make = Callable[[Tensor, Tensor | None], Linear]
"""A layer over a weight [out, in] and a bias."""


def invariant(make: Make, weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The layer that ``make`` makes, its rows independent of one another. On the CPU only."""
    assert weight.device.type == "cpu", weight.device
    layer = make(weight, bias)
    if isinstance(layer, products.Product):
        return layer  # its sums run in one order
    outputs, inputs = weight.shape
    counts = alike(make, outputs, inputs, weight.dtype, bias is not None)
    return RowInvariant(layer, outputs, counts)


class RowInvariant:
    """``inner``, asked only for row counts in ``counts``, which is sorted."""

    def __init__(self, inner: Linear, outputs: int, counts: Sequence[int]) -> None:
        self.inner, self.outputs, self.counts = inner, outputs, counts

    def __call__(self, x: Tensor) -> Tensor:
        rows, largest = len(x), self.counts[-1]
        if rows in self.counts:
            return self.inner(aligned(x))
        y = x.new_empty(rows, self.outputs)
        for at in range(0, rows, largest):
            part = x[at : at + largest]
            count = next(count for count in self.counts if count >= len(part))
            if count > len(part):
                part = torch.nn.functional.pad(part, (0, 0, 0, count - len(part)))
            y[at : at + largest] = self.inner(aligned(part))[: rows - at]
        return y


def aligned(x: Tensor) -> Tensor:
    """``x``, copied unless it begins where an allocation would: libraries treat the edges apart."""
    return x if x.data_ptr() % ALIGNED_BYTES == 0 else x.clone()


@functools.cache
def alike(make: Make, outputs: int, inputs: int, dtype: torch.dtype, bias: bool) -> tuple[int, ...]:
    """The largest set of row counts that give every row the same bits, for layers of this shape.

    The numbers it is tried with cancel: a row's exact results are all zero, and what comes out is nothing but
    the rounding errors of the order in which the kernel adds up, at full precision in any dtype.
    """
    counts = [count for count in COUNTS if count <= 64 or count * outputs <= MAX_TRIED]
    x, weight = _cancelling(outputs, inputs, counts[-1], dtype)
    layer = make(weight, torch.zeros(outputs, dtype=dtype) if bias else None)
    families: list[tuple[Tensor, list[int]]] = []
    for count in counts:
        whole = len(x) - len(x) % count
        said = torch.cat([layer(x[at : at + count]) for at in range(0, whole, count)])
        for first, family in families:
            both = min(len(first), len(said))
            if torch.equal(first[:both], said[:both]):
                family.append(count)
                break
        else:
            families.append((said, [count]))
    best = max((family for _, family in families), key=lambda family: (len(family), family[-1]))
    log.info("linear.invariant", extra={"outputs": outputs, "inputs": inputs, "rows": best})
    return tuple(best)


def _cancelling(outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and weight: each product in a row's sums is there once more with the other sign, somewhere else."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(inputs, generator=generator)
    half = inputs // 2
    values = torch.randn(rows, half, generator=generator).to(dtype)
    factors = torch.randn(outputs, half, generator=generator).to(dtype)
    odd = inputs - 2 * half  # a column of zeros where the number of inputs is odd
    x = torch.cat((values, values, values.new_zeros(rows, odd)), 1)
    weight = torch.cat((factors, -factors, factors.new_zeros(outputs, odd)), 1)
    return x[:, order], weight[:, order]
