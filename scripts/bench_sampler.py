"""Microseconds a row: a batch that asks for nothing, and the same batch where every row asks for one thing.

Variants take turns, round after round, and the least of each counts: a busy machine slows all of them.
``bare`` is the native sampler without the stage before it: what a batch without wishes cost before there
were any.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gristmill.engine.logprobs import Scores
from gristmill.engine.messages import Dry, Processors, Request, Watermark
from gristmill.engine.native.sampling import load_sampling
from gristmill.engine.noise import noise_key
from gristmill.engine.sampler import Sampler
from gristmill.engine.sequence import Sequence
from gristmill.schemas.settings import default_home

VOCAB, PROMPT, OUTPUT = 49_152, 512, 128
FEATURES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top_p": {"top_p": 0.9},
    "min_tokens": {"min_tokens": 1_000},
    "repetition_penalty": {"processors": Processors(repetition_penalty=1.2)},
    "frequency_presence": {"processors": Processors(frequency_penalty=0.5, presence_penalty=0.5)},
    "dry": {"processors": Processors(dry=Dry(multiplier=0.8, breakers=[[n] for n in range(1_000)]))},
    "logit_bias": {"processors": Processors(logit_bias=dict.fromkeys(range(100), 1.0))},
    "bad_words": {"processors": Processors(bad_words=[[n, n + 1] for n in range(50)] + [[7], [8]])},
    "allowed_token_ids": {"processors": Processors(allowed_token_ids=list(range(1_000)))},
    "watermark": {"processors": Processors(watermark=Watermark())},
    "typical_p": {"processors": Processors(typical_p=0.9)},
    "logprobs": {"logprobs": 5},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    native = load_sampling(default_home() / "kernels", args.threads)
    logits = (torch.randn(args.rows, VOCAB, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    runs = {name: ready(Sampler(VOCAB, native=native), logits, wish) for name, wish in FEATURES.items()}
    if native:
        runs = {"bare": bare(native, logits), **runs}
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(args.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            least[name] = min(least[name], time.perf_counter() - started)
    us = {name: round(took / args.rows * 1e6, 1) for name, took in least.items()}
    print(
        json.dumps(
            {
                "bench": "sampler",
                "us_a_row": us,
                "rows": args.rows,
                "vocab": VOCAB,
                "tokens_before": PROMPT + OUTPUT,
                "threads": args.threads,
                "native": native is not None,
                "machine": platform.processor() or platform.machine(),
                "torch": torch.__version__,
            }
        )
    )


def ready(sampler: Sampler, logits: torch.Tensor, wish: dict[str, Any]) -> Callable[[], object]:
    """A step of a batch whose rows all have this wish; states have caught up, as after the first step."""
    rng = random.Random(1)
    seqs = [
        Sequence(
            Request(
                id=f"r{row}",
                prompt_ids=[rng.randrange(VOCAB) for _ in range(PROMPT)],
                output_ids=[rng.randrange(2_000) for _ in range(OUTPUT)],
                max_tokens=2_000,
                seed=row,
                **wish,
            ),
            limit=5_000,
            end_ids=frozenset({0}),
        )
        for row in range(len(logits))
    ]

    def step() -> None:
        scores = Scores.take(logits, seqs)
        tokens = sampler.sample(logits, seqs)
        if scores:
            scores.of(logits, tokens)

    step()
    return step


def bare(native: Any, logits: torch.Tensor) -> Callable[[], object]:
    rows = len(logits)
    knobs, top_k = np.tile([1.0, 1.0, 0.0], (rows, 1)), np.zeros(rows, np.int64)

    def step() -> object:
        keys = [noise_key(row, 0, OUTPUT) for row in range(rows)]
        return native.sample(logits, knobs, top_k, np.array(keys, np.uint32))

    step()
    return step


if __name__ == "__main__":
    main()
