"""The checkpoint as one rank sees it: that of its narrower model, read slice by slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...schemas.errors import Misconfigured
from ..layers.linear import Linear
from ..quant.codebook import Codebook
from ..quant.fp8 import Fp8
from ..quant.grouped import Grouped
from ..quant.int8 import Int8
from ..quant.packed import Packed, side_by_side
from ..quant.weights import ModelWeights
from .shard import Cut, Shard


class NarrowWeights:
    """``fetch`` and ``layer`` of ModelWeights for the model that ``shard`` describes."""

    def __init__(self, weights: ModelWeights, shard: Shard) -> None:
        self._weights, self._shard = weights, shard
        self.stored_as = weights.stored_as

    def fetch(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of the narrow model, by its Hugging Face name; a quantized weight is unpacked."""
        module = name.removesuffix(".weight")
        if self._weights.quantized([module]):
            return self._packed(module, device).dense(dtype)
        piece = self._shard.piece(name)
        if piece.runs is None:
            whole = self._weights.fetch(piece.name, dtype, device)
            return torch.zeros_like(whole) if piece.elsewhere else whole
        return self._weights.part(piece.name, piece.dim, piece.runs, dtype, device)

    def lend(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.fetch(name, dtype, device)

    def layer(
        self, modules: Sequence[str], bias: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> Linear | None:
        """The modules' parts one above the other, as a layer. None: they are not quantized, or not all.

        Raises Misconfigured where a quantized weight cannot be cut there.
        """
        if not self._weights.quantized(modules):
            return None
        return side_by_side([self._packed(module, device) for module in modules], dtype, bias)

    def _packed(self, module: str, device: torch.device) -> Packed:
        packed, cut = self._weights.packed(module, device), self._shard.cuts.get(module)
        if cut is None:
            return packed
        part = rows(packed, cut) if cut.side == "rows" else columns(packed, cut.runs[0])
        if part is None:
            runs = ", ".join(f"{run.start} to {run.stop}" for run in cut.runs)
            raise Misconfigured(
                f"tensor_parallel_size={self._shard.size} cuts {module} at its {cut.side} {runs}, and "
                f"weights packed as {type(packed).__name__} cannot be cut there; use another "
                "tensor_parallel_size, or a checkpoint that is not quantized"
            )
        return part


def rows(packed: Packed, cut: Cut) -> Packed | None:
    """Copies, so that the rest of the memory is given back."""
    first, *others = [packed.part(run.start, run.stop) for run in cut.runs]
    return first.beside(others) or (None if others else first)


def columns(packed: Packed, run: range) -> Packed | None:
    """Columns of a weight, whose groups or blocks the borders must not cut. None: they do."""
    wanted = slice(run.start, run.stop)
    if isinstance(packed, Int8):
        return replace(packed, codes=packed.codes[:, wanted].contiguous())
    if isinstance(packed, Fp8):
        scales = _scales(packed.scales, packed.block, run)
        return None if scales is None else Fp8(packed.codes[:, wanted].contiguous(), scales, packed.block)
    if isinstance(packed, Codebook):
        block = packed.shape[1] // packed.scales.shape[1]
        scales, codes = _scales(packed.scales, block, run), _pairs(packed.codes, run)
        return None if scales is None or codes is None else replace(packed, codes=codes, scales=scales)
    if isinstance(packed, Grouped) and packed.order is None:
        scales, zeros = (_scales(each, packed.group, run) for each in (packed.scales, packed.zeros))
        codes = _pairs(packed.codes, run) if packed.bits <= 4 else packed.codes[:, wanted].contiguous()
        if scales is None or zeros is None or codes is None:
            return None
        return replace(packed, codes=codes, scales=scales, zeros=zeros)
    return None


def _scales(scales: Tensor, block: int, run: range) -> Tensor | None:
    """Those of the blocks of columns that make up ``run``."""
    if scales.shape[1] == 1:
        return scales
    if run.start % block or run.stop % block:
        return None
    return scales[:, run.start // block : run.stop // block].contiguous()


def _pairs(codes: Tensor, run: range) -> Tensor | None:
    """Bytes of two columns each."""
    if run.start % 2 or run.stop % 2:
        return None
    return codes[:, run.start // 2 : run.stop // 2].contiguous()
