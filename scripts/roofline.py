"""The least time a workload can take on this machine: rates measured here and now, work counted exactly.

A multiply-add counts as 2 operations. Layer linears for every token fed (input + output - 1 of a request),
the output layer only where a token is sampled, causal attention 4 * heads * head_dim * context a layer.
Bytes: all weights once a step, and the keys and values of the context once a decoded token (those of prefill
are left out). Steps: as many as the longest output, since everything decodes together. No overlap: the time
to compute plus the time to read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as nnf
from workload import Row

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 30, 576, 1536, 9, 3, 64, 49152
"""SmolLM2-135M."""
LINEARS = [(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM), (HEADS * HEAD_DIM, HIDDEN), (HIDDEN, 2 * INNER)]
LINEARS += [(INNER, HIDDEN)]
HEAD = (HIDDEN, VOCAB)
ROWS = (128, 256, 512)
TRIES, TRY_S = 5, 0.1
GIB = 1024**3


@dataclass(frozen=True)
class Limits:
    """What this machine can do at the model's shapes, each the best of five."""

    bf16_tflops: float
    int8_tops: float
    read_gb_s: float

    def rounded(self) -> dict[str, float]:
        return {name: round(value, 3) for name, value in asdict(self).items()}


def measure(threads: int) -> Limits:
    """Best rate of any operator that torch has, at any of the model's shapes, 128 rows and more."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    bf16 = int8 = 0.0
    for inner, outer in [*LINEARS, HEAD]:
        for rows in ROWS:
            operations = 2 * rows * inner * outer
            x = torch.randn(rows, inner, generator=generator)
            weight = torch.randn(outer, inner, generator=generator)
            bf16 = max(bf16, *(operations / best(run) for run in bf16_ways(x.bfloat16(), weight.bfloat16())))
            int8 = max(int8, *(operations / best(run) for run in int8_ways(x, weight)))
    memory = torch.ones(GIB // 4)
    return Limits(bf16 / 1e12, int8 / 1e12, GIB / best(memory.sum) / 1e9)


def bf16_ways(x: torch.Tensor, weight: torch.Tensor) -> Iterator[Callable[[], object]]:
    yield lambda: nnf.linear(x, weight)
    ops = torch.ops.mkldnn
    packed = ops._reorder_linear_weight(weight, len(x))
    yield lambda: ops._linear_pointwise(x, packed, None, "none", [], "")


def int8_ways(x: torch.Tensor, weight: torch.Tensor) -> Iterator[Callable[[], object]]:
    """The multiplication alone: what it costs to quantize the inputs is not part of the limit."""
    few, many = x.clamp(-1, 1).mul(127).to(torch.int8), weight.clamp(-1, 1).mul(127).to(torch.int8)
    columns = many.t().contiguous()
    yield lambda: torch._int_mm(few, columns)
    ops = torch.ops.onednn
    packed = ops.qlinear_prepack(many, None)
    unsigned = (few.to(torch.int16) + 128).to(torch.uint8)
    scales, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int64)
    yield lambda: ops.qlinear_pointwise(
        unsigned, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def best(run: Callable[[], object]) -> float:
    """Seconds: the best of five tries, each a loop."""
    run()
    started = time.perf_counter()
    run()
    loops = max(1, int(TRY_S / TRIES / max(time.perf_counter() - started, 1e-7)))
    return min(timed(run, loops) for _ in range(TRIES))


def timed(run: Callable[[], object], loops: int) -> float:
    started = time.perf_counter()
    for _ in range(loops):
        run()
    return (time.perf_counter() - started) / loops


def least_seconds(rows: Sequence[Row], limits: Limits, *, int8: bool, shared: int = 0) -> float:
    """Without overlap. ``int8``: linears, output layer and cache; attention computes in bf16 all the same.

    ``shared``: tokens at the beginning of every prompt that only the first request computes.
    """
    layer = LAYERS * sum(inner * outer for inner, outer in LINEARS)
    head = HEAD[0] * HEAD[1]
    linear = attended = read = 0
    for number, row in enumerate(rows):
        skipped = shared if number else 0
        fed = len(row.prompt_ids) + row.max_tokens - 1
        linear += 2 * (layer * (fed - skipped) + head * row.max_tokens)
        attended += sum(range(skipped + 1, fed + 1))
        read += sum(range(len(row.prompt_ids) + 1, fed + 1))
    width = 1 if int8 else 2
    steps = max(row.max_tokens for row in rows)
    size = width * (steps * (layer + head) + read * LAYERS * 2 * KV_HEADS * HEAD_DIM)
    compute = linear / (limits.int8_tops if int8 else limits.bf16_tflops)
    compute += 4 * HEADS * HEAD_DIM * LAYERS * attended / limits.bf16_tflops
    return compute / 1e12 + size / limits.read_gb_s / 1e9
