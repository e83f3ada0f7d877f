"""How quantized weights are written: what is stored for one weight, and what config.json says of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..quant.awq import COLUMN_OF_NIBBLE
from ..quant.fp8 import LARGEST

Parts = Mapping[str, Tensor]
"""What is stored for a weight, by suffix of the module's name."""

NIBBLES = 8
"""Of a word; the rows of an AWQ weight are multiples of this."""
AWQ_CODES = 15


class Layout(Protocol):
    """A standard way of storing quantized weights."""

    def quantization(self, plain: Sequence[str]) -> dict[str, Any]:
        """``quantization_config``; ``plain``: linears of the model that are not quantized."""
        ...

    def parts(self, weight: Tensor) -> Parts:
        """Of a float32 weight [rows, columns]."""
        ...


@dataclass(frozen=True, slots=True)
class Rounded:
    """A weight in four bits: ``(codes - zeros) * scales``, scales as float16 has them.

    codes: float32 [rows, groups, group], whole numbers 0 to 15; scales, zeros: float32 [rows, groups, 1].
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def nearest(cls, weight: Tensor, group: int, share: Tensor | float = 1.0) -> Rounded:
        """Of [rows, columns]; a group reaches to its extremes, or a ``share`` [rows, groups, 1] of them."""
        grouped = weight.view(len(weight), -1, group)
        low = grouped.amin(-1, keepdim=True).clamp_max(0) * share
        high = grouped.amax(-1, keepdim=True).clamp_min(0) * share
        # Not below float16's smallest normal number: with a subnormal scale codes would lose their meaning.
        smallest = torch.finfo(torch.float16).smallest_normal
        scales = ((high - low) / AWQ_CODES).clamp_min(smallest).half().float()
        zeros = (-low / scales).round_().clamp_(0, AWQ_CODES)
        codes = (grouped / scales).round_().add_(zeros).clamp_(0, AWQ_CODES)
        return cls(codes, scales, zeros)

    def dense(self) -> Tensor:
        """[rows, columns]."""
        return (self.codes - self.zeros).mul_(self.scales).flatten(1)


@dataclass(frozen=True, slots=True)
class AwqGemm:
    """AutoAWQ's ``gemm`` layout: words of eight outputs each, zeros likewise, scales in float16."""

    group: int

    def quantization(self, plain: Sequence[str]) -> dict[str, Any]:
        del plain  # who reads this layout leaves the output layer alone
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.group,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }

    def parts(self, weight: Tensor) -> Parts:
        return self.packed(Rounded.nearest(weight, self.group))

    def packed(self, rounded: Rounded) -> Parts:
        return {
            "qweight": _words(rounded.codes.flatten(1).T),
            "qzeros": _words(rounded.zeros[..., 0].T),
            "scales": rounded.scales[..., 0].T.half().contiguous(),
        }


def _words(codes: Tensor) -> Tensor:
    """[n, outputs] → int32 [n, outputs / 8], each word's outputs in AutoAWQ's order of nibbles."""
    fields = codes.to(torch.int32).view(len(codes), -1, NIBBLES)
    words = torch.zeros(fields.shape[:2], dtype=torch.int32, device=codes.device)
    for nibble, column in enumerate(COLUMN_OF_NIBBLE):
        words |= fields[..., column] << (4 * nibble)
    return words


@dataclass(frozen=True, slots=True)
class Int8Channels:
    """compressed-tensors' ``int-quantized`` W8A8: a scale for each output, inputs scaled as they come."""

    dtype: torch.dtype
    """Of the model: scales are stored in it."""

    def quantization(self, plain: Sequence[str]) -> dict[str, Any]:
        return _compressed("int-quantized", "int", plain)

    def parts(self, weight: Tensor) -> Parts:
        scales = _scales(weight, 127, self.dtype)
        codes = (weight / scales.float()).round_().clamp_(-127, 127)
        return {"weight": codes.to(torch.int8), "weight_scale": scales}


@dataclass(frozen=True, slots=True)
class Fp8Channels:
    """compressed-tensors' ``float-quantized`` W8A8: e4m3, otherwise as ``Int8Channels``."""

    dtype: torch.dtype

    def quantization(self, plain: Sequence[str]) -> dict[str, Any]:
        return _compressed("float-quantized", "float", plain)

    def parts(self, weight: Tensor) -> Parts:
        scales = _scales(weight, LARGEST, self.dtype)
        codes = (weight / scales.float()).clamp_(-LARGEST, LARGEST)
        return {"weight": codes.to(torch.float8_e4m3fn), "weight_scale": scales}


def _scales(weight: Tensor, largest: float, dtype: torch.dtype) -> Tensor:
    """[rows, 1], rounded before anything is divided by them."""
    scales = weight.abs().amax(1, keepdim=True) / largest
    return scales.clamp_min(torch.finfo(dtype).smallest_normal).to(dtype)


def _compressed(form: str, kind: str, plain: Sequence[str]) -> dict[str, Any]:
    def numbers(strategy: str, *, dynamic: bool) -> dict[str, Any]:
        return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": dynamic}

    group = {
        "targets": ["Linear"],
        "weights": numbers("channel", dynamic=False),
        "input_activations": numbers("token", dynamic=True),
        "output_activations": None,
        "format": form,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(plain),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
