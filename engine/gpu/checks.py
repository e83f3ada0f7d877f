"""The Triton kernels against torch's: cases for a GPU and for Triton's interpreter alike.

``for outcome in outcomes(device): assert outcome.difference <= outcome.tolerance``. Imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention.torch_backend import TorchAttention
from ..attention.trial import Trial, difference
from ..attention.triton_backend import TritonAttention
from ..batch import Frame
from ..layers.elementwise import Elementwise, TorchElementwise
from ..models.spec import ModelSpec, RopeSpec
from .elementwise import TritonElementwise

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""16 bits: keys, weights and results are each rounded, to 2^-11 or 2^-8 of their size."""

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
class Outcome:
    name: str
    difference: float
    """The largest, in outputs or cache, of numbers above 1 relative. NaN where a number was to come."""
    tolerance: float

    @property
    def good(self) -> bool:
        return self.difference <= self.tolerance


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
    replace(_LLAMA, name="bloom", heads=16, kv_heads=16, alibi=True, rope=None),
)
"""Shapes of models, for a GPU."""


def outcomes(device: torch.device) -> Iterator[Outcome]:
    """Each kernel in each case: the small ones, and on CUDA those of models."""
    for case in SMALL + LARGE if device.type == "cuda" else SMALL:
        yield Outcome(f"attention/{case.name}", equals_torch(case, device), TOLERANCE[case.dtype])
    yield Outcome("attention/frame", framed_equals_packed(DECODE, device), 0.0)
    if device.type == "cuda":
        large = replace(_LLAMA, pieces=tuple((n, 1) for n in (0, 70, 511, 1300, 4095)))
        yield Outcome("attention/frame-llama", framed_equals_packed(large, device), 0.0)
    for dtype in TOLERANCE if device.type == "cuda" else (torch.float32,):
        yield from elementwise(device, dtype)


@torch.inference_mode()
def equals_torch(case: Case, device: torch.device) -> float:
    spec, trial = case.spec, _trial(case, device)
    ours = TritonAttention(spec, case.block, case.longest, device, case.dtype, split=case.split)
    theirs = TorchAttention(spec, case.block, case.longest, device)
    return max(difference(*both) for both in zip(trial.run(ours), trial.run(theirs), strict=True))


@torch.inference_mode()
def framed_equals_packed(case: Case, device: torch.device) -> float:
    """A decode step from memory that stays, padding behind it, against the same step packed anew."""
    trial = _trial(case, device)
    backend = TritonAttention(case.spec, case.block, case.longest, device, case.dtype, split=case.split)
    n = trial.batch.rows
    frame = Frame.allocate(n + 3, 2 * case.longest, case.block, device)
    frame.fill(trial.batch)
    step = replace(trial, batch=frame.step(trial.batch.tokens), qkv=torch.cat((trial.qkv, trial.qkv[:3])))
    packed, (out, *cached) = trial.run(backend), step.run(backend)
    both = zip((out[:n], *cached), packed, strict=True)
    return max(out[n:].abs().max().item(), *(difference(*pair) for pair in both))


def _trial(case: Case, device: torch.device) -> Trial:
    return Trial.draw(case.spec, case.pieces, case.block, device, case.dtype)


# ---- norms and gates


def elementwise(device: torch.device, dtype: torch.dtype) -> Iterator[Outcome]:
    """Every operation over a row shorter than a program's, and over one that ends within it."""
    ours, theirs = TritonElementwise(), TorchElementwise()
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
            off = difference(operation(ours), operation(theirs))
            yield Outcome(f"elementwise/{name}-{n}", off, TOLERANCE[dtype])


def _added(ops: Elementwise, x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
    return torch.cat((ops.rms_norm(x, weight, 1e-5, residual), residual))
