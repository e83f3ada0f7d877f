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


class RowByRow:
    """Another's operations, one row at a time. torch cuts an array for its threads and vectors by its whole
    size, so that a row's last bits may depend on its neighbours; the native kernels do not need this."""

    def __init__(self, inner: Elementwise) -> None:
        self._inner = inner

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        norm = self._inner.rms_norm
        if len(x) < 2:
            return norm(x, weight, eps, residual)
        sums = [None if residual is None else residual[i : i + 1] for i in range(len(x))]
        return torch.cat([norm(x[i : i + 1], weight, eps, added) for i, added in enumerate(sums)])

    def silu_mul(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            return self._inner.silu_mul(x)
        return torch.cat([self._inner.silu_mul(x[i : i + 1]) for i in range(len(x))])


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
