"""The benchmark's workload W1: many prompts of mixed lengths at once, of real English that is everywhere.

Prompts are consecutive slices, never overlapping, of one stream of text in random order, so that no two share
a prefix. The text is Python's language reference (``pydoc_data``); it differs a little between versions.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pydoc_data.topics import topics

from tokenizers import Tokenizer

INPUT_TOKENS, OUTPUT_TOKENS = 220, 160
"""Means per request."""


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
