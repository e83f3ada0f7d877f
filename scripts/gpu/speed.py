"""How fast: the device itself, our engine on shapes of well-known models, transformers beside it."""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Request
from gristmill.engine.settings import EngineSettings
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from .report import Context, Row, free_memory
from .shapes import Asked, RandomWeights, Roofline, Shape, Sizes, fixed, mixed, shape_of

WARM_STEPS = 8
PROFILED_STEPS = 20
PHASE_TOKENS = 160
"""Of each row while steps are looked at: enough for all of these, and until the last prompt is in."""
PHASES = (
    ("attention", re.compile(r"attend|attention|flash|paged|fmha|split_kv|merge|rope", re.IGNORECASE)),
    (
        "products",
        re.compile(r"gemm|gemv|cutlass|cublas|nvjet|xmma|matmul|dot_kernel|addmm|linear|mm\b", re.IGNORECASE),
    ),
    ("sampling", re.compile(r"argmax|gumbel|sample|topk|sort|noise|amax", re.IGNORECASE)),
    ("copies", re.compile(r"memcpy|memset|copy_", re.IGNORECASE)),
)


# ---- the device


def machine(context: Context) -> list[Row]:
    """Bytes per second of a large copy, products per second of large matrices; what rooflines are made of."""
    size = 1 << (24 if context.tiny else 30)
    source = torch.empty(size, dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    context.facts["bytes_s"] = 2 * size / seconds_of(context, lambda: target.copy_(source))
    side = 256 if context.tiny else 8192
    dtype = torch.bfloat16 if context.cuda else torch.float32
    a, b = (torch.randn(side, side, device=context.device).to(dtype) for _ in range(2))
    context.facts["flops"] = 2 * side**3 / seconds_of(context, lambda: a @ b)
    rows: list[Row] = [
        {"measured": "copy, read and written", "TB/s": context.facts["bytes_s"] / 1e12, "ok": True},
        {"measured": f"{dtype} matrices of {side:,}", "TFLOP/s": context.facts["flops"] / 1e12, "ok": True},
    ]
    if context.cuda:
        context.facts["fp8_flops"] = 2 * side**3 / seconds_of(context, _fp8_product(a, b))
        rows.append(
            {
                "measured": f"fp8 matrices of {side:,}",
                "TFLOP/s": context.facts["fp8_flops"] / 1e12,
                "ok": True,
            }
        )
    return rows


def _fp8_product(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
    one = torch.ones((), device=a.device)
    x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
    return lambda: torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def seconds_of(context: Context, work: Callable[[], Any], times: int = 10) -> float:
    """Of one call, the mean of ``times`` after three to warm up."""
    for _ in range(3):
        work()
    wait(context)
    started = time.perf_counter()
    for _ in range(times):
        work()
    wait(context)
    return (time.perf_counter() - started) / times


def wait(context: Context) -> None:
    if context.cuda:
        torch.cuda.synchronize()


# ---- our engine


@dataclass(frozen=True)
class Workload:
    name: str
    asked: Sequence[Asked]


def llama_bf16(context: Context) -> list[Row]:
    return bench(context, "Llama-3.1-8B", fixed_lengths(context))


def llama_fp8(context: Context) -> list[Row]:
    return bench(context, "Llama-3.1-8B", fixed_lengths(context), quantize="fp8")


def qwen3(context: Context) -> list[Row]:
    return bench(context, "Qwen3-0.6B", [nano(context)])


def qwen25(context: Context) -> list[Row]:
    """And what running ahead and graphs are good for, where a step is shortest."""
    rows = bench(context, "Qwen2.5-0.5B", [nano(context)])
    for knobs in ({"overlap": False}, {"cuda_graphs": False}, {"overlap": False, "cuda_graphs": False}):
        free_memory(context)
        shape = shape_of("Qwen2.5-0.5B", tiny=context.tiny)
        engine = started(context, shape, [nano(context)], **knobs)
        rows.append(phases(context, engine, shape, nano(context), ", ".join(f"no {name}" for name in knobs)))
        del engine  # or the next one would be measured beside its memory
    return rows


def fixed_lengths(context: Context) -> list[Workload]:
    """The three of TensorRT-LLM's table; as many requests as run at once."""
    if context.tiny:
        return [Workload("12/16", fixed(4, 12, 16))]
    count = 64 if context.quick else 256
    return [Workload(f"{i}/{o}", fixed(count, i, o)) for i, o in ((128, 2048), (1000, 1000), (2048, 128))]


def nano(context: Context) -> Workload:
    if context.tiny:
        return Workload("4 x 4-20/4-20", mixed(4, 4, 20))
    count = 64 if context.quick else 256
    return Workload(f"{count} x 100-1024/100-1024", mixed(count, 100, 1024))


def bench(context: Context, name: str, workloads: list[Workload], quantize: str | None = None) -> list[Row]:
    """Where the time of a decode step goes, then each workload through the same engine."""
    shape = shape_of(name, tiny=context.tiny)
    engine = started(context, shape, workloads, quantize=quantize)
    step = phases(context, engine, shape, workloads[0], quantize or engine.info.dtype)
    each_s = 0.9 * context.left_s / len(workloads)
    rows = [
        throughput(context, engine, shape, load, quantize, time.monotonic() + each_s) for load in workloads
    ]
    return [*rows, step]


def started(context: Context, shape: Shape, workloads: list[Workload], **knobs: Any) -> Engine:
    """An engine for these, with random weights."""
    longest = max(one.tokens_in + one.tokens_out for load in workloads for one in load.asked)
    with tempfile.TemporaryDirectory() as directory:
        settings = EngineSettings(
            model=str(shape.write(Path(directory))),
            device=context.device,
            dtype="bfloat16" if context.cuda else "float32",
            max_num_seqs=max(len(load.asked) for load in workloads),
            max_total_tokens=max(longest, 128 + PHASE_TOKENS) + 16,
            **({} if context.cuda else {"max_batch_total_tokens": 4096}),
            **knobs,
        )
        return Engine(settings, RandomWeights)


def throughput(
    context: Context, engine: Engine, shape: Shape, load: Workload, quantize: str | None, until: float
) -> Row:
    """All at once, as many as the cache holds, until the last token or until time is up: then what was done
    so far counts."""
    if context.cuda:
        torch.cuda.reset_peak_memory_stats()
    room = engine.info.num_blocks * engine.info.block_size
    longest = max(one.tokens_in + one.tokens_out for one in load.asked)
    asked = load.asked[: max(1, room // (longest + engine.info.block_size))]
    made = dict.fromkeys(add(engine, asked, engine.info.vocab_size, load.name), 0)
    began = time.monotonic()
    steps, done = drive(context, engine, made, until)
    seconds = time.monotonic() - began
    row: Row = {
        "model": shape.name,
        "weights": quantize or engine.info.dtype,
        "in/out": load.name,
        "requests": len(asked),
        "tok/s": sum(made.values()) / seconds,
        "of roofline": None,
        "seconds": seconds,
        "steps": steps,
        "whole": done,
        "GiB": torch.cuda.max_memory_allocated() / 2**30 if context.cuda else None,
    }
    if context.facts:
        fp8 = quantize == "fp8"
        flops = context.facts.get("fp8_flops" if fp8 else "flops", context.facts["flops"])
        roofline = Roofline(context.facts["bytes_s"], flops, 1.0 if fp8 else 2.0)
        fed = [Asked(one.tokens_in, out) for one, out in zip(asked, made.values(), strict=True) if out]
        row["of roofline"] = roofline.seconds(Sizes.of(shape.config), fed, len(fed)) / seconds
    return row


def add(engine: Engine, asked: Sequence[Asked], vocab: int, name: str) -> list[str]:
    """Requests of random tokens, no two alike; greedy, since a random model's likeliest token is as good."""
    rng = random.Random(name)
    ids = [f"{name}-{i}" for i in range(len(asked))]
    for i, one in enumerate(asked):
        request = Request(
            id=ids[i],
            prompt_ids=[rng.randrange(vocab) for _ in range(one.tokens_in)],
            max_tokens=one.tokens_out,
            temperature=0.0,
            ignore_eos=True,
            arrival=float(i),
        )
        engine.add(request)
    return ids


def drive(context: Context, engine: Engine, made: dict[str, int], until: float) -> tuple[int, bool]:
    """Step until these have ended or time is up, counting their tokens: steps, and whether all ended."""
    steps = 0
    left = set(made)
    while left and time.monotonic() < until:
        steps += 1
        for output in engine.step():
            assert output.error is None, f"{output.id}: {output.error}"
            made[output.id] += len(output.token_ids)
            if output.finish:
                left.discard(output.id)
    for name in left:
        engine.abort(name)
    wait(context)
    return steps, not left


def phases(context: Context, engine: Engine, shape: Shape, load: Workload, how: str) -> Row:
    """Steps in which everybody decodes: the share of kernels by kind, and what the device waited."""
    asked = [Asked(min(one.tokens_in, 128), PHASE_TOKENS) for one in load.asked]
    ids = add(engine, asked, engine.info.vocab_size, "phases")
    count = 4 if context.tiny else PROFILED_STEPS
    for _ in range(2000):  # until all prompts are in
        engine.step()
        if engine.stats.tokens <= len(asked):
            break
    for _ in range(0 if context.tiny else WARM_STEPS):
        engine.step()
    wait(context)
    began = time.perf_counter()
    for _ in range(count):
        engine.step()
    wait(context)
    step_s = (time.perf_counter() - began) / count
    host_s = host_seconds(engine, count)
    activities = [ProfilerActivity.CUDA] if context.cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiled:
        for _ in range(count):
            engine.step()
        wait(context)
    rows, graphs = engine.stats.running, engine._runner.graphs
    for name in ids:
        engine.abort(name)
    by_kind = kernel_seconds(profiled, cuda=context.cuda)
    busy_s = sum(by_kind.values()) / count
    total = sum(by_kind.values()) or 1.0
    return {
        "decode step of": shape.name,
        "how": how,
        "rows": rows,
        "ms": 1e3 * step_s,
        "kernels, ms": 1e3 * busy_s,
        "device idle, ms": 1e3 * max(0.0, step_s - busy_s) if context.cuda else None,
        "host, ms": {part: 1e3 * seconds for part, seconds in host_s.items()},
        "graphs": graphs.recorded if graphs else None,
        "share": {kind: seconds / total for kind, seconds in by_kind.items()},
    }


def host_seconds(engine: Engine, count: int) -> dict[str, float]:
    """Of a step, by what the host did: plan, launch, wait for tokens, record."""
    spent: defaultdict[str, float] = defaultdict(float)

    def timed(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **more: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **more)
            finally:
                spent[part] += (time.perf_counter() - began) / count

        return run

    parts = {"plan": "_plan", "launch": "_draw", "record": "_record"}
    for part, name in parts.items():
        setattr(engine, name, timed(part, getattr(engine, name)))
    began = time.perf_counter()
    for _ in range(count):
        engine.step()
    whole = (time.perf_counter() - began) / count
    for name in parts.values():
        delattr(engine, name)
    return {**spent, "waiting and the rest": whole - sum(spent.values())}


def kernel_seconds(profiled: Any, *, cuda: bool) -> dict[str, float]:
    """Seconds by kind of kernel; on a CPU those of operations themselves."""
    found: defaultdict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        micros = event.self_device_time_total if cuda else event.self_cpu_time_total
        if cuda and "cuda" not in str(event.device_type).lower():
            continue
        kind = next((kind for kind, pattern in PHASES if pattern.search(event.key)), "other")
        found[kind] += micros / 1e6
    return dict(sorted(found.items(), key=lambda one: -one[1]))


# ---- transformers


def transformers_batching(context: Context) -> list[Row]:
    """``generate_batch``, which batches continuously, and our engine: same shape, same requests."""
    shape = shape_of("Qwen3-0.6B", tiny=context.tiny)
    count, tokens_in, tokens_out = (4, 12, 8) if context.tiny else (64, 256, 256)
    load = Workload(f"{tokens_in}/{tokens_out}", fixed(count, tokens_in, tokens_out))
    theirs = _theirs(context, shape, load)
    free_memory(context)
    ours = bench(context, shape.name, [load])[0]
    return [
        {"requests": count, "in/out": load.name, "model": shape.name, "by": by, "tok/s": rate, "times": times}
        for by, rate, times in (
            ("transformers", theirs, 1.0),
            ("gristmill", ours["tok/s"], ours["tok/s"] / theirs),
        )
    ]


def _theirs(context: Context, shape: Shape, load: Workload) -> float:
    """Tokens per second of the second of two calls, at most; of the first where time is short."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with tempfile.TemporaryDirectory() as directory:
        config = AutoConfig.from_pretrained(shape.write(Path(directory)))
    dtype = torch.bfloat16 if context.cuda else torch.float32
    with torch.device(context.device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    rng = random.Random(0)
    vocab = config.vocab_size
    tokens_out = load.asked[0].tokens_out
    wanted = GenerationConfig(max_new_tokens=tokens_out, do_sample=False, eos_token_id=-1, pad_token_id=0)
    rate = 0.0
    for turn in range(2):
        prompts = [[rng.randrange(vocab) for _ in range(one.tokens_in)] for one in load.asked]
        started = time.monotonic()
        with torch.inference_mode():
            found = model.generate_batch(prompts, generation_config=wanted, progress_bar=False)
        wait(context)
        seconds = time.monotonic() - started
        made = sum(len(one.generated_tokens) for one in found.values())
        assert made == len(prompts) * tokens_out, f"transformers made {made} tokens"
        rate = max(rate, made / seconds)
        if seconds > 0.3 * context.left_s and turn == 0:
            break
    return rate
