"""What the device computes beside the CPU in float32: attention, quantized layers, whole engines."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gristmill.engine.attention.backend import Attention
from gristmill.engine.attention.torch_backend import TorchAttention
from gristmill.engine.batch import Fed, Feed, pack
from gristmill.engine.engine import Engine
from gristmill.engine.kv_cache import KVCache
from gristmill.engine.messages import Request
from gristmill.engine.models.spec import ModelSpec, RopeSpec
from gristmill.engine.models.tiny import VOCAB, write_tiny
from gristmill.engine.quant.fp8 import Fp8
from gristmill.engine.quant.grouped import Grouped
from gristmill.engine.quant.int8 import Int8
from gristmill.engine.quant.onload import ON_LOAD
from gristmill.engine.quant.packed import Packed
from gristmill.engine.settings import EngineSettings
from torch import Tensor

from .report import Context, Row, case, summed_up

if TYPE_CHECKING:
    from gristmill.engine.gpu.checks import Check

Make = Callable[[ModelSpec, int, int, torch.device], Attention]
Lacks = Callable[[ModelSpec, torch.dtype], bool]
"""Whether a backend leaves such models, or numbers, to another."""
TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Of numbers around one. Tensor cores may round float32 inputs to TF32 in a kernel's products."""


# ---- attention


def attention(context: Context) -> list[Row]:
    """Every backend of this device against plain torch on the CPU, in steps that mix prompts and decodes."""
    device = torch.device(context.device)
    rows: list[Row] = []
    dtypes = (
        (torch.bfloat16, torch.float32) if context.tiny else (torch.bfloat16, torch.float16, torch.float32)
    )
    for name, make, lacks in backends(device):
        cases = [
            compare(f"{name}, {what}, {str(dtype)[6:]}", make, spec, dtype, device)
            for what, spec in specs(tiny=context.tiny)
            for dtype in dtypes
            if not lacks(spec, dtype) and context.left_s > 0
        ]
        rows += summed_up(cases, f"{name} attention")
    if device.type == "cuda":
        from gristmill.engine.gpu.checks import checks

        found = [_tried(check) for check in checks(device) if context.left_s > 0]
        rows += summed_up(found, "GPU kernels, case by case,")
    return rows


def _tried(check: Check) -> Row:
    """A kernel that does not even compile is wrong, and costs no other its turn."""
    try:
        return case(check.name, check.difference(), check.tolerance)
    except Exception as exc:  # noqa: BLE001  (whatever a compiler or a driver says)
        traceback.print_exc()
        return case(f"{check.name}: {type(exc).__name__}", float("nan"), check.tolerance)


def backends(device: torch.device) -> Iterator[tuple[str, Make, Lacks]]:
    """Those that this device has, by name."""
    yield "torch", TorchAttention, lambda _spec, _dtype: False
    if device.type == "cuda":
        from gristmill.engine.attention.triton_backend import TritonAttention

        yield "triton", TritonAttention, lambda _spec, _dtype: False
    if device.type == "cpu":
        from gristmill.engine.attention.native_backend import NativeAttention, unsupported
        from gristmill.engine.native.library import load
        from gristmill.schemas.home import default_home

        library = load(default_home() / "kernels", torch.float32, torch.get_num_threads())
        if library is not None:
            yield (
                "cpu",
                lambda spec, block, length, _device: NativeAttention(spec, block, length, library),
                lambda spec, dtype: dtype != torch.float32 or unsupported(spec) is not None,
            )


def specs(*, tiny: bool) -> Iterator[tuple[str, ModelSpec]]:
    """What attention may be asked for: heads and groups of all sizes, norms, windows, caps, slopes."""
    shapes = [(6, 2, 16)] if tiny else [(32, 8, 128), (16, 8, 128), (14, 2, 64), (9, 3, 64), (8, 8, 96)]
    for heads, kv_heads, dim in shapes:
        yield f"{heads}/{kv_heads}/{dim}", spec_of(heads, kv_heads, dim)
    plain = spec_of(*shapes[0])
    yield "window", replace(plain, windows=(24,))
    yield "softcap", replace(plain, softcap=20.0)
    yield "window and softcap", replace(plain, windows=(24,), softcap=20.0)
    slopes = tuple(2.0 ** -(8 * (i + 1) / plain.num_heads) for i in range(plain.num_heads))
    yield "alibi", replace(plain, alibi=slopes, ropes=(None,))
    yield "no positions", replace(plain, ropes=(None,))
    yield "partial rotation", replace(plain, ropes=(RopeSpec(rotary_dim=plain.head_dim // 2),))
    yield "norms of q and k", replace(plain, qk_norm="head")
    if not tiny:
        yield "16/4/256", spec_of(16, 4, 256)
        yield "71/1/64", spec_of(71, 1, 64)


def spec_of(heads: int, kv_heads: int, dim: int) -> ModelSpec:
    return ModelSpec(
        family="check",
        vocab_size=1,
        hidden_size=heads * dim,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        intermediate_size=1,
        norm_eps=1e-6,
        max_positions=4096,
        tied_embeddings=True,
        ropes=(RopeSpec(),),
        windows=(None,),
        eos_token_ids=(),
    )


def compare(what: str, make: Make, spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> Row:
    """The worst difference over a few steps."""
    block, length = 16, 2048
    ours = make(spec, block, length, device)
    theirs = TorchAttention(spec, block, length, torch.device("cpu"))
    longest = [1, 15, 16, 17, 200, 700] if device.type == "cuda" else [1, 15, 16, 17, 70]
    generator = torch.Generator().manual_seed(0)
    seqs = _sequences([n + 6 for n in longest], block, generator)
    blocks = 1 + max(max(seq.block_table) for seq in seqs)
    for backend, where, kind in ((ours, device, dtype), (theirs, torch.device("cpu"), torch.float32)):
        backend.use(KVCache.allocate(1, blocks, backend.block_shape(), kind, where))
    norms = [torch.randn(spec.head_dim, generator=generator) if spec.qk_norm else None for _ in range(2)]
    worst = 0.0
    for step in range(4):
        work = _mixed(seqs, longest, step)
        rows = sum(piece.count for piece in work)
        qkv = torch.randn(rows, spec.q_size + 2 * spec.kv_size, generator=generator).to(dtype)
        found = _attend(ours, work, block, device, qkv.to(device), norms)
        expected = _attend(theirs, work, block, torch.device("cpu"), qkv.float(), norms)
        off = (found.float().cpu() - expected).abs() / (1 + expected.abs())
        worst = max(worst, off.max().item()) if not off.isnan().any() else float("nan")
        for piece in work:
            piece.seq.computed += piece.count
    return case(what, worst, TOLERANCE[dtype])


def _attend(
    backend: Attention, work: list[Feed], block: int, device: torch.device, qkv: Tensor, norms: list[Any]
) -> Tensor:
    backend.begin(pack(work, block, device))
    q_norm, k_norm = (None if norm is None else norm.to(qkv) for norm in norms)
    return backend.attend(0, qkv.clone(), q_norm, k_norm)


def _sequences(lengths: Sequence[int], block: int, generator: torch.Generator) -> list[Fed]:
    """Blocks in any order."""
    needed = [-(-n // block) for n in lengths]
    free = torch.randperm(sum(needed), generator=generator).tolist()
    return [Fed([0] * n, [free.pop() for _ in range(k)]) for n, k in zip(lengths, needed, strict=True)]


def _mixed(seqs: list[Fed], prompts: list[int], step: int) -> list[Feed]:
    """Half of each prompt, the other half beside those that decode already, then a token each."""
    work: list[Feed] = []
    for seq, prompt in zip(seqs, prompts, strict=True):
        half = max(1, prompt // 2)
        left = prompt - seq.computed
        count = half if step == 0 else max(1, left) if step == 1 else 1
        work.append(Feed(seq, count))
    return work


# ---- quantized layers


def quantized(context: Context) -> list[Row]:
    """Layers over packed weights on this device against the weights' meaning in float32."""
    device = torch.device(context.device)
    shapes = [(96, 64)] if context.tiny else [(1536, 4096), (4096, 1024), (544, 896)]
    sizes = (1, 5) if context.tiny else (1, 3, 16, 65, 300)
    cases: list[Row] = []
    for rows, columns in shapes:
        generator = torch.Generator().manual_seed(rows)
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        for name, pack_weight in packings().items():
            packed = pack_weight(weight.to(device))
            meaning = packed.dense(torch.float32).cpu()
            for dtype in (torch.bfloat16, torch.float16):
                if context.device == "cpu" and dtype == torch.float16:
                    continue
                cases.append(
                    _layer_case(f"{name}, {rows}x{columns}, {str(dtype)[6:]}", packed, meaning, dtype, sizes)
                )
    return summed_up(cases, "quantized layers")


def packings() -> dict[str, Callable[[Tensor], Packed]]:
    """Each packed form that a checkpoint, or ``--quantize``, ends up in."""
    grouped = {f"{bits} bits in groups": partial(_grouped, bits) for bits in (2, 3, 4, 8)}
    return {
        **ON_LOAD,
        **grouped,
        "4 bits, act-order": partial(_grouped, 4, shuffled=True),
        "fp8 in blocks": _fp8_blocks,
        "int8, symmetric": Int8.nearest,
    }


def _grouped(bits: int, weight: Tensor, *, shuffled: bool = False) -> Grouped:
    rows, columns = weight.shape
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator)
    groups = columns // 32
    scales = (torch.rand(rows, groups, generator=generator) + 0.5) / columns**0.5 / (1 << bits)
    zeros = torch.randint(0, 1 << bits, (rows, groups), generator=generator).float()
    order = torch.randperm(columns, generator=generator) if shuffled else None
    parts = [part.to(weight.device) for part in (codes, scales.half().float(), zeros)]
    return Grouped.of(bits, *parts, None if order is None else order.to(weight.device))


def _fp8_blocks(weight: Tensor) -> Fp8:
    rows, columns = weight.shape
    scales = torch.full((-(-rows // 128), -(-columns // 128)), 1 / 448, device=weight.device)
    return Fp8.of((weight * 448).to(torch.float8_e4m3fn), scales, 128, 128)


def _layer_case(name: str, packed: Packed, meaning: Tensor, dtype: torch.dtype, sizes: Sequence[int]) -> Row:
    """W8A8 rounds its inputs to 8 bits, FP8 arithmetic to 4: both count as 4 % of a row's size."""
    layer = packed.linear(dtype, None)
    allowed = 0.06 if name.startswith(("int8,", "fp8")) else 0.015
    worst = 0.0
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        x = torch.randn(size, meaning.shape[1], generator=generator).to(dtype)
        expected = x.float() @ meaning.T
        found = layer(x.to(packed.device)).float().cpu()
        off = ((found - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
        worst = off if off != off else max(worst, off)
    return case(name, worst, allowed)


# ---- engines


def engines(context: Context) -> list[Row]:
    """Tiny models in float32: the same tokens on this device as on the CPU in plain torch, however run."""
    cases: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for family in ("qwen3", "mistral", "llama", "qwen2")[: 1 if context.tiny else 4]:
            if context.left_s < 0:  # kernels are compiled anew for each
                cases.append(case(f"{family}: no time left", float("nan"), 0.5))
                break
            model = write_tiny(Path(directory) / family, family)
            expected = spoken(model, context, "cpu", attention="torch", **PLAIN)
            for name, knobs in VARIANTS.items():
                found = spoken(model, context, context.device, **knobs)
                wrong = sum(found[key] != expected[key] for key in expected)
                cases.append(case(f"{family}, {name}: requests that differ", float(wrong), 0.5))
    return summed_up(cases, "tiny engines in float32")


PLAIN: dict[str, Any] = {"prefix_cache": False, "speculate": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "no prefix cache, no guesses": PLAIN,
    "not ahead, launched anew": {"overlap": False, "cuda_graphs": False},
    "not ahead, replayed": {"overlap": False, "cuda_graphs": True, "speculate": 0},
    "ahead, launched anew": {"overlap": True, "cuda_graphs": False, "speculate": 0},
    "ahead, replayed": {"overlap": True, "cuda_graphs": True, "speculate": 0},
    "small steps, preempted": {
        "max_batch_prefill_tokens": 16,
        "max_num_seqs": 8,
        "max_batch_total_tokens": 160,
    },
}
"""Settings that must not change a token."""


def spoken(model: Path, context: Context, device: str, **knobs: Any) -> dict[str, list[int]]:
    """What each of a mix of requests gets."""
    settings: dict[str, Any] = {
        "max_total_tokens": 160,
        "max_batch_total_tokens": 4096,
        "max_num_seqs": 16,
        "dtype": "float32",
        "memory_fraction": 0.5,
    }
    engine = Engine(EngineSettings(model=str(model), device=device, **{**settings, **knobs}))
    asked = requests(6 if context.tiny else 16)
    for request in asked:
        engine.add(request)
    said: dict[str, list[int]] = {request.id: [] for request in asked}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            said[output.id] += output.token_ids
    engine.check()
    return said


def requests(count: int) -> list[Request]:
    """Greedy and sampled, filtered and not, prompts of all lengths; some begin alike."""
    knobs: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.9},
    ]
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(0, 256, (40,), generator=generator).tolist()
    lengths = [1, 16, 33, 90, 7, 48, 64, 15]
    return [
        Request(
            id=f"r{i}",
            prompt_ids=[
                *(shared if i % 3 == 0 else []),
                *torch.randint(0, VOCAB - 2, (lengths[i % len(lengths)],), generator=generator).tolist(),
            ][:100],
            max_tokens=24,
            ignore_eos=True,
            seed=i,
            **knobs[i % len(knobs)],
        )
        for i in range(count)
    ]
