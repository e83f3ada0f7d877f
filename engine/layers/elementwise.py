"""Norm and activation: the torch form, and the seam where native kernels take their place."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor


class Elementwise(Protocol):
    """Row-wise operations of a layer. Sums are float32 whatever the dtype."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        """RMS norm of ``x`` [rows, n], or of ``residual + x`` with the sum left in ``residual``."""
        ...

    def silu_mul(self, x: Tensor) -> Tensor:
        """silu(gate) * up for x = [rows, gate | up]."""
        ...


class TorchElementwise:
    """Works on every device; the twin that native kernels are tested against."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            x = residual.add_(x)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(x.dtype)

    def silu_mul(self, x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (nnf.silu(gate) * up).to(x.dtype)
