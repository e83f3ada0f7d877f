"""Sampling noise as a function of (seed, choice, position, token), and of nothing else.

So a token does not depend on what else is in the batch, on a preemption, on the attempt or on the machine.
This file is the definition, in plain Python; ``sampler.py`` computes the same integers in torch, and a kernel
in any language can: two rounds of murmur3's 32-bit finaliser over a 64-bit key, which is the splitmix64
finaliser (Steele, Lea & Flood 2014) of seed, choice and position. For one key, token to bits is a bijection.
"""

from __future__ import annotations

import math

M32, M64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
GOLDEN32, GOLDEN64 = 0x9E3779B1, 0x9E3779B97F4A7C15
FMIX32 = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))
"""murmur3's finaliser: x ^= x >> shift, then x *= factor, three times."""
MAX_GUMBEL = -math.log(-math.log1p(-(2.0**-33)))
"""No noise is larger: about 22.87."""


def noise_key(seed: int, choice: int, position: int) -> tuple[int, int]:
    """Two 32-bit words for one row of noise. ``position`` counts the tokens of output before this one.

    seed below 2**64, choice and position below 2**32. For one seed, no two rows have the same key.
    """
    key = _mix64((seed + GOLDEN64) & M64)
    key = _mix64(key ^ (choice << 32 | position))
    return key & M32, key >> 32


def noise_bits(key: tuple[int, int], token: int) -> int:
    """32 random bits for ``token``."""
    low, high = key
    return _fmix32(_fmix32((token * GOLDEN32 & M32) ^ low) ^ high)


def gumbel(bits: int) -> float:
    """Standard Gumbel noise from 32 bits, increasing in ``bits``; between -3.2 and MAX_GUMBEL."""
    return -math.log(-math.log((bits + 0.5) * 2.0**-32))


def _fmix32(x: int) -> int:
    for shift, factor in FMIX32:
        x = (x ^ x >> shift) * factor & M32
    return x


def _mix64(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M64
    return x ^ x >> 31
