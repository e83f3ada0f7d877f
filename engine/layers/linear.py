"""Linear layers: our matrix products where the CPU has the instructions, oneDNN with a weight packed once
where that works, plain ``F.linear`` elsewhere."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..native import products

log = logging.getLogger(__name__)

Linear = Callable[[Tensor], Tensor]
"""[rows, in] → [rows, out], in the dtype of the weight."""

ROWS_HINT = 16
"""Batch size that oneDNN chooses the weight's block layout for."""


def linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A layer over ``weight`` [out, in]. A CPU copies it into a layout of its own: drop your reference."""
    ours = products.in_use()
    if ours is not None and ours.bf16_ways and weight.dtype == torch.bfloat16:
        return products.Dense(ours, weight, bias)
    if weight.device.type == "cpu" and packing_works(weight.dtype):
        return _Packed(weight, bias)
    return _Plain(weight, bias)


def unpacked(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """A layer over ``weight`` as it is: for weights that come and go, and whose bytes are counted."""
    return _Plain(weight, bias)


class _Plain:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return nnf.linear(x, self.weight, self.bias)


class _Packed:
    """Twice as fast as nnf.linear at decode sizes: no repacking of the weight on every call."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = _reorder(weight), bias

    def __call__(self, x: Tensor) -> Tensor:
        return _packed_op()(x, self.weight, self.bias, "none", [], "")


@functools.cache
def packing_works(dtype: torch.dtype) -> bool:
    """Try the ops on known numbers; a torch that lacks or changed them gets F.linear, and a log line."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    try:
        packed, plain = _Packed(weight, bias), _Plain(weight.float(), bias.float())
        for rows in (1, 5, 64):
            x = torch.randn(rows, 32, generator=generator).to(dtype)
            exact = plain(x.float())
            # One rounding of the result: 2^-8 of it in bf16, 2^-11 in fp16, next to nothing in fp32.
            off = (packed(x).float() - exact).abs() - 4 * torch.finfo(dtype).eps * exact.abs()
            if not bool((off <= 1e-4).all()):  # torch.testing would import sympy first: a second of start-up
                raise RuntimeError(f"{rows} rows: off by {off.max().item():g} more than rounding")
    except (RuntimeError, AttributeError, TypeError) as exc:
        log.warning("linear.packing_unavailable", extra={"dtype": str(dtype), "reason": str(exc)[:200]})
        return False
    return True


@functools.cache
def _packed_op() -> Any:
    return torch.ops.mkldnn._linear_pointwise.default  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType, reportPrivateUsage]


def _reorder(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType, reportPrivateUsage]
