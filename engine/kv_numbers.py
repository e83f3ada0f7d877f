"""Keys and values in fewer bits: a byte for each number, and one float32 scale for each token and head.

Each token's are made from that token's alone, so that they are the same however a prompt was cut, whoever
else was in the batch, and whether they were computed, found in the prefix cache or swapped in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .settings import KVDType

SMALLEST = 1e-30
"""A head's largest magnitude counts as at least this much: zeros have a scale, too."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """x is kept as x / scale, rounded to ``dtype`` to nearest even; scale is the head's max |x| / ``top``."""

    name: str
    dtype: torch.dtype
    top: float
    kernel: int
    """What the native kernel calls them (native/kv_bytes.h)."""


INT8 = Numbers("int8", torch.int8, 127.0, 1)
FP8 = Numbers("fp8", torch.float8_e4m3fn, 448.0, 2)


def numbers_of(name: KVDType) -> Numbers | None:
    """None: the numbers the model computes with."""
    if name == "auto":
        return None
    return INT8 if name == "int8" else FP8


def quantize(x: Tensor, numbers: Numbers) -> tuple[Tensor, Tensor]:
    """x: [..., head_dim]. Returns numbers of that shape and float32 scales [...]."""
    wide = x.float()
    scales = wide.abs().amax(-1).clamp_min(SMALLEST) * (1 / numbers.top)
    scaled = (wide / scales.unsqueeze(-1)).clamp(-numbers.top, numbers.top)
    if numbers.dtype == torch.int8:
        scaled = scaled.round()
    return scaled.to(numbers.dtype), scales


def dequantize(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The reverse of ``quantize``, but for what rounding lost."""
    return (x.float() * scales.unsqueeze(-1)).to(dtype)
