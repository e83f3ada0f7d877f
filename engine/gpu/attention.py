"""Paged attention in Triton. What it computes is written down in ``attention/torch_backend.py``.

A block of keys is [tokens, kv heads, head dim]; a slot is block * block size + offset. Names in capitals are
constants of a compilation. ``items`` is [4, n] int32: first row, tokens, block table, first part of scratch;
``contexts`` [n]: keys that the item's last token sees, 0 for padding.
"""

# Kernels are compiled by Triton, whose language has no types that a checker knows.
# pyright: basic, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from .kernel import kernel

LOG2E = tl.constexpr(1.4426950408889634)


@kernel(do_not_specialize=["rows"], do_not_specialize_on_alignment=["positions", "slots"])
def rope_store(
    qkv,
    keys,
    values,
    positions,
    slots,
    cos,
    sin,
    q_weight,
    k_weight,
    key_scales,
    value_scales,
    eps,
    rows,
    FIRST: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    ROPE: tl.constexpr,
    NORM: tl.constexpr,
    TOP: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Norm and rotate queries in place, keys on their way to the cache, and values as they are.

    Grid: heads of all rows, BLOCK at a time; of a row those from FIRST on, queries then keys. Slot -1: no
    place in the cache. WIDE: a power of two, half a head or more. TOP, WHOLE: kv_numbers.py; 0: as they are.
    """
    half: tl.constexpr = DIM // 2
    each: tl.constexpr = HEADS + KV_HEADS - FIRST
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, head = number // each, FIRST + (number % each).to(tl.int32)
    there, is_key = row < rows, (head >= HEADS)[:, None]
    d = tl.arange(0, WIDE)[None, :]
    inside = there[:, None] & (d < half)
    at = qkv + (row * ((HEADS + 2 * KV_HEADS) * DIM) + head * DIM)[:, None] + d
    low, high = tl.load(at, mask=inside, other=0.0), tl.load(at + half, mask=inside, other=0.0)
    kind = low.dtype
    if NORM or ROPE:
        a, b = low.to(tl.float32), high.to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(a * a + b * b, 1) / DIM + eps)[:, None]
            a *= scale * _either(is_key, k_weight, q_weight, d, d < half)
            b *= scale * _either(is_key, k_weight, q_weight, d + half, d < half)
            a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)
        if ROPE:
            turn = (tl.load(positions + row, mask=there, other=0) * half)[:, None] + d
            c, s = tl.load(cos + turn, mask=inside, other=0.0), tl.load(sin + turn, mask=inside, other=0.0)
            a, b = a * c - b * s, b * c + a * s
        low, high = a.to(kind), b.to(kind)
        tl.store(at, low, mask=inside & (is_key == 0))
        tl.store(at + half, high, mask=inside & (is_key == 0))
    slot = tl.load(slots + row, mask=there, other=-1)
    kept = inside & is_key & (slot >= 0)[:, None]
    to = ((slot * KV_HEADS + (head - HEADS)) * DIM)[:, None] + d
    at += KV_HEADS * DIM
    first, second = tl.load(at, mask=kept, other=0.0), tl.load(at + half, mask=kept, other=0.0)
    if TOP > 0:
        place = (slot // PAGE * KV_HEADS + (head - HEADS)) * PAGE + slot % PAGE
        one = there & (head >= HEADS) & (slot >= 0)
        low, high, scale = _in_a_byte(low, high, TOP, WHOLE)
        tl.store(key_scales + place, scale, mask=one)
        first, second, scale = _in_a_byte(first, second, TOP, WHOLE)
        tl.store(value_scales + place, scale, mask=one)
    tl.store(keys + to, low.to(keys.dtype.element_ty), mask=kept)
    tl.store(keys + to + half, high.to(keys.dtype.element_ty), mask=kept)
    tl.store(values + to, first.to(values.dtype.element_ty), mask=kept)
    tl.store(values + to + half, second.to(values.dtype.element_ty), mask=kept)


@triton.jit
def _in_a_byte(low, high, TOP: tl.constexpr, WHOLE: tl.constexpr):
    """Both halves of heads divided by each head's scale, float32, and the scales."""
    a, b = low.to(tl.float32), high.to(tl.float32)
    scale = tl.maximum(tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1)), 1e-30) * (1 / TOP)
    a = tl.minimum(tl.maximum(a / scale[:, None], -TOP), TOP)
    b = tl.minimum(tl.maximum(b / scale[:, None], -TOP), TOP)
    if WHOLE:  # at this size float32 has no fractions: rounded to nearest even
        a, b = (a + 12582912.0) - 12582912.0, (b + 12582912.0) - 12582912.0
    return a, b, scale


@triton.jit
def _either(is_first, first, second, place, inside):
    """float32 of one of two arrays, row by row."""
    one = tl.load(first + place, mask=inside, other=0.0).to(tl.float32)
    return tl.where(is_first, one, tl.load(second + place, mask=inside, other=0.0).to(tl.float32))


@kernel(
    do_not_specialize=["n", "table_stride"],
    do_not_specialize_on_alignment=["items", "contexts", "tables"],
)
def attend(
    out,
    partial,
    lse,
    qkv,
    keys,
    values,
    tables,
    items,
    contexts,
    slopes,
    key_scales,
    value_scales,
    n,
    table_stride,
    scale,
    cap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALED: tl.constexpr,
):
    """A tile of one sequence's tokens, all query heads of a key head, against a run of its keys.

    Grid: items, key heads, runs of SPLIT keys (1 where SPLIT is 0: all keys). A tile has BLOCK_M // group
    tokens at most. What has several runs is left in ``partial`` [parts, heads, dim] and ``lse``
    [parts, heads], in float32 and base 2, for ``merge``: part = first + run * tokens + token.
    """
    group: tl.constexpr = HEADS // KV_HEADS
    item, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(items + item).to(tl.int64)
    count = tl.load(items + n + item)
    table = tables + tl.load(items + 2 * n + item).to(tl.int64) * table_stride
    context = tl.load(contexts + item)
    start = context - count
    low, high, run, runs = _run(start, context, WINDOW, SPLIT)
    if run > 0 and run >= runs:
        return

    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, WIDE)
    token, head = m // group, kv_head * group + m % group
    inside = (token < count)[:, None] & (d < DIM)[None, :]
    at = (row + token)[:, None] * ((HEADS + 2 * KV_HEADS) * DIM) + head[:, None] * DIM + d[None, :]
    q = tl.load(qkv + at, mask=inside, other=0.0)
    slope = tl.load(slopes + head, mask=token < count, other=0.0) if ALIBI else 0.0
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDE], tl.float32)
    keys += kv_head * DIM
    values += kv_head * DIM
    key_scales += kv_head * PAGE
    value_scales += kv_head * PAGE
    # Whole tiles that every token sees need no mask; with a window there is none that can be counted on.
    begin = low // BLOCK_N * BLOCK_N
    plain = begin
    if WINDOW == 0:
        plain += tl.maximum(tl.minimum(start + 1, high) - begin, 0) // BLOCK_N * BLOCK_N
        acc, top, total = _keys(
            acc, top, total, q, slope, start + token, keys, values, key_scales, value_scales, table,
            scale, cap, begin, plain, low, high, KV_HEADS, DIM, WIDE, PAGE, 0, SOFTCAP, ALIBI, BLOCK_N,
            SCALED, False,
        )  # fmt: skip
    acc, top, total = _keys(
        acc, top, total, q, slope, start + token, keys, values, key_scales, value_scales, table,
        scale, cap, plain, high, low, high, KV_HEADS, DIM, WIDE, PAGE, WINDOW, SOFTCAP, ALIBI, BLOCK_N,
        SCALED, True,
    )  # fmt: skip

    acc = acc * tl.where(total > 0, 1 / tl.where(total > 0, total, 1), 0)[:, None]
    if SPLIT > 0 and runs > 1:
        part = (tl.load(items + 3 * n + item) + run * count + token).to(tl.int64) * HEADS + head
        weight = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1)), float("-inf"))
        tl.store(lse + part, weight, mask=token < count)
        tl.store(partial + part[:, None] * DIM + d[None, :], acc, mask=inside)
    else:
        to = (row + token)[:, None] * (HEADS * DIM) + head[:, None] * DIM + d[None, :]
        tl.store(out + to, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _run(start, context, WINDOW: tl.constexpr, SPLIT: tl.constexpr):
    """First key and end of this program's run of keys; its number, and how many runs the item has.

    Runs end at multiples of SPLIT: a sequence's arithmetic depends on its own length alone.
    """
    low, high = start * 0, context
    if WINDOW > 0:
        low = tl.maximum(start + 1 - WINDOW, 0)
    run, runs = start * 0, start * 0 + 1
    if SPLIT > 0:
        before = low // SPLIT
        run, runs = tl.program_id(2), tl.cdiv(context, SPLIT) - before
        low = tl.maximum(low, (before + run) * SPLIT)
        high = tl.minimum(high, (before + run + 1) * SPLIT)
    return low, high, run, runs


@triton.jit
def _keys(
    acc,
    top,
    total,
    q,
    slope,
    position,
    keys,
    values,
    key_scales,
    value_scales,
    table,
    scale,
    cap,
    begin,
    end,
    low,
    high,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    PAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Go on with the online softmax over keys ``begin`` to ``end``; those outside low…high are not there.

    Not MASKED: each query sees each of these keys.
    """
    d = tl.arange(0, WIDE)
    for first in range(begin, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        there = (n >= low) & (n < high)
        block = tl.load(table + n // PAGE, mask=there, other=0) if MASKED else tl.load(table + n // PAGE)
        place = ((block.to(tl.int64) * PAGE + n % PAGE) * (KV_HEADS * DIM))[:, None] + d[None, :]
        if MASKED:  # what lies there may be no number
            k = tl.load(keys + place, mask=there[:, None] & (d < DIM)[None, :], other=0.0)
            v = tl.load(values + place, mask=there[:, None] & (d < DIM)[None, :], other=0.0)
        elif DIM < WIDE:
            k = tl.load(keys + place, mask=(d < DIM)[None, :], other=0.0)
            v = tl.load(values + place, mask=(d < DIM)[None, :], other=0.0)
        else:
            k = tl.load(keys + place)
            v = tl.load(values + place)
        if SCALED:
            k, v = k.to(q.dtype), v.to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SCALED:
            scaled = block.to(tl.int64) * (KV_HEADS * PAGE) + n % PAGE
            scores *= tl.load(key_scales + scaled, mask=there, other=0.0)[None, :]
        back = position[:, None] - n[None, :]
        if SOFTCAP:
            scores = cap * (1 - 2 / (tl.exp2(scores * (2 * LOG2E * scale / cap)) + 1))  # cap * tanh
        elif ALIBI:
            scores *= scale
        if ALIBI:
            scores -= slope[:, None] * back
        scores *= LOG2E if SOFTCAP or ALIBI else LOG2E * scale
        if MASKED:
            seen = there[None, :] & (back >= 0)
            if WINDOW > 0:
                seen &= back < WINDOW
            scores = tl.where(seen, scores, float("-inf"))
        new = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new == float("-inf"), 0.0, new) if MASKED else new  # a row may have seen nothing yet
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        if SCALED:
            weights *= tl.load(value_scales + scaled, mask=there, other=0.0)[None, :]
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new
    return acc, top, total


@kernel(do_not_specialize=["n"], do_not_specialize_on_alignment=["items", "contexts"])
def merge(
    out,
    partial,
    lse,
    items,
    contexts,
    n,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Join the runs of what ``attend`` has cut. Grid: items, tokens, heads."""
    item, token, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count, context = tl.load(items + n + item), tl.load(contexts + item)
    low = context * 0
    if WINDOW > 0:
        low = tl.maximum(context - count + 1 - WINDOW, 0)
    runs = tl.cdiv(context, SPLIT) - low // SPLIT
    if (token >= count) | (runs <= 1):
        return
    first = tl.load(items + 3 * n + item).to(tl.int64) + token
    d = tl.arange(0, WIDE)
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([WIDE], tl.float32)
    for begin in range(0, runs, BLOCK_P):
        run = begin + tl.arange(0, BLOCK_P)
        place = (first + run * count) * HEADS + head
        logs = tl.load(lse + place, mask=run < runs, other=float("-inf"))
        new = tl.maximum(top, tl.max(logs, 0))
        base = tl.where(new == float("-inf"), 0.0, new)
        weights, fade = tl.exp2(logs - base), tl.exp2(top - base)
        inside = (run < runs)[:, None] & (d < DIM)[None, :]
        x = tl.load(partial + place[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade + tl.sum(x * weights[:, None], 0)
        top = new
    row = tl.load(items + item).to(tl.int64) + token
    acc = acc / total
    tl.store(out + (row * HEADS + head) * DIM + d, acc.to(out.dtype.element_ty), mask=d < DIM)
