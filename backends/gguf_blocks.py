"""What the bytes of GGUF's quantized blocks mean, as float32. Arithmetic as ggml's own reference does it.

A "K" block holds 256 weights in eight or sixteen parts, whose scales are in few bits themselves. Layouts:
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Array = npt.NDArray[Any]


def q4_0(blocks: Bytes) -> Floats:
    """scale, 16 bytes: low nibbles first, then the high ones; 8 is zero."""
    return (_nibbles(blocks[:, 2:]) - 8) * _half(blocks, 0)


def q4_1(blocks: Bytes) -> Floats:
    """scale, minimum, nibbles as above."""
    return _nibbles(blocks[:, 4:]) * _half(blocks, 0) + _half(blocks, 2)


def q5_0(blocks: Bytes) -> Floats:
    """scale, 32 fifth bits, nibbles; 16 is zero."""
    return (_nibbles(blocks[:, 6:]) + 16 * _bits(blocks[:, 2:6]) - 16) * _half(blocks, 0)


def q5_1(blocks: Bytes) -> Floats:
    """scale, minimum, 32 fifth bits, nibbles."""
    return (_nibbles(blocks[:, 8:]) + 16 * _bits(blocks[:, 4:8])) * _half(blocks, 0) + _half(blocks, 2)


def q8_0(blocks: Bytes) -> Floats:
    """scale, 32 signed bytes."""
    return blocks[:, 2:].view(np.int8).astype(np.float32) * _half(blocks, 0)


def q2_k(blocks: Bytes) -> Floats:
    """16 bytes of scale (low nibble) and minimum (high), 64 bytes of pairs of bits, both their factors."""
    small, codes = blocks[:, :16], _pairs(blocks[:, 16:80]).reshape(-1, 16, 16)
    scales: Array = _half(blocks, 80) * (small & 15).astype(np.float32)
    minima: Array = _half(blocks, 82) * (small >> 4).astype(np.float32)
    return scales[..., None] * codes - minima[..., None]


def q3_k(blocks: Bytes) -> Floats:
    """32 bytes of third bits (off: minus 4), 64 of pairs of bits, 16 scales of 6 bits, their factor."""
    third: Array = (blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    codes = _pairs(blocks[:, 32:96]).reshape(-1, 8, 32) - 4 * (1 - third.astype(np.float32))
    low, high = blocks[:, 96:104], blocks[:, 104:108]
    fours = np.concatenate([low & 15, low >> 4], axis=1)
    twos = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales: Array = _half(blocks, 108) * ((fours | (twos << 4)).astype(np.float32) - 32)
    return scales[..., None] * codes.reshape(-1, 16, 16)


def q4_k(blocks: Bytes) -> Floats:
    """Factors of scales and of minima, eight of each in 6 bits, nibbles: the low ones of 32 bytes first."""
    return _k_parts(blocks, _nibbles(blocks[:, 16:].reshape(-1, 32)).reshape(-1, 8, 32))


def q5_k(blocks: Bytes) -> Floats:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit i for the i-th part."""
    fifth = (blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None]) & 1
    nibbles = _nibbles(blocks[:, 48:].reshape(-1, 32)).reshape(-1, 8, 32)
    return _k_parts(blocks, nibbles + 16 * fifth.astype(np.float32))


def q6_k(blocks: Bytes) -> Floats:
    """128 bytes of nibbles, 64 of pairs of bits above them, 16 signed scales, their factor; 32 is zero."""
    low = _nibbles(blocks[:, :128].reshape(-1, 64)).reshape(-1, 256)
    codes = low + 16 * _pairs(blocks[:, 128:192]) - 32
    scales: Array = _half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return scales[..., None] * codes.reshape(-1, 16, 16)


UNPACK: dict[str, Callable[[Bytes], Floats]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}
"""Layout → function from [blocks, bytes of a block] to as many weights, in their order."""


def _half(blocks: Bytes, at: int) -> Floats:
    """The float16 at byte ``at`` of each block, [blocks, 1]."""
    return blocks[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: Bytes) -> Floats:
    """[n, bytes] → [n, 2 x bytes]: all low ones, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=1).astype(np.float32)


def _bits(packed: Bytes) -> Floats:
    """[n, bytes] → [n, 8 x bytes], lowest first."""
    return np.unpackbits(packed, axis=1, bitorder="little").astype(np.float32)


def _pairs(packed: Bytes) -> Floats:
    """[n, bytes] → [n, 4 x bytes]: of every 32 bytes the lowest two bits, then the next two, and so on."""
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    pairs = (packed.reshape(len(packed), -1, 1, 32) >> shifts) & 3
    return pairs.reshape(len(packed), -1).astype(np.float32)


def _k_parts(blocks: Bytes, codes: Floats) -> Floats:
    """``codes`` [blocks, 8, 32] scaled, less the minima: both in 6 bits, spread over bytes 4 to 15."""
    a, b, c = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales: Array = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=1)
    minima: Array = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=1)
    return (_half(blocks, 0) * scales)[..., None] * codes - (_half(blocks, 2) * minima)[..., None]
