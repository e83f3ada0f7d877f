"""How far a KV cache in fewer bits moves a model: perplexity, and how often the likeliest token stays.

Prompts read the cache as decode does: keys and values are rounded before anybody attends to them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import get_args

from gristmill.backends.models import pull
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Request
from gristmill.engine.settings import DType, EngineSettings
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.logprobs import TokenLogprobs

TEXT = Path(__file__).parents[1] / "engine" / "quantize" / "calibration.txt"


def read(engine: Engine, tokens: list[int]) -> list[TokenLogprobs]:
    """What the model thought of each token but the first, and which one it thought likeliest."""
    told: list[TokenLogprobs] = []
    engine.add(Request(id="text", prompt_ids=tokens, max_tokens=1, prompt_logprobs=1))
    while engine.has_work:
        for output in engine.step():
            told += output.prompt_logprobs
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=get_args(DType), default="auto")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=2048, help="of the text, from its beginning")
    given = parser.parse_args()
    directory = pull(given.model)
    tokens = Tokenizer(directory).encode(given.text.read_text())[: given.tokens]
    plain: list[list[int]] = []
    for kind in ("auto", "int8", "fp8"):
        knobs = {"dtype": given.dtype, "kv_cache_dtype": kind, "max_total_tokens": len(tokens) + 1}
        engine = Engine(EngineSettings(model=str(directory), max_num_seqs=1, **knobs))
        told = read(engine, tokens)
        best = [list(one.top_ids) for one in told]
        plain = plain or best
        line = {
            "kv_cache_dtype": kind,
            "dtype": engine.info.dtype,
            "attention": engine.info.attention,
            "tokens": len(told),
            "perplexity": round(math.exp(-sum(one.logprob for one in told) / len(told)), 3),
            "same_likeliest": round(sum(a == b for a, b in zip(plain, best, strict=True)) / len(told), 4),
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
