"""Perplexity of models, through the engine's own prompt log probabilities: what a quantization costs.

    scripts/perplexity smollm2-135m smollm2-135m:int8 smollm2-135m:nf4 ./smollm2-awq --tokens 8192 --answers

A model is a name or a directory, and behind a colon what ``--quantize`` makes of it (``int8+``: but for the
output layer). The text needs no download: the help topics that come with Python (``pydoc_data.topics``), in
the order of their names; its digest is printed, since it differs between versions. Cut into windows of 512
tokens, of which the first is given.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from gristmill.backends.models import resolve
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Request
from gristmill.engine.settings import EngineSettings
from gristmill.engine.tokenizer import Tokenizer

WINDOW = 512
QUESTIONS = (
    "What is the capital of Portugal? Answer in one sentence.",
    "Why does ice float on water?",
    "How long does the Moon take to go around the Earth?",
)
"""The first of examples/prompts.jsonl, which scripts/demo runs."""
ANSWER_TOKENS = 48


def main() -> None:
    """One JSON line for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL[:QUANTIZE]")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--text", type=Path, help="another text than Python's help topics")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--answers", action="store_true", help="also answer a few questions, greedily")
    args = parser.parse_args()
    text = args.text.read_text() if args.text else "\n\n".join(topics[name] for name in sorted(topics))
    for model in args.models:
        name, _, quantize = model.partition(":")
        settings: dict[str, Any] = {"dtype": args.dtype, "num_threads": args.num_threads}
        if quantize:
            settings["quantize"] = quantize.removesuffix("+")
            settings["quantize_head"] = not quantize.endswith("+")
        found = measure(resolve(name), text, args.tokens, args.answers, settings)
        print(json.dumps({"model": model, **found}, ensure_ascii=False), flush=True)


def measure(path: Path, text: str, tokens: int, answers: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """Perplexity over ``tokens`` tokens of ``text``, and what went into it."""
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
    windows = [ids[first : first + WINDOW] for first in range(0, len(ids), WINDOW)]
    engine = Engine(
        EngineSettings(
            model=str(path),
            max_total_tokens=2 * WINDOW,
            max_num_seqs=8,
            max_batch_total_tokens=16 * WINDOW,
            **settings,
        )
    )
    started = time.monotonic()
    told = logprobs(engine, windows)
    took_s = time.monotonic() - started
    found: dict[str, Any] = {
        "perplexity": round(math.exp(-sum(told) / len(told)), 3),
        "tokens": len(told),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "dtype": engine.info.dtype,
        "tokens_per_s": round(len(told) / took_s),
    }
    if answers:
        found["answers"] = [answer(engine, tokenizer, question) for question in QUESTIONS]
    return found


def logprobs(engine: Engine, windows: Sequence[Sequence[int]]) -> list[float]:
    """Of each token but the first of a window."""
    for number, window in enumerate(windows):
        engine.add(
            Request(id=str(number), prompt_ids=list(window), max_tokens=1, temperature=0.0, prompt_logprobs=0)
        )
    told: list[float] = []
    while engine.has_work:
        for output in engine.step():
            told += [each.logprob for each in output.prompt_logprobs or ()]
    assert len(told) == sum(len(window) - 1 for window in windows), "a token without a probability"
    return told


def answer(engine: Engine, tokenizer: Tokenizer, question: str) -> str:
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}])
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    engine.add(Request(id=question, prompt_ids=ids, max_tokens=ANSWER_TOKENS, temperature=0.0))
    said: list[int] = []
    while engine.has_work:
        for output in engine.step():
            said += output.token_ids
    return tokenizer.decode(said)


if __name__ == "__main__":
    main()
