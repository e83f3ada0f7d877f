"""GGUF's quantized blocks as codes with scales and zeros, which is what ``Grouped`` keeps in memory.

Each format is whole numbers, a scale for each part of a block, and an offset that is stored as a zero or as a
minimum. Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .grouped import Grouped

Unpacked = tuple[Tensor, Tensor, Tensor]
"""Codes [blocks, parts, weights], scales and zeros [blocks, parts]: weight = (code - zero) * scale."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """A format: bits of its codes, and how a block's bytes are read."""

    bits: int
    read: Callable[[Tensor], Unpacked]


def q4_0(blocks: Tensor) -> Unpacked:
    return _symmetric(_nibbles(blocks[:, 2:]), _half(blocks, 0), 8)


def q4_1(blocks: Tensor) -> Unpacked:
    return _least(_nibbles(blocks[:, 4:]), _half(blocks, 0), -_half(blocks, 2))


def q5_0(blocks: Tensor) -> Unpacked:
    codes = _nibbles(blocks[:, 6:]) | (_bits(blocks[:, 2:6]) << 4)
    return _symmetric(codes, _half(blocks, 0), 16)


def q5_1(blocks: Tensor) -> Unpacked:
    codes = _nibbles(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << 4)
    return _least(codes, _half(blocks, 0), -_half(blocks, 2))


def q8_0(blocks: Tensor) -> Unpacked:
    return _symmetric(blocks[:, 2:] ^ 128, _half(blocks, 0), 128)  # -128 … 127 as 0 … 255


def q2_k(blocks: Tensor) -> Unpacked:
    small = blocks[:, :16]
    scales, minima = _half(blocks, 80) * (small & 15), _half(blocks, 82) * (small >> 4)
    return _least(_pairs(blocks[:, 16:80]), scales, minima)


def q3_k(blocks: Tensor) -> Unpacked:
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    third = ((blocks[:, None, :32] >> shifts) & 1).flatten(1)
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    fours = torch.cat([low & 15, low >> 4], 1)
    twos = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scales = _half(blocks, 108) * ((fours | (twos << 4)).float() - 32)
    return _symmetric(_pairs(blocks[:, 32:96]) | (third << 2), scales, 4)


def q4_k(blocks: Tensor) -> Unpacked:
    return _least(_nibbles(blocks[:, 16:].reshape(-1, 32)).reshape(len(blocks), -1), *_six_bits(blocks))


def q5_k(blocks: Tensor) -> Unpacked:
    shifts = torch.arange(8, dtype=torch.uint8)[:, None]
    fifth = ((blocks[:, None, 16:48] >> shifts) & 1).flatten(1)
    low = _nibbles(blocks[:, 48:].reshape(-1, 32)).reshape(len(blocks), -1)
    return _least(low | (fifth << 4), *_six_bits(blocks))


def q6_k(blocks: Tensor) -> Unpacked:
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(len(blocks), -1)
    scales = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8)
    return _symmetric(low | (_pairs(blocks[:, 128:192]) << 4), scales, 32)


FORMATS: dict[str, Blocks] = {
    "Q4_0": Blocks(4, q4_0),
    "Q4_1": Blocks(4, q4_1),
    "Q5_0": Blocks(5, q5_0),
    "Q5_1": Blocks(5, q5_1),
    "Q8_0": Blocks(8, q8_0),
    "Q2_K": Blocks(2, q2_k),
    "Q3_K": Blocks(3, q3_k),
    "Q4_K": Blocks(4, q4_k),
    "Q5_K": Blocks(5, q5_k),
    "Q6_K": Blocks(6, q6_k),
}


def grouped(name: str, raw: Tensor, rows: int, columns: int, size: int) -> Grouped:
    """A weight [rows, columns] from the bytes of its blocks, ``size`` each, of the format ``name``."""
    form = FORMATS[name]
    codes, scales, zeros = form.read(raw.view(-1, size))
    return Grouped.of(form.bits, codes.reshape(rows, columns), scales.view(rows, -1), zeros.view(rows, -1))


def _symmetric(codes: Tensor, scales: Tensor, zero: int) -> Unpacked:
    return codes, scales, torch.full_like(scales, zero)


def _least(codes: Tensor, scales: Tensor, minima: Tensor) -> Unpacked:
    """weight = code * scale - minimum. Where the scale is zero all weights of the part are the same."""
    flat = scales == 0
    codes = torch.where(flat[..., None], 0, codes.view(*scales.shape, -1))
    scales = torch.where(flat, 1.0, scales)
    return codes, scales, minima / scales


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte ``at`` of each block, [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """[n, bytes] → [n, 2 x bytes]: all low ones, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], 1)


def _bits(packed: Tensor) -> Tensor:
    """[n, bytes] → [n, 8 x bytes], lowest first."""
    return ((packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)


def _pairs(packed: Tensor) -> Tensor:
    """[n, bytes] → [n, 4 x bytes]: of every 32 bytes the lowest two bits, then the next two, and so on."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    return ((packed.reshape(len(packed), -1, 1, 32) >> shifts) & 3).flatten(1)


def _six_bits(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of Q4_K and Q5_K, [blocks, 8] each, spread over bytes 4 to 15."""
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([a & 63, (c & 15) | (a >> 6 << 4)], 1)
    minima = torch.cat([b & 63, (c >> 4) | (b >> 6 << 4)], 1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minima
