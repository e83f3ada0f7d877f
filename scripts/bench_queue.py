"""W1 through the queue beside W1 straight into the engine, in one call, A B A B; and how fast an idle worker
picks a job up.

Straight: an ``EngineProcess`` of our own. Through the queue: client, broker (append-only file on), worker,
journal, result files; from the first submit to the last job that is final. Same rows, lengths and
settings on both sides, other rows in every pass.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engine_passes import READY_S, circumstances, engine_pass
from gristmill.backends.models import pull
from gristmill.engine import pipe
from gristmill.engine.messages import Output, Request, Stats, Step
from gristmill.engine.process import EngineProcess
from gristmill.engine.settings import EngineSettings
from gristmill.producer import Client
from gristmill.schemas.events import Delta
from gristmill.schemas.settings import Settings
from tokenizers import Tokenizer
from workload import w1

MODEL = "smollm2-135m"
PICKUPS = 60


def main() -> None:
    args = arguments()
    tokenizer = Tokenizer.from_file(str(pull(MODEL) / "tokenizer.json"))
    fresh = [w1(tokenizer, args.seed + turn, 32 if args.quick else 128) for turn in range(args.passes)]
    warm = w1(tokenizer, args.seed - 1, 8)
    alone: list[float] = []
    queued: list[float] = []
    settings = EngineSettings(model=str(pull(MODEL)), dtype="bfloat16", num_threads=args.threads)
    with EngineProcess(settings) as engine, worker(args.threads) as (client, log):
        engine.wait_ready(READY_S)
        engine_pass(engine, warm)
        queue_pass(client, warm)
        for turn, rows in enumerate(fresh):
            if turn % 2:  # who goes first changes: a machine that drifts cancels out
                queued.append(queue_pass(client, rows))
            alone.append(engine_pass(engine, rows, group="tenant").seconds)
            if not turn % 2:
                queued.append(queue_pass(client, rows))
            say(f"pass {turn + 1}: engine {alone[-1]:.1f} s, queue {queued[-1]:.1f} s")
        pickups, first_tokens, straight = pick_ups(client, log, engine)

    asked = [sum(row.max_tokens for row in rows) for rows in fresh]
    report = {
        "bench": "queue",
        "engine_tok_s": round(sum(asked) / sum(alone), 1),
        "queue_tok_s": round(sum(asked) / sum(queued), 1),
        "ratio": round(statistics.median(a / q for a, q in zip(alone, queued, strict=True)), 3),
        "engine_passes_s": [round(s, 2) for s in alone],
        "queue_passes_s": [round(s, 2) for s in queued],
        "pickup_ms": quantiles(pickups),
        "first_token_ms": quantiles(first_tokens),
        "engine_first_token_ms": quantiles(straight),
        "token_us": {f"{rows} rows a step": token_us(rows) for rows in (1, 16, 128)},
        "journal_token_us": journal_us(),
        "queue_adds_ms": round(statistics.median(first_tokens) - statistics.median(straight), 2),
        "workload": "w1" + (" quick: 32 requests" if args.quick else ""),
        "output_tokens": sum(asked),
        "seed": args.seed,
        "threads": args.threads,
        **circumstances(),
    }
    print(json.dumps(report))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=20261122)
    parser.add_argument("--quick", action="store_true", help="32 requests instead of 128, on both sides")
    parser.add_argument("--passes", type=int, default=2, help="of each side")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of each engine")
    return parser.parse_args()


@contextmanager
def worker(threads: int) -> Iterator[tuple[Client, Path]]:
    """An embedded broker, a worker on it, and a client of both; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="gm-bench-") as name:
        directory = Path(name)
        (directory / "results").mkdir()
        settings = Settings(
            broker_url=f"embedded:{directory}/broker", results_url=f"file://{directory}/results", model=MODEL
        )
        log = directory / "worker.log"
        command = [sys.executable, "-m", "gristmill.worker", "run", "--model", MODEL, "--dtype", "bfloat16"]
        command += ["--broker", settings.broker_url, "--results", settings.results_url, "--health-port", "0"]
        command += ["--num-threads", str(threads), "--log-level", "debug"]
        with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
            client = Client(settings)
            try:
                deadline = time.monotonic() + READY_S
                while "worker.ready" not in log.read_text():
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise SystemExit(f"bench_queue: the worker did not start:\n{log.read_text()[-2000:]}")
                    time.sleep(0.05)
                yield client, log
            finally:
                process.terminate()
                process.wait()
                client.close()


def queue_pass(client: Client, rows: Sequence[Any]) -> float:
    """Seconds from the first submit until every job is final. Raises if one length is not as asked."""
    started = time.monotonic()
    jobs = [
        client.submit(
            prompt_ids=row.prompt_ids,
            max_tokens=row.max_tokens,
            temperature=0.0,
            ignore_eos=True,
            priority="batch",
        )
        for row in rows
    ]
    results = [job.result(timeout_s=600) for job in jobs]
    seconds = time.monotonic() - started
    assert [r.usage.completion_tokens for r in results] == [row.max_tokens for row in rows]
    return seconds


def pick_ups(
    client: Client, log: Path, engine: EngineProcess
) -> tuple[list[float], list[float], list[float]]:
    """Milliseconds from submit until an idle worker's engine has the job, and until a follower reads; and
    until the engine straight has the same token, in turns."""
    seen = len(log.read_text())
    first_tokens: list[float] = []
    straight: list[float] = []
    for n in range(PICKUPS):
        prompt = [504 + n, 28, 260]
        started = time.monotonic()
        job = client.submit(prompt_ids=prompt, max_tokens=1, temperature=0.0, stream=True)
        next(iter(job.stream()))
        first_tokens.append(1000 * (time.monotonic() - started))
        job.result(timeout_s=60)
        started = time.monotonic()
        engine.add([Request(id=f"first-{n}", prompt_ids=prompt, max_tokens=1, temperature=0.0)])
        while not any(output.token_ids for output in answered(engine)):
            pass
        straight.append(1000 * (time.monotonic() - started))
    found = re.findall(r"job\.submitted .*pickup_s=([0-9.]+)", log.read_text()[seen:])
    return [1000 * float(seconds) for seconds in found], first_tokens, straight


def answered(engine: EngineProcess) -> list[Output]:
    report = engine.recv(READY_S)
    assert isinstance(report, Step), report
    return report.outputs


def token_us(rows: int) -> dict[str, float]:
    """What a token costs to write and to read between engine and worker, of a step with one for each row."""
    outputs = [Output(id=f"job_{n:032x}@{n}", token_ids=[n]) for n in range(rows)]
    stats = Stats(
        running=rows, waiting=0, free_blocks=0, total_blocks=9, preemptions=0, step_s=0.1, tokens=rows
    )
    frame = pipe.encode(Step(outputs, stats))
    written = best_us(lambda: pipe.encode(Step(outputs, stats)))
    read = best_us(lambda: list(pipe.FrameReader().feed(frame)))
    return {"write": round(written / rows, 2), "read": round(read / rows, 2), "bytes": len(frame) // rows}


def journal_us() -> dict[str, float]:
    """The same of an entry of the journal, as a follower reads it, with one token."""
    delta = Delta(choice=0, offset=7, ids=(504,), text=" word")
    line = delta.to_json()
    read = best_us(lambda: Delta.from_json(line))
    return {"write": round(best_us(delta.to_json), 2), "read": round(read, 2), "bytes": len(line)}


def best_us(act: Callable[[], object]) -> float:
    """Microseconds a call, the best of five times 2,000."""
    return min(timeit.repeat(act, number=2_000, repeat=5)) / 2_000 * 1e6


def quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {name: round(ordered[int(q * (len(ordered) - 1))], 2) for name, q in (("p50", 0.5), ("p95", 0.95))}


def say(text: str) -> None:
    print(f"bench_queue: {text}", file=sys.stderr)


if __name__ == "__main__":
    main()
