"""Norms and gates in Triton, one launch each: in torch they are up to ten, each through the card's memory.

What they compute is written down in ``layers/elementwise.py``.
"""

# Kernels are compiled by Triton, whose language has no types that a checker knows.
# pyright: basic

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..layers.elementwise import TorchElementwise
from ..models.spec import Activation
from .kernel import kernel

NUMBERS = 1024
"""That a program of the elementwise kernels works on."""
LARGEST_ROW = 65536
"""Numbers of a row that a program normalises: it holds them all."""


@kernel()
def norm(
    out,
    x,
    residual,
    weight,
    bias,
    eps,
    N: tl.constexpr,
    WIDE: tl.constexpr,
    CENTRED: tl.constexpr,
    ADDED: tl.constexpr,
    BIASED: tl.constexpr,
):
    """RMS norm of a row, or CENTRED layer norm. ADDED: of residual + x, which is left in ``residual``."""
    i = tl.arange(0, WIDE)
    row = tl.program_id(0).to(tl.int64) * N + i
    inside = i < N
    raw = tl.load(x + row, mask=inside, other=0.0)
    kind = raw.dtype
    wide = raw.to(tl.float32)
    if ADDED:
        held = (wide + tl.load(residual + row, mask=inside, other=0.0).to(tl.float32)).to(kind)
        tl.store(residual + row, held, mask=inside)
        wide = held.to(tl.float32)
    if CENTRED:
        wide = tl.where(inside, wide - tl.sum(wide, 0) / N, 0.0)
    said = wide * tl.rsqrt(tl.sum(wide * wide, 0) / N + eps)
    said *= tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        said += tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row, said.to(kind), mask=inside)


@kernel()
def gated(out, x, N: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """act(gate) * up. Grid: rows, blocks of a row."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0).to(tl.int64)
    gate = tl.load(x + row * (2 * N) + i, mask=i < N, other=0.0)
    up = tl.load(x + row * (2 * N) + N + i, mask=i < N, other=0.0)
    said = _activated(gate.to(tl.float32), KIND) * up.to(tl.float32)
    tl.store(out + row * N + i, said.to(gate.dtype), mask=i < N)


@triton.jit
def _activated(x, KIND: tl.constexpr):
    if KIND == "silu":
        said = x / (1 + tl.exp(-x))
    elif KIND == "gelu":
        said = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) is the logistic function of 2 z.
        said = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        said = tl.maximum(x, 0.0)
    return said


@kernel(do_not_specialize=["n"])
def capped(out, x, cap, n, BLOCK: tl.constexpr):
    """cap * tanh(x / cap)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    raw = tl.load(x + i, mask=i < n, other=0.0)
    said = cap * (1 - 2 / (tl.exp(raw.to(tl.float32) * (2 / cap)) + 1))
    tl.store(out + i, said.to(raw.dtype), mask=i < n)


class TritonElementwise(TorchElementwise):
    """On CUDA. Where a launch saves nothing, torch's."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        return _norm(x, weight, None, eps, residual, centred=False)

    def layer_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        return _norm(x, weight, bias, eps, residual, centred=True)

    def gate(self, kind: Activation, x: Tensor) -> Tensor:
        rows, n = x.shape[0], x.shape[1] // 2
        assert x.is_contiguous()
        out = x.new_empty(rows, n)
        if rows:
            gated[(rows, -(-n // NUMBERS))](out, x, N=n, KIND=kind, BLOCK=NUMBERS, num_warps=4)
        return out

    def softcap(self, x: Tensor, cap: float) -> Tensor:
        assert x.is_contiguous()
        out, n = x.new_empty(x.shape), x.numel()
        if n:
            capped[(-(-n // NUMBERS),)](out, x, cap, n, BLOCK=NUMBERS, num_warps=4)
        return out


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None, *, centred: bool
) -> Tensor:
    n = x.shape[-1]
    assert n <= LARGEST_ROW, f"rows of {n}"
    assert x.is_contiguous()
    assert residual is None or residual.is_contiguous()
    out = x.new_empty(x.shape)
    if len(x):
        wide = triton.next_power_of_2(n)
        norm[(x.numel() // n,)](
            out,
            x,
            x if residual is None else residual,
            weight,
            weight if bias is None else bias,
            eps,
            N=n,
            WIDE=wide,
            CENTRED=centred,
            ADDED=residual is not None,
            BIASED=bias is not None,
            num_warps=min(16, max(1, wide // 512)),
        )
    return out
