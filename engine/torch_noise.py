"""``noise.py`` in torch: the same integers, for many tokens and rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import FMIX32, GOLDEN32, M32


def noise_bits(tokens: Tensor, keys: Tensor) -> Tensor:
    """``noise.noise_bits`` as int32 with the same bit pattern.

    tokens: int32 [n] or [rows, n]; keys: int32 [rows, 2]. Returns [rows, n]. Multiplications wrap.
    """
    bits = _fmix32(tokens * int32(GOLDEN32) ^ keys[:, :1])
    return _fmix32(bits.bitwise_xor_(keys[:, 1:]))


def gumbel(bits: Tensor) -> Tensor:
    """``noise.gumbel`` in float64."""
    uniform = ((bits.long() & M32).double() + 0.5) * 2.0**-32
    return -(-uniform.log()).log()


def key_rows(keys: list[tuple[int, int]], device: torch.device) -> Tensor:
    """Noise keys as int32 [rows, 2]."""
    return torch.tensor([[int32(word) for word in key] for key in keys], dtype=torch.int32, device=device)


def int32(x: int) -> int:
    """The int32 with the bits of ``x``."""
    return x - (1 << 32) if x >> 31 else x


def unsigned_below(bits: Tensor, limit: int) -> Tensor:
    """Where ``bits``, read as unsigned, are below ``limit``."""
    return (bits ^ int32(1 << 31)) < limit - (1 << 31)


def _fmix32(x: Tensor) -> Tensor:
    """In place. int32 has no logical shift, hence the masks."""
    for shift, factor in FMIX32:
        x.bitwise_xor_((x >> shift).bitwise_and_(M32 >> shift))
        if factor != 1:
            x.mul_(int32(factor))
    return x
