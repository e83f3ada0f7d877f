"""Codes of 2 to 8 bits with a scale and a zero for each group of columns: AWQ, GPTQ and their kind."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..layers.linear import Linear
from ..models.config import Config
from .packed import OnCall, Packed

log = logging.getLogger(__name__)

INT4_GROUPS = (32, 64, 128, 256)
INT4_ROWS, INT4_COLUMNS = 16, 32
"""What torch's int4 layer for CPUs takes: group sizes, and what rows and columns must be multiples of."""


@dataclass(frozen=True, slots=True)
class Grouped:
    """``weight[n, k] = (code[n, k] - zero[n, k // group]) * scale[n, k // group]``, columns in ``order``.

    codes: uint8, [rows, columns / 2] with the even column in the low nibble when ``bits`` is 4 or less, else
    [rows, columns]. scales, zeros: float32 [rows, groups]. ``order``: column ``k`` of the codes belongs to
    input ``order[k]`` (None: to input k).
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor
    order: Tensor | None = None

    @classmethod
    def of(
        cls, bits: int, codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor | None = None
    ) -> Grouped:
        """From unpacked ``codes`` [rows, columns]: integers from 0 to 2^bits - 1 of any type."""
        small = codes.to(torch.uint8)
        if bits <= 4:
            small = small[:, 0::2] | (small[:, 1::2] << 4)
        return cls(bits, small.contiguous(), scales.float().contiguous(), zeros.float().contiguous(), order)

    @property
    def shape(self) -> tuple[int, int]:
        rows, stored = self.codes.shape
        return rows, stored * 2 if self.bits <= 4 else stored

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    def unpacked(self) -> Tensor:
        """Codes, uint8 [rows, columns]."""
        if self.bits > 4:
            return self.codes
        return torch.stack((self.codes & 15, self.codes >> 4), -1).view(self.shape)

    def in_order(self, dtype: torch.dtype) -> Tensor:
        """[rows, columns], the columns as the codes have them."""
        rows, columns = self.shape
        wide = self.unpacked().view(rows, -1, self.group).float()
        return wide.sub_(self.zeros[..., None]).mul_(self.scales[..., None]).view(rows, columns).to(dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        sorted_weight = self.in_order(dtype)
        if self.order is None:
            return sorted_weight
        weight = torch.empty_like(sorted_weight)
        weight[:, self.order] = sorted_weight
        return weight

    def part(self, first: int, end: int) -> Grouped:
        rows = slice(first, end)
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zeros=self.zeros[rows])

    def rows(self, order: Tensor) -> Grouped:
        """Row ``order[i]`` as row i; a copy."""
        return replace(self, codes=self.codes[order], scales=self.scales[order], zeros=self.zeros[order])

    def to(self, device: torch.device) -> Grouped:
        """The same on the device."""
        codes, scales, zeros = (each.to(device) for each in (self.codes, self.scales, self.zeros))
        return replace(self, codes=codes, scales=scales, zeros=zeros)

    def beside(self, others: Sequence[Packed]) -> Grouped | None:
        every = [self, *(other for other in others if isinstance(other, Grouped) and self._like(other))]
        if len(every) <= len(others):
            return None
        codes, scales, zeros = (
            torch.cat([getattr(each, name) for each in every]) for name in ("codes", "scales", "zeros")
        )
        return Grouped(self.bits, codes, scales, zeros, self.order)

    def _like(self, other: Grouped) -> bool:
        return (other.bits, other.group) == (self.bits, self.group) and _same(other.order, self.order)

    def linear(self, dtype: torch.dtype, bias: Tensor | None) -> Linear:
        in_order = replace(self, order=None)  # the input is put in order instead: rows of it are short
        layer = Int4(in_order, dtype, bias) if _int4_takes(self, dtype) else OnCall(in_order, dtype, bias)
        return layer if self.order is None else Ordered(layer, self.order)


class Ordered:
    """Puts the input's columns in the order that the weight's were sorted into."""

    def __init__(self, layer: Linear, order: Tensor) -> None:
        self._layer, self._order = layer, order

    def __call__(self, x: Tensor) -> Tensor:
        return self._layer(x.index_select(1, self._order))


class Int4:
    """torch's int4 layer for CPUs: reads half a byte a weight, which is what a step waits for at few rows.

    Measured (README.md) it also beats unpacking for as many rows as a prefill has.
    """

    def __init__(self, packed: Grouped, dtype: torch.dtype, bias: Tensor | None) -> None:
        self._weight = _int4_packed(packed.unpacked().int())
        # The op subtracts 8 from each code and adds the second number: (8 - zero) * scale.
        pairs = (packed.scales, (8 - packed.zeros) * packed.scales)
        self._scales = torch.stack(pairs, -1).transpose(0, 1).to(dtype).contiguous()
        self._group, self._bias = packed.group, bias

    def __call__(self, x: Tensor) -> Tensor:
        y = _int4_op()(x.contiguous(), self._weight, self._group, self._scales)
        return y if self._bias is None else y.add_(self._bias)


def _int4_takes(packed: Grouped, dtype: torch.dtype) -> bool:
    rows, columns = packed.shape
    return (
        packed.device.type == "cpu"
        and packed.bits <= 4
        and packed.group in INT4_GROUPS
        and rows % INT4_ROWS == 0
        and columns % INT4_COLUMNS == 0
        and int4_works(dtype)
    )


@functools.cache
def int4_works(dtype: torch.dtype) -> bool:
    """Try the op on known numbers; with a torch that lacks or changed it weights are unpacked instead."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (48, 64), generator=generator)
    scales = torch.rand(48, 2, generator=generator).to(dtype).float() + 0.5
    zeros = torch.randint(0, 16, (48, 2), generator=generator).float()
    packed = Grouped.of(4, codes, scales.to(dtype).float(), zeros)
    x = torch.randn(5, 64, generator=generator).to(dtype)
    try:
        exact = x.float() @ packed.dense(torch.float32).T
        off = (Int4(packed, dtype, None)(x).float() - exact).abs()
        limit = 4 * torch.finfo(dtype).eps * (x.float().abs() @ packed.dense(torch.float32).abs().T) + 1e-4
        if not bool((off <= limit).all()):
            raise RuntimeError(f"off by {off.max().item():g}")
    except (RuntimeError, AttributeError, TypeError) as exc:
        log.warning("linear.int4_unavailable", extra={"dtype": str(dtype), "reason": str(exc)[:200]})
        return False
    return True


def _int4_packed(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu.default(codes, 1)  # pyright: ignore


@functools.cache
def _int4_op() -> Any:
    return torch.ops.aten._weight_int4pack_mm_for_cpu.default  # pyright: ignore


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Fields of ``bits`` from int32 ``words`` [..., n], lowest bits first: int32 [..., count]."""
    at = torch.arange(count, device=words.device) * bits
    wide = words.to(torch.int64) & 0xFFFFFFFF
    nothing = wide.new_zeros((*wide.shape[:-1], 1))
    following = torch.cat((wide[..., 1:], nothing), -1)
    index = at // 32
    pairs = wide[..., index] | (following[..., index] << 32)
    return ((pairs >> (at % 32)) & ((1 << bits) - 1)).to(torch.int32)


def column_order(config: Config, name: str, g_idx: Tensor, groups: int) -> Tensor | None:
    """Columns sorted by their group; None: they are already. Raises unless groups are of one size."""
    columns = len(g_idx)
    size = columns // groups
    counts = torch.bincount(g_idx.clamp(-1, groups).long() + 1, minlength=groups + 2)
    inside, outside = counts[1:-1], int(counts[0] + counts[-1])
    if outside or bool((inside != size).any()):
        raise config.invalid(
            f"{name} puts {int(inside.min())} to {int(inside.max())} inputs into a group, "
            f"and {outside} into none of the {groups}; {size} in each are supported"
        )
    order = torch.argsort(g_idx.long(), stable=True)
    return None if torch.equal(order, torch.arange(columns, device=order.device)) else order
