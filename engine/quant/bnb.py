"""Checkpoints that bitsandbytes quantized: NF4 and FP4, with their scales quantized or not, and int8."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..models.config import Config
from ..weights import Stored
from .codebook import VALUES, Codebook
from .int8 import Int8
from .method import Method, Site, divided

U8, I8, F32 = frozenset({"U8"}), frozenset({"I8"}), frozenset({"F32"})
NESTED_VALUES = 256


def bitsandbytes(_model: Config, config: Config) -> Method:
    if config.boolean("load_in_4bit", False):
        return FourBits(config)
    if config.boolean("load_in_8bit", False):
        return EightBits()
    raise config.invalid("neither load_in_4bit nor load_in_8bit is true")


class FourBits:
    """Bytes of two codes each, high nibble first, in blocks along the rows; a JSON beside says more."""

    name = "bitsandbytes"
    marks = ("weight.absmax", "weight.quant_map")

    def __init__(self, config: Config) -> None:
        self._config = config
        self._kind = config.text("bnb_4bit_quant_type", "fp4")
        if self._kind not in VALUES:
            raise config.invalid(f"bnb_4bit_quant_type is {self._kind!r}; {', '.join(VALUES)} are supported")
        self._nested = config.boolean("bnb_4bit_use_double_quant", False)

    def tensors(self, site: Site) -> Mapping[str, Stored]:
        divided(self._config, site, inputs=2)
        nested = {
            "weight.nested_absmax": Stored(None, F32),
            "weight.nested_quant_map": Stored((NESTED_VALUES,), F32),
        }
        return {
            "weight": Stored((site.rows * site.columns // 2, 1), U8),
            "weight.absmax": Stored(None, U8 if self._nested else F32),
            "weight.quant_map": Stored((16,), F32),
            f"weight.quant_state.bitsandbytes__{self._kind}": Stored(None, U8),
            **(nested if self._nested else {}),
        }

    def read(self, site: Site, found: Mapping[str, Tensor]) -> Codebook:
        state = self._state(site, found[f"weight.quant_state.bitsandbytes__{self._kind}"])
        block = state.integer("blocksize")
        divided(self._config, site, inputs=block)
        scales, blocks = found["weight.absmax"], site.rows * site.columns // block
        if scales.numel() != blocks:
            raise self._config.invalid(
                f"{site.module}.weight.absmax holds {scales.numel()} scales; "
                f"{blocks} blocks of {block} need one each"
            )
        if self._nested:
            scales = self._unnested(site, state, found)
        codes = found["weight"].view(site.rows, site.columns // 2)
        return Codebook(codes, scales.view(site.rows, -1), found["weight.quant_map"])

    def _unnested(self, site: Site, state: Config, found: Mapping[str, Tensor]) -> Tensor:
        """float32 scales from those of 8 bits, which have scales of their own and an offset."""
        codes, outer = found["weight.absmax"].flatten(), found["weight.nested_absmax"]
        block = state.integer("nested_blocksize")
        if outer.numel() != -(-codes.numel() // block):
            raise self._config.invalid(
                f"{site.module}.weight.nested_absmax holds {outer.numel()} scales; "
                f"{codes.numel()} numbers in blocks of {block} need {-(-codes.numel() // block)}"
            )
        by_code = outer.flatten().repeat_interleave(block)[: codes.numel()]
        return found["weight.nested_quant_map"][codes.long()] * by_code + state.number("nested_offset")

    def _state(self, site: Site, stored: Tensor) -> Config:
        name = f"{site.module}.weight.quant_state"
        try:
            values: Any = json.loads(stored.cpu().numpy().tobytes())
        except ValueError as exc:
            raise self._config.invalid(f"{name} is not JSON: {exc}") from exc
        if not isinstance(values, dict) or values.get("shape") != [site.rows, site.columns]:  # pyright: ignore
            raise self._config.invalid(f"{name} describes another weight than [{site.rows}, {site.columns}]")
        return Config(values, f"{self._config.source}: {name}")  # pyright: ignore


class EightBits:
    """int8 by rows with each row's largest number. Inputs stay as they are: no outliers to set apart."""

    name = "bitsandbytes"
    marks = ("SCB",)

    def tensors(self, site: Site) -> Mapping[str, Stored]:
        return {
            "weight": Stored((site.rows, site.columns), I8),
            "SCB": Stored((site.rows,)),
            "weight_format": Stored(None, U8, optional=True),
        }

    def read(self, site: Site, found: Mapping[str, Tensor]) -> Int8:
        assert found["weight"].shape == (site.rows, site.columns)
        return Int8(found["weight"], found["SCB"].to(torch.float32) / 127)
