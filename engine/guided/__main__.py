"""The checker's process: see ``checker.py``. Ends when its standard input does."""

from __future__ import annotations

import json
import math
import random
import resource
import sys
import time
from typing import Any, cast

import numpy as np
from llguidance import LLMatcher

from ...schemas.errors import BadInput
from ..messages import Grammar
from .checker import MAX_COMPILE_S, MAX_MEMORY_BYTES, Verdict
from .compiler import Compiler, explain

TRIAL_TOKENS = 64
TRIALS = 4
"""Walks, each with draws of its own: where the branches of a grammar all begin alike, one may miss the place
where a limit of the matcher is reached."""
MAX_STEP_S = 0.25
"""A single step of a matcher that takes longer would hold up everybody in the engine."""


def main() -> None:
    """Answer until there are no more questions."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    compiler = Compiler(sys.argv[1], int(sys.argv[2]))
    answer({"ready": True})
    for line in sys.stdin.buffer:
        asked = cast("dict[str, Any]", json.loads(line))
        limit_s = math.ceil(time.process_time()) + MAX_COMPILE_S
        resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.RLIM_INFINITY))
        least, why = verdict(compiler, Grammar(asked["kind"], asked["text"]))
        answer({"least": least, "why": why})


def answer(what: dict[str, Any]) -> None:
    """A line on the pipe."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def verdict(compiler: Compiler, grammar: Grammar) -> Verdict:
    """Compile it, look for its shortest text, and try it with random tokens."""
    try:
        least = compiler.shortest(grammar)
        walks = (trial(compiler.matcher(grammar), compiler.vocab_size, seed) for seed in range(TRIALS))
        why = next(filter(None, walks), None)
    except BadInput as exc:
        return None, exc.message
    return least, why


def trial(matcher: LLMatcher, vocab_size: int, seed: int = 0) -> str | None:
    """Walk as a model at the highest temperature would. Returns what is wrong with the grammar."""
    draw = random.Random(seed)  # the same trials every time
    for _ in range(TRIAL_TOKENS):
        started = time.process_time()
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(mask, bitorder="little", count=vocab_size).nonzero()[0]
        if matcher.is_error():
            return explain(matcher)
        if not len(allowed):
            return "the grammar comes to a place where no token may follow"
        if not matcher.consume_token(int(draw.choice(allowed))):
            return explain(matcher)
        if matcher.is_stopped():
            return None
        if (forced := matcher.compute_ff_tokens()) and not matcher.consume_tokens(forced):
            return explain(matcher)
        if matcher.is_stopped():
            return None
        if (took_s := time.process_time() - started) > MAX_STEP_S:
            return (
                f"a single step of the grammar takes {took_s:.2f} s of processor time and {MAX_STEP_S:g} are "
                "allowed; use smaller repetitions and fewer alternatives"
            )
    return None


if __name__ == "__main__":
    main()
