"""Engine tokens per second at bf16 on W1, beside static ``transformers.generate`` measured in the same call.

Both sides get the same prompts, threads and dtype, and produce exactly the same number of tokens (end tokens
are ignored). transformers runs as people run it: batches of 32, left-padded, sdpa; sorted by output length,
which helps it and which it could not know; only tokens that were asked for count. The engine runs in its own
process, once before and once after, so that a machine that drifts is seen.

With the name of a knob, that knob on and off instead, in two engine processes that take turns
(``bench_pairs.py``): the prefix cache on W2, speculation on rows that copy or on W1; on W1 deterministic
mode, our matrix products beside oneDNN's in bf16 and int8, and int8 beside bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from bench_pairs import COMPARISONS, compare
from engine_passes import READY_S, circumstances, engine_pass
from gristmill.backends.models import pull
from gristmill.engine.process import EngineProcess
from gristmill.engine.settings import EngineSettings
from tokenizers import Tokenizer
from workload import Row, w1

BATCH = 32


def main() -> None:
    args = arguments()

    def say(text: str) -> None:
        if not args.json:
            print(f"bench_engine: {text}", file=sys.stderr)

    model = pull("smollm2-135m") if args.model is None else Path(args.model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    requests = args.requests or (32 if args.quick else 128)
    rows = w1(tokenizer, args.seed, requests)
    warm = w1(tokenizer, args.seed + 1, 8)
    settings = EngineSettings(model=str(model), dtype="bfloat16", num_threads=args.threads)
    torch.set_num_threads(args.threads)
    if args.compare:
        report = compare(
            args.compare, settings, tokenizer, seed=args.seed, requests=requests, pairs=args.pairs, say=say
        )
        given = {"seed": args.seed, "model": model.name, "threads": args.threads}
        print(json.dumps({**report, **given, **circumstances()}))
        return

    with EngineProcess(settings) as engine:
        info = engine.wait_ready(READY_S)
        engine_pass(engine, warm)
        say(f"engine: {len(rows)} requests")
        passes = [engine_pass(engine, rows)]
        static_s = None
        if not args.no_static:
            say("transformers: loading, then the same requests")
            static_s = static_pass(model, rows, warm[:4])
            say("engine: again")
            passes.append(engine_pass(engine, rows))

    asked = sum(row.max_tokens for row in rows)
    rates = [asked / one.seconds for one in passes]
    mean = asked * len(passes) / sum(one.seconds for one in passes)
    static = asked / static_s if static_s else None
    print(
        json.dumps(
            {
                "bench": "engine",
                "engine_tok_s": round(mean, 1),
                "static_tok_s": static and round(static, 1),
                "ratio": static and round(mean / static, 2),
                "engine_passes_tok_s": [round(rate, 1) for rate in rates],
                "engine_loop": passes[0].loop,
                "workload": "w1" + ("" if requests == 128 else f": {requests} requests"),
                "requests": len(rows),
                "input_tokens": sum(len(row.prompt_ids) for row in rows),
                "output_tokens": asked,
                "seed": args.seed,
                "static": f"transformers.generate, bf16, sdpa, batches of {BATCH} sorted by output length",
                "engine": {
                    "dtype": info.dtype,
                    "attention": info.attention,
                    "step_tokens": info.step_tokens,
                    "max_num_seqs": info.max_num_seqs,
                    "kv_tokens": info.num_blocks * info.block_size,
                },
                "model": model.name,
                "threads": args.threads,
                **circumstances(),
            }
        )
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", default="20261122", help="a number, or 'random' for a fresh one (printed)")
    parser.add_argument("--quick", action="store_true", help="32 requests instead of 128, on both sides")
    parser.add_argument("--json", action="store_true", help="the JSON line and no words beside it")
    parser.add_argument("--no-static", action="store_true", help="the engine alone: no ratio")
    for name, what in COMPARISONS.items():
        flag = f"--{name.replace('_', '-')}"
        text = f"{name.partition('_')[0]} on and off on {what.workload}"
        parser.add_argument(flag, dest="compare", action="store_const", const=name, help=text)
    parser.add_argument("--requests", type=int, help="so many instead of 128")
    parser.add_argument("--pairs", type=int, default=4, help="on and off; from 4 on with an interval")
    parser.add_argument("--model", help="a model directory instead of SmolLM2-135M-Instruct")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    args.seed = secrets.randbelow(2**32) if args.seed == "random" else int(args.seed)
    return args


def static_pass(model_dir: Path, rows: Sequence[Row], warm: Sequence[Row]) -> float:
    """Seconds of ``generate`` over all rows, after a warm-up; loading does not count."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    generate(model, warm)
    order = sorted(rows, key=lambda row: row.max_tokens)
    started = time.monotonic()
    for at in range(0, len(order), BATCH):
        generate(model, order[at : at + BATCH])
    return time.monotonic() - started


@torch.inference_mode()
def generate(model: Any, rows: Sequence[Row]) -> None:
    """One left-padded batch, as long as its longest row."""
    width = max(len(row.prompt_ids) for row in rows)
    pads = [width - len(row.prompt_ids) for row in rows]
    ids = torch.tensor([[0] * pad + row.prompt_ids for pad, row in zip(pads, rows, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads])
    steps = max(row.max_tokens for row in rows)
    out = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=steps, min_new_tokens=steps, pad_token_id=0
    )
    assert out.shape == (len(rows), width + steps)


if __name__ == "__main__":
    main()
