"""Weights in FP8 (e4m3): a scale per tensor or output, or for each block as DeepSeek and Qwen have it.

No card's FP8 arithmetic is used yet: weights are unpacked, and inputs keep their precision.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ..layers.linear import Linear
from ..models.config import Config
from ..weights import Stored
from .method import Site
from .packed import ByteCodes, OnCall, Packed

FP8 = frozenset({"F8_E4M3"})
LARGEST = 448.0
"""The largest number in e4m3."""


@dataclass(frozen=True, slots=True)
class Fp8(ByteCodes):
    """``weight[n, k] = codes[n, k] * scales[n, k // block]``: float8_e4m3fn and float32 [rows, blocks]."""

    scales: Tensor
    block: int

    @classmethod
    def nearest(cls, weight: Tensor) -> Fp8:
        """``weight`` [rows, columns] rounded, a scale for each row."""
        wide = weight.float()
        scales = wide.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
        return cls((wide / scales).to(torch.float8_e4m3fn), scales, wide.shape[1])

    @classmethod
    def of(cls, codes: Tensor, scales: Tensor, block_rows: int = 0, block_columns: int = 0) -> Fp8:
        """``scales``: one number, one for each row, or [row blocks, column blocks] with their sizes."""
        rows, columns = codes.shape
        if block_rows:
            by_row = scales.float().repeat_interleave(block_rows, 0)[:rows]
            return cls(codes, by_row, block_columns)
        return cls(codes, scales.float().reshape(-1, 1).expand(rows, 1).contiguous(), columns)

    def dense(self, dtype: torch.dtype) -> Tensor:
        rows, columns = self.shape
        if self.device.type == "cpu":  # torch converts one number at a time there: a table is 10 times faster
            wide = _table().index_select(0, self.codes.view(torch.uint8).flatten().int()).view(rows, columns)
        else:
            wide = self.codes.float()
        if self.scales.shape[1] == 1:
            return wide.mul_(self.scales).to(dtype)
        return wide.mul_(self.scales.repeat_interleave(self.block, 1)[:, :columns]).to(dtype)

    def part(self, first: int, end: int) -> Fp8:
        return replace(self, codes=self.codes[first:end], scales=self.scales[first:end])

    def beside(self, others: Sequence[Packed]) -> Fp8 | None:
        every = [self, *(each for each in others if isinstance(each, Fp8) and each.block == self.block)]
        if len(every) <= len(others):
            return None
        codes = torch.cat([each.codes.view(torch.uint8) for each in every]).view(torch.float8_e4m3fn)
        return Fp8(codes, torch.cat([each.scales for each in every]), self.block)

    def linear(self, dtype: torch.dtype, bias: Tensor | None) -> Linear:
        return OnCall(self, dtype, bias)


@functools.cache
def _table() -> Tensor:
    """What each of the 256 bytes means."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


class Fp8Checkpoint:
    """``quant_method: fp8``, in blocks or not, and ``fbgemm_fp8``. Scales of inputs are not needed."""

    name = "fp8"
    marks = ("weight_scale_inv", "weight_scale")

    def __init__(self, _model: Config, config: Config) -> None:
        form = config.text("fmt", "e4m3")
        if form not in ("e4m3", "float8_e4m3fn"):
            raise config.invalid(f"fmt is {form!r}; e4m3 is supported")
        block = config.values.get("weight_block_size")
        self._block = checked_block(config, "weight_block_size", block) if block is not None else None

    def tensors(self, site: Site) -> Mapping[str, Stored]:
        weight = Stored((site.rows, site.columns), FP8)
        unread = Stored(None, optional=True)
        if self._block is not None:
            return {
                "weight": weight,
                "weight_scale_inv": block_scales(site, self._block),
                "input_scale": unread,
            }
        scale = per_tensor_or_row(site)
        return {"weight": weight, "weight_scale": scale, "input_scale": unread, "input_scale_ub": unread}

    def read(self, site: Site, found: Mapping[str, Tensor]) -> Fp8:
        assert found["weight"].shape == (site.rows, site.columns)
        if self._block is not None:
            return Fp8.of(found["weight"], found["weight_scale_inv"], *self._block)
        return Fp8.of(found["weight"], found["weight_scale"])


def per_tensor_or_row(site: Site) -> Stored:
    return Stored((), also=((1,), (site.rows, 1), (site.rows,)))


def block_scales(site: Site, block: tuple[int, int]) -> Stored:
    return Stored((-(-site.rows // block[0]), -(-site.columns // block[1])))


def checked_block(config: Config, name: str, block: Any) -> tuple[int, int]:
    sizes: list[Any] = cast("list[Any]", block) if isinstance(block, list) else []
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise config.invalid(f"{name} is {block!r}, expected two sizes")
    return sizes[0], sizes[1]
