"""Weights in int8 with a scale for each output; inputs nearly as they are, or in int8 as well (W8A8)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..layers.linear import Linear
from ..native import products
from .packed import ByteCodes, OnCall, Packed

log = logging.getLogger(__name__)

FEW_ROWS = 8
"""Up to here torch's weight-only op is faster than unpacking; it costs the same again for each row."""

AT_ONCE = 2048
"""Outputs that are rounded together: their fp32 copies stay small."""


@dataclass(frozen=True, slots=True)
class Int8(ByteCodes):
    """``weight[n, k] = codes[n, k] * scales[n]``: int8 [rows, columns] and float32 [rows].

    ``inputs`` True: a CPU multiplies in int8, each input row scaled by its largest number. Other devices
    multiply what is unpacked, which is nearer to the weights' meaning.
    """

    scales: Tensor
    inputs: bool = False

    @classmethod
    def nearest(cls, weight: Tensor, *, inputs: bool = False) -> Int8:
        """``weight`` [rows, columns] rounded, symmetric, -127 to 127."""
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty(len(weight), device=weight.device)
        for first in range(0, len(weight), AT_ONCE):
            some = slice(first, first + AT_ONCE)
            wide = weight[some].float()
            scales[some] = wide.abs().amax(1).clamp_min_(torch.finfo(torch.float32).tiny).div_(127)
            codes[some] = (wide / scales[some, None]).round_()
        return cls(codes, scales, inputs)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.codes.float().mul_(self.scales[:, None]).to(dtype)

    def part(self, first: int, end: int) -> Int8:
        return replace(self, codes=self.codes[first:end], scales=self.scales[first:end])

    def beside(self, others: Sequence[Packed]) -> Int8 | None:
        every = [self, *(each for each in others if isinstance(each, Int8) and each.inputs == self.inputs)]
        if len(every) <= len(others):
            return None
        codes, scales = torch.cat([each.codes for each in every]), torch.cat([each.scales for each in every])
        return Int8(codes, scales, self.inputs)

    def linear(self, dtype: torch.dtype, bias: Tensor | None) -> Linear:
        ours = products.in_use()
        # In two parts, inputs are as good as in bf16. Not as in float32.
        known = (torch.bfloat16, torch.float32) if self.inputs else (torch.bfloat16,)
        if ours is not None and ours.int8_ways and dtype in known:
            return products.Int8(ours, self.codes, self.scales, bias, parts=1 if self.inputs else 2)
        if self.device.type == "cpu" and self.inputs and w8a8_works():
            return W8A8(self, bias)
        if self.device.type == "cpu" and weight_only_works(dtype):
            return WeightOnly(self, dtype, bias)
        return OnCall(self, dtype, bias)


class W8A8:
    """oneDNN's int8 layer. Each row is scaled by itself, so that a request does not see its neighbours."""

    def __init__(self, packed: Int8, bias: Tensor | None) -> None:
        self._weight = _prepacked(packed.codes)
        self._scales, self._bias = packed.scales, None if bias is None else bias.float()
        self._zeros = torch.zeros(len(packed.scales), dtype=torch.int32)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        most = wide.abs().amax(1, keepdim=True).clamp_min(1e-30)
        # Around 128 and without a sign: with signed inputs oneDNN falls back to a kernel 100 times slower.
        # 127 / most would be 127 times the reciprocal: other bits than our kernel's.
        codes = (wide * (torch.tensor(127.0) / most)).round_().add_(128).to(torch.uint8)
        y = _qlinear()(
            codes,
            1.0,
            128,
            self._weight,
            self._scales,
            self._zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        ).mul_(most / 127)
        return (y if self._bias is None else y.add_(self._bias)).to(x.dtype)


class WeightOnly:
    """torch's int8 layer for few rows, which reads one byte a weight; unpacks for many."""

    def __init__(self, packed: Int8, dtype: torch.dtype, bias: Tensor | None) -> None:
        self._codes, self._scales, self._bias = packed.codes, packed.scales.to(dtype), bias
        self._many = OnCall(packed, dtype, bias)

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > FEW_ROWS:
            return self._many(x)
        y = _int8_op()(x.contiguous(), self._codes, self._scales)
        return y if self._bias is None else y.add_(self._bias)


@functools.cache
def w8a8_works() -> bool:
    """Try the op on known numbers, at row counts that take different kernels."""
    return all(_agrees(W8A8(_known(True), None), rows, torch.float32, 0.02) for rows in (1, 5, 64))


@functools.cache
def weight_only_works(dtype: torch.dtype) -> bool:
    """Try the op on known numbers."""
    tolerance = 4 * torch.finfo(dtype).eps
    return all(
        _agrees(WeightOnly(_known(False), dtype, None), rows, dtype, tolerance) for rows in (1, FEW_ROWS)
    )


def _known(inputs: bool) -> Int8:
    generator = torch.Generator().manual_seed(0)
    return Int8.nearest(torch.randn(48, 64, generator=generator), inputs=inputs)


def _agrees(layer: Linear, rows: int, dtype: torch.dtype, tolerance: float) -> bool:
    """Whether ``layer`` over ``_known`` is off by at most ``tolerance`` of what a row could add up to."""
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).to(dtype)
    weight = _known(False).dense(torch.float32)
    try:
        off = (layer(x).float() - x.float() @ weight.T).abs()
        limit = tolerance * (x.float().abs() @ weight.abs().T)
        if not bool((off <= limit + 1e-5).all()):
            raise RuntimeError(f"{rows} rows: off by {off.max().item():g}")
    except (RuntimeError, AttributeError, TypeError) as exc:
        extra = {"layer": type(layer).__name__, "dtype": str(dtype), "reason": str(exc)[:200]}
        log.warning("linear.int8_unavailable", extra=extra)
        return False
    return True


def _prepacked(codes: Tensor) -> Tensor:
    return torch.ops.onednn.qlinear_prepack(codes, None)  # pyright: ignore


@functools.cache
def _qlinear() -> Any:
    return torch.ops.onednn.qlinear_pointwise  # pyright: ignore


@functools.cache
def _int8_op() -> Any:
    return torch.ops.aten._weight_int8pack_mm.default  # pyright: ignore
