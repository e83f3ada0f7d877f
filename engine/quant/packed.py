"""Weights that stay small in memory, and linear layers over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..layers.linear import Linear

CPU_SLICE = 1 << 20
"""Weights of one slice of a layer that are unpacked at a time: what they become stays in the core's cache."""
CUDA_SLICE = 1 << 26


class Packed(Protocol):
    """A weight [rows, columns] = [out, in] in few bits. Immutable."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def device(self) -> torch.device: ...

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[rows, columns], worked out in float32 and rounded once."""
        ...

    def part(self, first: int, end: int) -> Packed:
        """Rows ``first : end``; shares memory."""
        ...

    def beside(self, others: Sequence[Packed]) -> Packed | None:
        """All one above the other, as one weight. None: they are too different, each remains a layer."""
        ...

    def linear(self, dtype: torch.dtype, bias: Tensor | None) -> Linear:
        """The layer for inputs in ``dtype`` that measured best here. The weight is the layer's then."""
        ...


@dataclass(frozen=True, slots=True)
class ByteCodes:
    """What weights with a byte for each number share. codes: [rows, columns], one byte each."""

    codes: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def device(self) -> torch.device:
        return self.codes.device


class OnCall:
    """Unpacks the weight slice by slice, whenever it is multiplied: any format, any device."""

    def __init__(self, packed: Packed, dtype: torch.dtype, bias: Tensor | None) -> None:
        rows, columns = packed.shape
        step = max(1, (CPU_SLICE if packed.device.type == "cpu" else CUDA_SLICE) // columns)
        cuts = [(first, min(first + step, rows)) for first in range(0, rows, step)]
        self._parts = [(first, end, packed.part(first, end)) for first, end in cuts]
        self._rows, self._dtype, self._bias = rows, dtype, bias

    def __call__(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self._rows)
        for first, end, part in self._parts:
            bias = None if self._bias is None else self._bias[first:end]
            y[:, first:end] = nnf.linear(x, part.dense(self._dtype), bias)
        return y


class Unfused:
    """Layers over the same input whose weights cannot be one: their outputs side by side."""

    def __init__(self, layers: Sequence[Linear]) -> None:
        self._layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self._layers], -1)


def side_by_side(parts: Sequence[Packed], dtype: torch.dtype, bias: Tensor | None) -> Linear:
    """One layer over ``parts``, one weight if they can be: outputs and ``bias`` in their order."""
    whole = parts[0].beside(parts[1:]) if len(parts) > 1 else parts[0]
    if whole is not None:
        return whole.linear(dtype, bias)
    layers: list[Linear] = []
    first = 0
    for part in parts:
        end = first + part.shape[0]
        layers.append(part.linear(dtype, None if bias is None else bias[first:end]))
        first = end
    return Unfused(layers)
