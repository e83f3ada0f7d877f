"""Both attention backends against attention as the textbook writes it, over awkward sizes."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from gristmill.engine.attention.backend import Attention
from gristmill.engine.attention.native_backend import NativeAttention
from gristmill.engine.attention.native_work import (
    SHARED_TOKENS,
    SHARING_COUNT,
    SPLIT_TOKENS,
    Work,
    plan_work,
)
from gristmill.engine.attention.torch_backend import TorchAttention
from gristmill.engine.batch import pack
from gristmill.engine.kv_cache import KVCache
from gristmill.engine.kv_numbers import FP8, INT8, Numbers, dequantize, quantize
from gristmill.engine.layers.elementwise import TorchElementwise
from gristmill.engine.layers.linear import linear
from gristmill.engine.layers.rope import tables
from gristmill.engine.models.spec import ModelSpec, RopeSpec
from gristmill.engine.native.build import find_compiler
from gristmill.engine.native.library import Library, load
from gristmill.schemas.settings import default_home
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ..support.emulated import EmulatedLibrary, arm
from ..support.feeding import Fed, Piece
from ..support.flavours import cpu_flags, is_arm, kernel_target

pytestmark = pytest.mark.usefixtures("one_thread")  # the kernels get their own number of threads

CPU = torch.device("cpu")
MAX_LEN = 1200


def library(dtype: torch.dtype, threads: int = 1) -> Library:
    if is_arm():
        return EmulatedLibrary(arm(kernel_target()), dtype)
    found = load(default_home() / "kernels", dtype, threads, kernel_target())
    if found is None and find_compiler() is None:
        pytest.skip("no C++ compiler: the engine runs on torch here")
    assert found is not None, "the native kernels could not be built"
    return found


def spec_of(
    heads: int, kv_heads: int, dim: int, window: int | None = None, qk_norm: bool = False, **more: Any
) -> ModelSpec:
    return ModelSpec(
        family="test",
        vocab_size=8,
        hidden_size=heads * dim,
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        intermediate_size=8,
        norm_eps=1e-5,
        max_positions=MAX_LEN,
        tied_embeddings=True,
        qk_norm="head" if qk_norm else None,
        windows=(window,),
        eos_token_ids=(),
        **{"ropes": (RopeSpec(),)} | more,
    )


def backend(
    kind: str, spec: ModelSpec, dtype: torch.dtype, block: int, blocks: int, numbers: Numbers | None = None
) -> Attention:
    if kind == "torch":
        made: Attention = TorchAttention(spec, block, MAX_LEN, CPU, numbers=numbers)
    else:
        how = {"uniform": kind == "cpu-uniform", "share": kind != "cpu-apart"}
        made = NativeAttention(spec, block, MAX_LEN, library(dtype), numbers=numbers, **how)
    kept, scales = (numbers.dtype, (spec.num_kv_heads, block)) if numbers else (dtype, ())
    cache = KVCache.allocate(1, blocks, made.block_shape(), kept, CPU, scales)
    for tensor in cache.tensors:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))  # what an earlier, broken sequence may have left behind
    made.use(cache)
    return made


def textbook(
    qkv: Tensor,
    first: int,
    spec: ModelSpec,
    norms: tuple[Tensor, Tensor] | None,
    numbers: Numbers | None = None,
) -> Tensor:
    """Output rows ``first``.. of one sequence from all its qkv rows, in float64, one softmax per row."""
    n = len(qkv)
    heads = qkv.double().view(n, -1, spec.head_dim)
    q, k, v = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    if norms:
        q, k = (
            x * (x.square().mean(-1, True) + spec.norm_eps).rsqrt() * w
            for x, w in zip((q, k), norms, strict=True)
        )
    if spec.ropes[0]:
        cos, sin = (t[:n, None].double() for t in tables(spec.ropes[0], spec.head_dim, n))
        q, k = (
            torch.cat((a * cos - b * sin, b * cos + a * sin), -1) for a, b in (q.chunk(2, -1), k.chunk(2, -1))
        )
    if numbers:
        k, v = (dequantize(*quantize(x, numbers), torch.float64) for x in (k, v))
    k, v = (x.repeat_interleave(spec.group, 1) for x in (k, v))
    slopes = torch.tensor(spec.alibi or [0.0] * spec.num_heads, dtype=torch.float64)[:, None]
    out = torch.zeros(n - first, spec.num_heads, spec.head_dim, dtype=torch.float64)
    for at in range(first, n):
        oldest = 0 if spec.windows[0] is None else max(0, at + 1 - spec.windows[0])
        scores = torch.einsum("hd,chd->hc", q[at], k[oldest : at + 1]) * spec.scale
        if spec.softcap is not None:
            scores = spec.softcap * (scores / spec.softcap).tanh()
        scores -= slopes * torch.arange(at - oldest, -1, -1)
        out[at - first] = torch.einsum("hc,chd->hd", scores.softmax(-1), v[oldest : at + 1])
    return out.flatten(1)


def assert_equal_to_textbook(
    kind: str,
    spec: ModelSpec,
    dtype: torch.dtype,
    lengths: list[int],
    *,
    block: int = 16,
    seed: int = 0,
    chunk: int = 90,
    numbers: Numbers | None = None,
    knows: bool = True,
    tolerance: dict[str, float] | None = None,
) -> None:
    """Feed random qkv rows of several sequences in random chunks, check the rows of every step.

    ``knows``: the textbook keeps keys and values as ``numbers``, too.
    """
    draw = random.Random(seed)
    torch.manual_seed(seed)
    needed = [-(-n // block) for n in lengths]
    free = list(range(sum(needed)))
    draw.shuffle(free)
    made = backend(kind, spec, dtype, block, len(free), numbers)
    width = spec.q_size + 2 * spec.kv_size
    rows = [torch.randn(n, width).to(dtype) for n in lengths]
    fed = [Fed([0] * n, [free.pop() for _ in range(count)]) for n, count in zip(lengths, needed, strict=True)]
    norms = (torch.rand(spec.head_dim).to(dtype) + 0.5, torch.rand(spec.head_dim).to(dtype) + 0.5)
    q_norm, k_norm = norms if spec.qk_norm else (None, None)
    # bf16: keys, probabilities and results are each rounded to 8 bits, 2^-9 relative.
    if tolerance is None:
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-5}
    expecting = numbers if knows else None
    while left := [i for i, seq in enumerate(fed) if seq.computed < len(seq.tokens)]:
        chosen = draw.sample(left, draw.randint(1, len(left)))
        counts = [draw.choice((1, 1, min(chunk, len(fed[i].tokens) - fed[i].computed))) for i in chosen]
        batch = pack([Piece(fed[i], n) for i, n in zip(chosen, counts, strict=True)], block, CPU)
        qkv = torch.cat(
            [rows[i][fed[i].computed : fed[i].computed + n] for i, n in zip(chosen, counts, strict=True)]
        )
        made.begin(batch)
        out = made.attend(0, qkv.clone(), q_norm, k_norm)
        for i, n, part in zip(chosen, counts, out.split(counts), strict=True):
            first, fed[i].computed = fed[i].computed, fed[i].computed + n
            expected = textbook(
                rows[i][: fed[i].computed], first, spec, norms if spec.qk_norm else None, expecting
            )
            torch.testing.assert_close(part.double(), expected, **tolerance)


SHAPES = [(9, 3, 64), (4, 4, 32), (8, 1, 80), (4, 2, 128), (5, 5, 20), (6, 2, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
@pytest.mark.parametrize("kind", ["torch", "cpu"])
def test_any_shape_equals_the_textbook(
    kind: str, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    assert_equal_to_textbook(kind, spec_of(heads, kv_heads, dim), dtype, [1, 2, 15, 16, 17, 63, 65, 100])


@pytest.mark.parametrize("kind", ["torch", "cpu"])
@pytest.mark.parametrize("window", [1, 7, 64, 100])
def test_a_sliding_window_hides_what_is_further_back(kind: str, window: int) -> None:
    spec = spec_of(6, 3, 16, window)
    assert_equal_to_textbook(kind, spec, torch.float32, [1, 64, 90, 210], seed=window)


BENT: dict[str, dict[str, Any]] = {
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi": tuple(2.0 ** -(i + 1) for i in range(6))},
    "both": {"softcap": 20.0, "alibi": (0.3, 0.0, 0.05, 0.01, 1.0, 0.2), "attention_scale": 0.25},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["torch", "cpu", "cpu-uniform"])
@pytest.mark.parametrize(("bend", "window"), [("softcap", None), ("alibi", 90), ("both", 600)])
def test_scores_are_capped_and_biased_in_prefill_in_decode_and_in_pieces(
    kind: str, bend: str, window: int | None, dtype: torch.dtype
) -> None:
    spec = spec_of(6, 2, 32, window, **BENT[bend])
    lengths = [17, 70, SPLIT_TOKENS + 3]
    assert_equal_to_textbook(kind, spec, dtype, lengths, chunk=SPLIT_TOKENS - 1, seed=len(bend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["torch", "cpu", "cpu-uniform"])
@pytest.mark.parametrize("numbers", [INT8, FP8], ids=["int8", "fp8"])
def test_keys_and_values_in_fewer_bits_are_rounded_and_nothing_else(
    numbers: Numbers, kind: str, dtype: torch.dtype
) -> None:
    """Without rotation the textbook rounds the same numbers, so that outputs are equal, not just near."""
    bent: dict[str, Any] = {"softcap": 20.0, "alibi": (0.3, 0.0, 0.05, 0.01, 1.0, 0.2)}
    for spec in (spec_of(6, 2, 64, ropes=(None,)), spec_of(6, 3, 20, 100, ropes=(None,), **bent)):
        assert_equal_to_textbook(kind, spec, dtype, [1, 17, 70, 515], chunk=511, numbers=numbers, block=32)


@pytest.mark.parametrize("kind", ["torch", "cpu"])
@pytest.mark.parametrize(("numbers", "tolerance"), [(INT8, 0.03), (FP8, 0.15)], ids=["int8", "fp8"])
def test_fewer_bits_stay_near_what_they_were(numbers: Numbers, tolerance: float, kind: str) -> None:
    spec = spec_of(9, 3, 64, qk_norm=True)
    near = {"rtol": 0.0, "atol": tolerance}
    assert_equal_to_textbook(
        kind, spec, torch.float32, [1, 17, 100], numbers=numbers, knows=False, tolerance=near
    )


@pytest.mark.parametrize("kind", ["torch", "cpu"])
def test_an_odd_head_has_a_last_dimension(kind: str) -> None:
    for dim, dtype in ((1, torch.float32), (9, torch.bfloat16), (33, torch.float32)):
        spec = spec_of(4, 2, dim, qk_norm=True, ropes=(None,))
        assert_equal_to_textbook(kind, spec, dtype, [3, 40, 70])


@pytest.mark.parametrize("kind", ["torch", "cpu"])
def test_head_norms_come_before_the_rotation(kind: str) -> None:
    assert_equal_to_textbook(kind, spec_of(4, 2, 24, qk_norm=True), torch.float32, [3, 40, 129])


@pytest.mark.parametrize("window", [None, 300])
def test_long_decode_rows_are_cut_and_merged(window: int | None) -> None:
    spec = spec_of(2, 1, 32, window)
    lengths = [SPLIT_TOKENS - 1, SPLIT_TOKENS + 3, 2 * SPLIT_TOKENS + 2]
    assert_equal_to_textbook("cpu", spec, torch.float32, lengths, chunk=SPLIT_TOKENS - 1, block=32)


SHARED = 3 * SHARED_TOKENS // 2


@pytest.mark.parametrize(
    ("spec", "dtype", "numbers"),
    [
        (spec_of(9, 3, 64), torch.bfloat16, None),
        (spec_of(6, 2, 32, 150, **BENT["both"]), torch.float32, None),
        (spec_of(6, 2, 32, 150, **BENT["both"]), torch.bfloat16, None),
        (spec_of(4, 4, 20, ropes=(None,)), torch.float32, INT8),
        (spec_of(4, 4, 64, ropes=(None,)), torch.bfloat16, INT8),
    ],
    ids=["bf16", "bent in a window", "bent in a window, bf16", "int8", "int8, bf16"],
)
@pytest.mark.parametrize("kind", ["cpu", "cpu-apart"])
def test_rows_that_begin_alike_read_together_what_they_would_alone(
    kind: str, spec: ModelSpec, dtype: torch.dtype, numbers: Numbers | None
) -> None:
    torch.manual_seed(0)
    width, rows, own = spec.q_size + 2 * spec.kv_size, 7, 300
    prefix, tails = torch.randn(SHARED, width).to(dtype), torch.randn(rows, own, width).to(dtype)
    common, each = list(range(SHARED // 16)), -(-own // 16)
    fed = [
        Fed([0] * (SHARED + own), common + [len(common) + i * each + n for n in range(each)])
        for i in range(rows)
    ]
    made = backend(kind, spec, dtype, 16, len(common) + rows * each, numbers)
    made.begin(pack([Piece(fed[0], SHARED)], 16, CPU))
    made.attend(0, prefix.clone(), None, None)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    at = SHARED
    while at < SHARED + own:
        long = at % 3 == 0  # a stretch, whose rows are many; then guesses, of which one is right
        counts = [min(67 if long else 1 + (i * at) % 5, SHARED + own - at) for i in range(rows)]
        at += (least := min(counts))
        for seq in fed:
            seq.computed = at - least
        batch = pack([Piece(seq, n) for seq, n in zip(fed, counts, strict=True)], 16, CPU)
        together = kind == "cpu" and max(counts) <= SHARING_COUNT
        assert bool(_together(plan_work(batch, 16, 4, share=kind == "cpu"))) == together
        done = at - least - SHARED
        made.begin(batch)
        new = [tails[i, done : done + n] for i, n in enumerate(counts)]
        out = made.attend(0, torch.cat(new), None, None).split(counts)
        for i, part in enumerate(out):
            known = torch.cat([prefix, tails[i, : done + counts[i]]])
            expected = textbook(known, SHARED + done, spec, None, numbers)
            torch.testing.assert_close(part.double(), expected, rtol=tolerance, atol=tolerance)


def _together(work: Work) -> list[tuple[int, int]]:
    """Items whose queries are several rows' first ones: keys from, to."""
    firsts = {row: part for row, part, _ in work.merges.tolist()}
    queries = work.queries.tolist()
    return [
        (begin, end)
        for first, count, _, begin, end in work.items.tolist()
        if begin == 0 and all(firsts.get(row) == part for row, _, part in queries[first : first + count])
    ]


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 90), st.sampled_from([1, 1, 1, 2, 5, 17, 70])),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([1, 3, 16]),
    st.booleans(),
)
def test_every_query_meets_every_key_before_it_once(
    drawn: list[tuple[int, int, int]], tile: int, share: bool
) -> None:
    """Rows: with how many quarters of a document of 12 blocks they begin, what follows, and tokens fed."""
    fresh = itertools.count(100)
    pieces: list[Piece] = []
    for quarters, more, count in drawn:
        computed = quarters * 64 + more
        blocks = list(range(quarters * 4)) + list(itertools.islice(fresh, -(-(more + count) // 16)))
        pieces.append(Piece(Fed([0] * (computed + count), blocks, computed), count))
    batch = pack(pieces, 16, CPU)
    work = plan_work(batch, 16, tile, split=112, share=share)
    seen: dict[int, list[tuple[int, int, int]]] = {}
    for first, count, table, begin, end in work.items.tolist():
        for row, position, part in work.queries[first : first + count].tolist():
            owner = int(np.searchsorted(batch.first_row, row, side="right")) - 1
            assert position == batch.starts[owner] + row - batch.first_row[owner]
            used = slice(begin // 16, -(-min(end, position + 1) // 16))
            assert (batch.tables[table, used] == batch.tables[owner, used]).all()
            seen.setdefault(row, []).append((begin, end, part))
    merged = {row: range(first, first + parts) for row, first, parts in work.merges.tolist()}
    assert sorted(seen) == list(range(len(batch.tokens)))
    for row, runs in seen.items():
        runs.sort()
        assert runs[0][0] == 0
        assert all(before[1] == after[0] for before, after in itertools.pairwise(runs))
        assert runs[-1][1] > batch.positions[row]
        assert [part for *_, part in runs] == list(merged.get(row, [-1]))
    parts = sorted(itertools.chain(*merged.values()))
    assert parts == list(range(work.parts))


def test_the_native_kernel_equals_torch_at_every_context_to_300() -> None:
    """Decode token by token beside a second sequence: every place in a block and in a tile."""
    spec = spec_of(6, 2, 32)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        both = [backend(kind, spec, dtype, 16, 40) for kind in ("torch", "cpu")]
        first, second = Fed([0] * 300, list(range(19))), Fed([0] * 300, list(range(39, 19, -1)))
        torch.manual_seed(0)
        for step in range(300):
            batch = pack([Piece(first, 1), Piece(second, 1)], 16, CPU)
            qkv = torch.randn(2, spec.q_size + 2 * spec.kv_size).to(dtype)
            outs = []
            for made in both:
                made.begin(batch)
                outs.append(made.attend(0, qkv.clone(), None, None))
            torch.testing.assert_close(
                *outs, rtol=tolerance, atol=tolerance, msg=f"context {step + 1}, {dtype}"
            )
            first.computed += 1
            second.computed += 1


def test_a_row_computes_the_same_bits_alone_and_in_a_batch() -> None:
    spec = spec_of(6, 2, 32)
    torch.manual_seed(0)
    rows = torch.randn(3, 40, spec.q_size + 2 * spec.kv_size)

    def run(together: bool, threads: int) -> Tensor:
        made = NativeAttention(spec, 16, MAX_LEN, library(torch.float32, threads))
        made.use(KVCache.allocate(1, 9, made.block_shape(), torch.float32, CPU))
        fed = [Fed([0] * 40, [3 * i, 3 * i + 1, 3 * i + 2]) for i in range(3)]
        outs: list[Tensor] = []
        for group in [[0, 1, 2]] if together else [[0], [1], [2]]:
            made.begin(pack([Piece(fed[i], 40) for i in group], 16, CPU))
            outs.append(made.attend(0, torch.cat([rows[i] for i in group]), None, None))
        return torch.cat(outs)

    assert torch.equal(run(together=True, threads=2), run(together=False, threads=1))


@pytest.mark.parametrize("numbers", [None, INT8], ids=["bf16", "int8"])
@pytest.mark.parametrize("window", [None, 300])
def test_uniform_rows_are_the_same_bits_however_a_prompt_is_cut(
    window: int | None, numbers: Numbers | None
) -> None:
    spec, length = spec_of(6, 2, 64, window), 700
    torch.manual_seed(0)
    rows = torch.randn(length, spec.q_size + 2 * spec.kv_size).bfloat16()

    def run(cuts: list[int]) -> Tensor:
        made = backend("cpu-uniform", spec, torch.bfloat16, 16, 44, numbers)
        fed, outs = Fed([0] * length, list(range(44))), list[Tensor]()
        for count in [*cuts, length - sum(cuts)]:
            made.begin(pack([Piece(fed, count)], 16, CPU))
            outs.append(made.attend(0, rows[fed.computed : fed.computed + count].clone(), None, None))
            fed.computed += count
        return torch.cat(outs)

    whole = run([])
    for cuts in ([256], [1, 1, 300, 17], [511, 1, 1, 1, 90, 5]):
        assert torch.equal(run(cuts), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [1, 15, 16, 48, 577])
def test_native_norm_and_activation_equal_torch(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    ours, theirs = library(dtype), TorchElementwise()
    x, residual = torch.randn(7, size).to(dtype), torch.randn(7, size).to(dtype)
    weight = torch.rand(size).to(dtype)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(ours.rms_norm(x, weight, 1e-5), theirs.rms_norm(x, weight, 1e-5), **tolerance)
    held = [residual.clone(), residual.clone()]
    outs = [ops.rms_norm(x, weight, 1e-5, r) for ops, r in zip((ours, theirs), held, strict=True)]
    torch.testing.assert_close(*outs, **tolerance)
    assert torch.equal(*held)
    gate_up = torch.randn(5, 2 * size).mul(20).to(dtype)
    gate_up[:4, 0] = torch.tensor([-200.0, -1e38, 3e37, float("nan")])  # exp overflows unless it is clamped
    gate_up[:4, size] = 1.0
    torch.testing.assert_close(ours.silu_mul(gate_up), theirs.silu_mul(gate_up), equal_nan=True, **tolerance)


def test_attention_leaves_the_matrix_unit_as_onednn_configured_it() -> None:
    """Both use Intel's tile registers, whose shape is state of the thread."""
    spec = spec_of(4, 2, 64)
    made = NativeAttention(spec, 16, MAX_LEN, library(torch.bfloat16))
    made.use(KVCache.allocate(1, 4, made.block_shape(), torch.bfloat16, CPU))
    torch.manual_seed(0)
    layer = linear(torch.randn(96, 64).bfloat16())
    for rows in (40, 5, 21):
        x = torch.randn(rows, 64).bfloat16()
        expected = layer(x)
        made.begin(pack([Piece(Fed([0] * rows, [0, 1, 2]), rows)], 16, CPU))
        made.attend(0, torch.randn(rows, spec.q_size + 2 * spec.kv_size).bfloat16(), None, None)
        assert torch.equal(layer(x), expected)


@pytest.mark.skipif("avx2" not in cpu_flags(), reason="what is compiled here would not run")
def test_a_cpu_with_narrower_vectors_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code that AVX2, SSE and NEON get. scripts/check_kernels runs everything for each of them."""
    monkeypatch.setenv("KERNEL_TARGET", "haswell")
    for dtype in (torch.float32, torch.bfloat16):
        assert_equal_to_textbook("cpu", spec_of(9, 3, 64), dtype, [1, 17, 63, 100])
    spec = spec_of(6, 2, 32, 600, **BENT["both"])
    assert_equal_to_textbook("cpu", spec, torch.bfloat16, [17, SPLIT_TOKENS + 3], chunk=SPLIT_TOKENS - 1)
    assert_equal_to_textbook("cpu", spec_of(6, 2, 64), torch.float32, [70], numbers=INT8, block=32)
