"""Engine tokens per second at bf16 on W1, beside static ``transformers.generate`` measured in the same call.

Both sides get the same prompts, threads and dtype, and produce exactly the same number of tokens (end tokens
are ignored). transformers runs as people run it: batches of 32, left-padded, sdpa; sorted by output length,
which helps it and which it could not know; only tokens that were asked for count. The engine runs in its own
process, once before and once after, so that a machine that drifts is seen.

``--prefix``: the prefix cache on and off on W2 instead, in two engine processes that take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from gristmill.backends.models import pull
from gristmill.engine.messages import Failed, Request
from gristmill.engine.process import EngineProcess
from gristmill.engine.settings import EngineSettings
from tokenizers import Tokenizer
from workload import Row, w1, w2

ROOT = Path(__file__).resolve().parent.parent
BATCH = 32
READY_S, STEP_S = 180.0, 120.0


def main() -> None:
    args = arguments()
    say = lambda text: print(f"bench_engine: {text}", file=sys.stderr)  # noqa: E731
    model = pull("smollm2-135m") if args.model is None else Path(args.model)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    rows = w1(tokenizer, args.seed, 32 if args.quick else 128)
    warm = w1(tokenizer, args.seed + 1, 8)
    settings = EngineSettings(model=str(model), dtype="bfloat16", num_threads=args.threads)
    torch.set_num_threads(args.threads)
    if args.prefix:
        print(json.dumps(prefix(args, settings, tokenizer, say)))
        return

    with EngineProcess(settings) as engine:
        info = engine.wait_ready(READY_S)
        engine_pass(engine, warm)
        say(f"engine: {len(rows)} requests")
        passes = [engine_pass(engine, rows).seconds]
        static_s = None
        if not args.no_static:
            say("transformers: loading, then the same requests")
            static_s = static_pass(model, rows, warm[:4])
            say("engine: again")
            passes.append(engine_pass(engine, rows).seconds)

    asked = sum(row.max_tokens for row in rows)
    rates = [asked / seconds for seconds in passes]
    mean = asked * len(passes) / sum(passes)
    static = asked / static_s if static_s else None
    print(
        json.dumps(
            {
                "bench": "engine",
                "engine_tok_s": round(mean, 1),
                "static_tok_s": static and round(static, 1),
                "ratio": static and round(mean / static, 2),
                "engine_passes_tok_s": [round(rate, 1) for rate in rates],
                "workload": "w1" + (" quick: 32 requests" if args.quick else ""),
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


def prefix(
    args: argparse.Namespace, settings: EngineSettings, tokenizer: Tokenizer, say: Callable[[str], None]
) -> dict[str, Any]:
    """Pairs of passes, with the cache and without; each pair has a prefix that neither engine has seen."""
    requests = args.requests or (32 if args.quick else 128)
    plain = settings.model_copy(update={"prefix_cache": False})
    passes: dict[str, list[Pass]] = {"on": [], "off": []}
    with EngineProcess(settings) as on, EngineProcess(plain) as off:
        engines = {"on": on, "off": off}
        for engine in engines.values():
            engine.wait_ready(READY_S)
            engine_pass(engine, w1(tokenizer, args.seed + 1, 8))
        for pair in range(args.pairs):
            rows = w2(tokenizer, args.seed + pair, requests)
            for name in ("on", "off") if pair % 2 else ("off", "on"):
                say(f"pair {pair + 1} of {args.pairs}: {requests} requests, cache {name}")
                passes[name].append(engine_pass(engines[name], rows))
    asked = sum(row.max_tokens for row in rows)
    rates = {name: [round(asked / one.seconds, 1) for one in some] for name, some in passes.items()}
    ratios = [off.seconds / on.seconds for on, off in zip(passes["on"], passes["off"], strict=True)]
    return {
        "bench": "engine_prefix",
        "ratio": round(geometric_mean(ratios), 2),
        "ratios": [round(ratio, 2) for ratio in ratios],
        "on_tok_s": rates["on"],
        "off_tok_s": rates["off"],
        "cached_share": round(passes["on"][-1].cached_tokens / sum(len(row.prompt_ids) for row in rows), 3),
        "workload": "w2",
        "requests": requests,
        "output_tokens": asked,
        "seed": args.seed,
        "model": Path(settings.model).name,
        "threads": args.threads,
        **circumstances(),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", default="20261122", help="a number, or 'random' for a fresh one (printed)")
    parser.add_argument("--quick", action="store_true", help="32 requests instead of 128, on both sides")
    parser.add_argument("--no-static", action="store_true", help="the engine alone: no ratio")
    parser.add_argument("--prefix", action="store_true", help="W2 with the prefix cache on and off")
    parser.add_argument("--requests", type=int, help="with --prefix: so many instead of 128")
    parser.add_argument("--pairs", type=int, default=3, help="of passes, with --prefix")
    parser.add_argument("--model", help="a model directory instead of SmolLM2-135M-Instruct")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    args.seed = secrets.randbelow(2**32) if args.seed == "random" else int(args.seed)
    return args


@dataclass(frozen=True)
class Pass:
    """All rows through one engine."""

    seconds: float
    """From the first request in to the last token out."""
    cached_tokens: int
    """Of the prompts."""


def engine_pass(engine: EngineProcess, rows: Sequence[Row]) -> Pass:
    """Run ``rows``, all there at once. Raises if one length is not as asked."""
    lengths = {row.id: 0 for row in rows}
    started = time.monotonic()
    engine.add(
        Request(
            id=row.id,
            prompt_ids=row.prompt_ids,
            max_tokens=row.max_tokens,
            temperature=0.0,
            ignore_eos=True,
            arrival=float(i),
        )
        for i, row in enumerate(rows)
    )
    ended = cached = 0
    while ended < len(rows):
        report = engine.recv(STEP_S)
        if report is None or isinstance(report, Failed):
            raise SystemExit(f"bench_engine: the engine failed: {report}")
        for output in report.outputs:
            lengths[output.id] += len(output.token_ids)
            ended += output.finish is not None
            cached += output.cached_tokens or 0
    seconds = time.monotonic() - started
    assert lengths == {row.id: row.max_tokens for row in rows}
    return Pass(seconds, cached)


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


def circumstances() -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("gristmill", "torch", "transformers")},
        },
    }


if __name__ == "__main__":
    main()
