"""The Triton kernels against torch's: cases for a GPU and for Triton's interpreter alike.

``for check in checks(device): assert check.difference() <= check.tolerance``. Imports Triton.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from ..attention.backend import Attention
from ..attention.flash_backend import FlashAttention, Functions
from ..attention.torch_backend import TorchAttention
from ..attention.trial import Trial, difference
from ..attention.triton_backend import TritonAttention
from ..batch import Frame
from ..kv_numbers import FP8, INT8, Numbers
from ..layers.elementwise import Elementwise, TorchElementwise
from ..models.spec import ModelSpec, RopeSpec
from .elementwise import TritonElementwise

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""16 bits: keys, weights and results are each rounded, to 2^-11 or 2^-8 of their size."""
ON_CUDA = 2e-4
"""In float32 there: torch's products, exponentials and sums have their own order and approximations."""

PLAIN = RopeSpec()


@dataclass(frozen=True, slots=True)
class Case:
    """One step of one attention layer: ``pieces`` are (keys before, tokens fed) of each sequence."""

    name: str
    pieces: tuple[tuple[int, int], ...]
    heads: int = 2
    kv_heads: int = 1
    dim: int = 16
    dtype: torch.dtype = torch.float32
    block: int = 16
    split: int = 64
    rope: RopeSpec | None = PLAIN
    window: int | None = None
    softcap: float | None = None
    alibi: bool = False
    norm: bool = False
    numbers: Numbers | None = None

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            family="check",
            vocab_size=8,
            hidden_size=8,
            num_layers=1,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            intermediate_size=8,
            norm_eps=1e-5,
            max_positions=self.longest,
            tied_embeddings=True,
            ropes=(self.rope,),
            windows=(self.window,),
            eos_token_ids=(),
            qk_norm="head" if self.norm else None,
            softcap=self.softcap,
            alibi=tuple(2.0 ** -(i + 1) for i in range(self.heads)) if self.alibi else (),
        )

    @property
    def longest(self) -> int:
        return max(start + count for start, count in self.pieces)


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison with torch."""

    name: str
    difference: Callable[[], float]
    """The largest, in outputs or cache, of numbers above 1 relative. NaN where a number was to come."""
    tolerance: float


MIXED = ((0, 5), (70, 1), (129, 1))
SMALL = (
    Case("mixed", MIXED),
    Case("bfloat16", MIXED, dim=64, dtype=torch.bfloat16, norm=True),
    Case("float16", MIXED, dim=64, dtype=torch.float16),
    Case("no-groups", ((0, 18), (3, 1)), 2, 2, 80, block=3),
    Case("group-of-8", ((0, 1), (60, 5), (127, 2)), 8, 1, 96),
    Case("group-of-4-window", ((40, 20), (199, 1), (62, 1)), 4, 1, 32, window=37, block=5),
    Case("window-of-1", ((3, 9), (70, 1)), window=1, rope=None),
    Case("softcap", MIXED, dim=128, softcap=2.0),
    Case("alibi", MIXED, 2, 2, alibi=True, rope=None, block=32),
    Case("everything", ((0, 17), (140, 1)), 3, 1, 20, norm=True, window=90, softcap=3.0, alibi=True, block=1),
    Case("int8", ((0, 5), (129, 1)), 4, 2, 64, numbers=INT8, block=3),
    Case("fp8", ((0, 5), (129, 1)), 4, 2, 24, numbers=FP8, norm=True),
    Case("partial-rope", ((4, 3), (9, 1)), dim=24, rope=RopeSpec(rotary_dim=8), norm=True, block=256),
)
DECODE = Case("decode", ((0, 1), (70, 1), (129, 1)))
"""Seconds in the interpreter; shapes that no model has, but every path of the kernels."""

_STEP = ((0, 300), (700, 90), (0, 1), (511, 1), (512, 1), (1300, 1), (4095, 1), (40, 4), (2000, 9))
_LLAMA = Case("llama", _STEP, 32, 8, 128, torch.bfloat16, split=512)
LARGE = (
    _LLAMA,
    replace(_LLAMA, name="llama-float16", dtype=torch.float16),
    replace(_LLAMA, name="llama-float32", dtype=torch.float32, heads=8, kv_heads=2),
    replace(_LLAMA, name="llama-large-blocks", block=256),
    replace(_LLAMA, name="qwen3-0.6b", heads=16, norm=True),
    replace(_LLAMA, name="qwen2.5-0.5b", heads=14, kv_heads=2, dim=64),
    replace(_LLAMA, name="mistral-window", window=1024),
    replace(_LLAMA, name="gemma2-9b", heads=16, dim=256, softcap=50.0, window=600),
    replace(_LLAMA, name="phi-2", heads=32, kv_heads=32, dim=80, rope=RopeSpec(rotary_dim=32)),
    replace(_LLAMA, name="phi-3-mini", heads=32, kv_heads=32, dim=96),
    replace(_LLAMA, name="falcon-7b", heads=71, kv_heads=1, dim=64),
    replace(_LLAMA, name="llama-fp8", numbers=FP8),
    replace(_LLAMA, name="llama-int8", numbers=INT8),
    replace(_LLAMA, name="bloom", heads=16, kv_heads=16, alibi=True, rope=None),
)
"""Shapes of models, for a GPU."""


def checks(device: torch.device) -> Iterator[Check]:
    """Each kernel in each case: the small ones, and on CUDA those of models, with flash-attn where it is."""
    large = device.type == "cuda"
    for case in SMALL + LARGE if large else SMALL:
        run = partial(equals_torch, ours, case, device)
        yield Check(f"triton/{case.name}", run, _allowed(case, device))
    decode = replace(_LLAMA, pieces=tuple((n, 1) for n in (0, 70, 511, 1300, 4095))) if large else DECODE
    yield Check("triton/frame", partial(framed_equals_packed, decode, device), 0.0)
    for dtype in TOLERANCE if large else (torch.float32,):
        yield from elementwise(device, dtype)
    if large and importlib.util.find_spec("flash_attn"):
        for case in (
            replace(case, block=256) for case in LARGE if case.dtype != torch.float32 and not case.numbers
        ):
            run = partial(equals_torch, theirs, case, device)
            yield Check(f"flash/{case.name}", run, tolerance(case.dtype, device))


def tolerance(dtype: torch.dtype, device: torch.device) -> float:
    return ON_CUDA if dtype == torch.float32 and device.type == "cuda" else TOLERANCE[dtype]


def _allowed(case: Case, device: torch.device) -> float:
    """A number between two of a byte's may be rounded to either where 16 bits were rounded before."""
    apart = {None: 0.0, INT8: 0.03, FP8: 0.13}[case.numbers] if case.dtype != torch.float32 else 0.0
    return apart + tolerance(case.dtype, device)


def ours(case: Case, device: torch.device) -> Attention:
    return TritonAttention(
        case.spec,
        case.block,
        case.longest,
        device,
        split=case.split,
        numbers=case.numbers,
        dtype=case.dtype,
    )


def _torch(case: Case, device: torch.device) -> Attention:
    return TorchAttention(case.spec, case.block, case.longest, device, numbers=case.numbers)


def theirs(case: Case, device: torch.device) -> Attention:
    functions = cast("Functions", importlib.import_module("flash_attn"))
    return FlashAttention(case.spec, case.block, case.longest, device, functions)


@torch.inference_mode()
def equals_torch(make: Callable[[Case, torch.device], Attention], case: Case, device: torch.device) -> float:
    """How far a backend is from torch's, in what it says and in what it caches."""
    trial, reference = _trial(case, device), _torch(case, device)
    both = zip(trial.run(make(case, device)), trial.run(reference), strict=True)
    return max(difference(*pair) for pair in both)


@torch.inference_mode()
def framed_equals_packed(case: Case, device: torch.device) -> float:
    """A decode step from memory that stays, padding behind it, against the same step packed anew."""
    trial, backend = _trial(case, device), ours(case, device)
    n = trial.batch.rows
    frame = Frame.allocate(n + 3, 2 * case.longest, case.block, device)
    frame.fill(trial.batch)
    step = replace(trial, batch=frame.step(trial.batch.tokens), qkv=torch.cat((trial.qkv, trial.qkv[:3])))
    packed, (out, *cached) = trial.run(backend), step.run(backend)
    both = zip((out[:n], *cached), packed, strict=True)
    return max(out[n:].abs().max().item(), *(difference(*pair) for pair in both))


def _trial(case: Case, device: torch.device) -> Trial:
    return Trial.draw(case.spec, case.pieces, case.block, device, case.dtype, case.numbers)


# ---- norms and gates


def elementwise(device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """Every operation over a row shorter than a program's, and over one that ends within it."""
    sizes = (7, 1500) if device.type == "cpu" else (7, 1500, 4096, 14336)
    for n in sizes:
        generator = torch.Generator().manual_seed(n)
        x, held, wide = (torch.randn(3, w, generator=generator).to(device, dtype) for w in (n, n, 2 * n))
        wide[0, 0] = -200.0  # its exponential is no number that float32 has
        weight, bias = (torch.rand(n, generator=generator).to(device, dtype) for _ in range(2))
        operations: dict[str, Callable[[Elementwise], Tensor]] = {
            "rms_norm": lambda ops, x=x, w=weight: ops.rms_norm(x, w, 1e-5),
            "layer_norm": lambda ops, x=x, w=weight, b=bias: ops.layer_norm(x, w, b, 1e-5),
            "added": lambda ops, x=x, w=weight, h=held: _added(ops, x, w, h.clone()),
            "softcap": lambda ops, x=wide: ops.softcap(x, 30.0),
            "silu": lambda ops, x=wide: ops.silu_mul(x),
            "gelu": lambda ops, x=wide: ops.gate("gelu", x),
            "gelu_tanh": lambda ops, x=wide: ops.gate("gelu_tanh", x),
            "relu": lambda ops, x=wide: ops.gate("relu", x),
        }
        for name, operation in operations.items():
            yield Check(f"elementwise/{name}-{n}", partial(_apart, operation), tolerance(dtype, device))


@torch.inference_mode()
def _apart(operation: Callable[[Elementwise], Tensor]) -> float:
    return difference(operation(TritonElementwise()), operation(TorchElementwise()))


def _added(ops: Elementwise, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return torch.cat((ops.rms_norm(x, weight, 1e-5, residual), residual))
