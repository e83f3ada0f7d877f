"""The benchmark's workloads, of real English that is everywhere.

W1: many prompts of mixed lengths at once. They are consecutive slices, never overlapping, of one stream of
text in random order, so that no two share a prefix. W2: prompts that share a long one. W3: one request alone.
W4: a short one, for a process that has just started. Copies: rows whose answer is a copy of what they were
given. The text is Python's language reference (``pydoc_data``); it differs a
little between versions.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pydoc_data.topics import topics

from tokenizers import Tokenizer

INPUT_TOKENS, OUTPUT_TOKENS = 220, 160
"""Means per request of W1."""
SHARED_TOKENS = 512
"""Of each request of W2."""
COPIED_TOKENS = 96
"""Of each request of the copies."""
SINGLE_TOKENS = 128
"""In and out of W3."""


@dataclass(frozen=True)
class Row:
    """One request: generate exactly ``max_tokens`` tokens after ``prompt_ids``."""

    id: str
    prompt_ids: list[int]
    max_tokens: int


def w1(tokenizer: Tokenizer, seed: int, requests: int = 128) -> list[Row]:
    """Lognormal lengths, 16 to 768 tokens in and 16 to 512 out. The same seed gives the same rows."""
    rng = random.Random(seed)
    inputs = lognormal_lengths(rng, requests, INPUT_TOKENS, 16, 768, 0.80)
    outputs = lognormal_lengths(rng, requests, OUTPUT_TOKENS, 16, 512, 0.75)
    stream = iter(text_ids(tokenizer, sum(inputs), rng))
    return [
        Row(f"w1-{i:04d}", [next(stream) for _ in range(length)], out)
        for i, (length, out) in enumerate(zip(inputs, outputs, strict=True))
    ]


def w2(tokenizer: Tokenizer, seed: int, requests: int = 128) -> list[Row]:
    """The same 512 tokens before 40 to 56 of one's own; 64 tokens out. The same seed gives the same rows."""
    rng = random.Random(seed)
    lengths = [rng.randint(40, 56) for _ in range(requests)]
    stream = iter(text_ids(tokenizer, SHARED_TOKENS + sum(lengths), rng))
    shared = [next(stream) for _ in range(SHARED_TOKENS)]
    return [
        Row(f"w2-{i:04d}", [*shared, *(next(stream) for _ in range(length))], 64)
        for i, length in enumerate(lengths)
    ]


def single(tokenizer: Tokenizer, seed: int) -> Row:
    """W3: 128 tokens in, 128 out."""
    ids = text_ids(tokenizer, SINGLE_TOKENS, random.Random(seed))
    return Row("w3", ids[:SINGLE_TOKENS], SINGLE_TOKENS)


def cold(tokenizer: Tokenizer, seed: int) -> Row:
    """W4: 16 tokens in, 1 out."""
    return Row("w4", text_ids(tokenizer, 16, random.Random(seed))[:16], 1)


def copies(tokenizer: Tokenizer, seed: int, requests: int = 128) -> list[Row]:
    """A text twice, another one and its beginning: 88 tokens out, which copy on. The same seed gives the same
    rows."""
    rng = random.Random(seed)
    stream = iter(text_ids(tokenizer, 2 * COPIED_TOKENS * requests, rng))
    rows: list[Row] = []
    for i in range(requests):
        shown, own = ([next(stream) for _ in range(COPIED_TOKENS)] for _ in range(2))
        rows.append(Row(f"copy-{i:04d}", [*shown, *shown, *own, *own[:8]], COPIED_TOKENS - 8))
    return rows


def lognormal_lengths(
    rng: random.Random, count: int, mean: float, low: int, high: int, sigma: float
) -> list[int]:
    """Clipped lognormal lengths of this mean: the draws are fixed, the location is searched."""
    draws = [rng.gauss(0, 1) for _ in range(count)]
    below, above, lengths = 0.0, 12.0, [low]
    for _ in range(60):
        location = (below + above) / 2
        lengths = [min(high, max(low, round(math.exp(location + sigma * z)))) for z in draws]
        if sum(lengths) / count < mean:
            below = location
        else:
            above = location
    return lengths


def text_ids(tokenizer: Tokenizer, count: int, rng: random.Random) -> list[int]:
    """At least ``count`` token ids of English paragraphs in random order."""
    paragraphs = [
        " ".join(paragraph.split())
        for _, topic in sorted(topics.items())
        for paragraph in topic.split("\n\n")
        if len(paragraph) > 200
    ]
    rng.shuffle(paragraphs)
    ids: list[int] = []
    for paragraph in paragraphs:
        ids += tokenizer.encode(paragraph + "\n\n", add_special_tokens=False).ids
        if len(ids) >= count:
            return ids
    raise ValueError(f"the text has {len(ids):,} tokens and {count:,} were asked for; use fewer requests")
