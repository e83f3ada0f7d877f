"""How quantized weights are written: what is stored for one weight, and what config.json says of them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..quant.fp8 import LARGEST

Parts = Mapping[str, Tensor]
"""What is stored for a weight, by suffix of the module's name."""


class Layout(Protocol):
    """A standard way of storing quantized weights."""

    def quantization(self, plain: Sequence[str]) -> dict[str, Any]:
        """``quantization_config``; ``plain``: linears of the model that are not quantized."""
        ...

    def parts(self, weight: Tensor) -> Parts:
        """Of a float32 weight [rows, columns]."""
        ...


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
