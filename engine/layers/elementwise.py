"""Norms and activations: the torch form, and the seam where native kernels take their place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..models.spec import Activation

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": nnf.silu,
    "gelu": nnf.gelu,
    "gelu_tanh": partial(nnf.gelu, approximate="tanh"),
    "relu": nnf.relu,
}


class Elementwise(Protocol):
    """Row-wise operations of a layer. Sums are float32 whatever the dtype."""

    @property
    def native(self) -> bool:
        """Whether rms_norm and silu_mul are our CPU kernels', whose rows do not see one another."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        """RMS norm of ``x`` [rows, n], or of ``residual + x`` with the sum left in ``residual``."""
        ...

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        """Layer norm of ``x``, or of ``residual + x`` with the sum left in ``residual``."""
        ...

    def silu_mul(self, x: Tensor) -> Tensor:
        """silu(gate) * up for x = [rows, gate | up]."""
        ...

    def gate(self, kind: Activation, x: Tensor) -> Tensor:
        """act(gate) * up for x = [rows, gate | up]."""
        ...

    def activate(self, kind: Activation, x: Tensor) -> Tensor: ...

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        """cap * tanh(x / cap)."""
        ...


class RowByRow:
    """Another's operations, one row at a time. torch cuts an array for its threads and vectors by its whole
    size, so that a row's last bits may depend on its neighbours; native kernels do not need this."""

    def __init__(self, inner: Elementwise) -> None:
        """Native operations of ``inner`` may see all rows."""
        self._inner, self.native = inner, inner.native

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        norm = self._inner.rms_norm
        if self.native:
            return norm(x, weight, eps, residual)
        return _each(lambda row, held: norm(row, weight, eps, held), x, residual)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        norm = self._inner.layer_norm
        return _each(lambda row, held: norm(row, weight, bias, eps, held), x, residual)

    def silu_mul(self, x: Tensor) -> Tensor:
        if self.native:
            return self._inner.silu_mul(x)
        return _each(lambda row, _: self._inner.silu_mul(row), x)

    def gate(self, kind: Activation, x: Tensor) -> Tensor:
        return _each(lambda row, _: self._inner.gate(kind, row), x)

    def activate(self, kind: Activation, x: Tensor) -> Tensor:
        return _each(lambda row, _: self._inner.activate(kind, row), x)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return _each(lambda row, _: self._inner.softcap(row, cap), x)


def _each(
    operation: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, residual: Tensor | None = None
) -> Tensor:
    if len(x) < 2:
        return operation(x, residual)
    held = [None if residual is None else residual[i : i + 1] for i in range(len(x))]
    return torch.cat([operation(x[i : i + 1], row) for i, row in enumerate(held)])


class TorchElementwise:
    """Works on every device; the twin that native kernels are tested against."""

    native = False

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            x = residual.add_(x)
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (wide * scale * weight.float()).to(x.dtype)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        if residual is not None:
            x = residual.add_(x)
        return nnf.layer_norm(x, x.shape[-1:], weight, bias, eps)

    def silu_mul(self, x: Tensor) -> Tensor:
        return self.gate("silu", x)

    def gate(self, kind: Activation, x: Tensor) -> Tensor:
        gate, up = x.float().chunk(2, dim=-1)
        return (_ACTIVATIONS[kind](gate) * up).to(x.dtype)

    def activate(self, kind: Activation, x: Tensor) -> Tensor:
        return _ACTIVATIONS[kind](x)

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        return (x.float() / cap).tanh().mul(cap).to(x.dtype)
