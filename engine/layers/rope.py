"""Rotary position embedding (Su et al. 2021) with the scalings that the supported families publish."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..models.spec import RopeSpec


def inverse_frequencies(rope: RopeSpec, head_dim: int, positions: int = 0) -> Tensor:
    """[rotated dimensions / 2] float32, scaling applied; longrope's for contexts of up to ``positions``."""
    head_dim = rope.rotary_dim or head_dim
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / powers
    if rope.kind == "longrope":
        far = positions > rope.original_max_positions
        return 1.0 / (torch.tensor(rope.long_factors if far else rope.short_factors) * powers)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        keep = 1.0 - _yarn_ramp(rope, head_dim)
        return (1.0 / (rope.factor * powers)) * (1.0 - keep) + plain * keep
    return plain


def tables(rope: RopeSpec, head_dim: int, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, [positions, head_dim / 2] float32, the attention factor multiplied in.

    The last dimensions of a half are those that are not rotated.
    """
    frequencies = inverse_frequencies(rope, head_dim, positions)
    angles = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies
    cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
    kept = head_dim // 2 - len(frequencies)
    return nnf.pad(cos, (0, kept), value=1.0), nnf.pad(sin, (0, kept))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last dimension against each other; cos and sin broadcast over x's halves.

    Computed in float32, returned in x's dtype.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _llama3(plain: Tensor, rope: RopeSpec) -> Tensor:
    """Llama 3.1: long waves are slowed by ``factor``, short ones kept, those between blended."""
    wave = 2 * math.pi / plain
    old = rope.original_max_positions
    low_wave, high_wave = old / rope.low_freq_factor, old / rope.high_freq_factor
    blend = (old / wave - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - blend) * plain / rope.factor + blend * plain
    scaled = torch.where(wave > low_wave, plain / rope.factor, plain)
    return torch.where((wave >= high_wave) & (wave <= low_wave), between, scaled)


def _yarn_ramp(rope: RopeSpec, head_dim: int) -> Tensor:
    """How far each frequency is interpolated, 0 to 1 (Peng et al. 2023, section 3.2)."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    span = (high - low) or 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
