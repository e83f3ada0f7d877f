"""What a token and a claim cost as things grow.

  batch        a decode step of 1 to 256 sequences of 128 tokens                   µs a token
  context      a decode step of 4 sequences behind 128 to 8,000 tokens             µs a token
  vocabulary   a step of 32 sequences, one layer, 49k to 152k tokens to choose of  µs a token
  queue        10 to 1,000,000 messages wait: claim one, acknowledge it            µs a message

Every point is the median step (or of a hundred claims) and the quartiles around it. The engine runs in this
process; the queue is a Valkey of its own with an append-only file.

examples:
  scripts/bench_scale --parts batch,context
  scripts/bench_scale --charts scripts/charts
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import redis
from engine_passes import circumstances
from gpu.shapes import RandomWeights, Shape
from gristmill.backends.embedded import find_server
from gristmill.backends.message_queue import PUT, ClaimedMessage, MessageQueue
from gristmill.backends.models import pull
from gristmill.backends.script import run_script
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Request
from gristmill.engine.settings import EngineSettings
from scale_charts import Chart, draw

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8000)
VOCABULARIES = (49_152, 64_000, 100_352, 128_256, 151_936)
DEPTHS = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
SMOLLM2_VOCABULARY = 49_152
STEPS, CLAIMS, PUT_AT_ONCE = 40, 100, 1000
SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""One of SmolLM2-135M's layers."""


@dataclass(frozen=True)
class Point:
    """What one of something costs, in µs, where there are ``at`` of what grows."""

    at: int
    low: float
    median: float
    high: float

    @classmethod
    def of(cls, at: int, seconds: Sequence[float], each: int = 1) -> Point:
        low, middle, high = statistics.quantiles(seconds, n=4)
        return cls(at, *(round(1e6 * s / each, 2) for s in (low, middle, high)))


Series = dict[str, list[Point]]


def batch(seed: int, threads: int) -> Series:
    """One engine that has room for the largest."""
    engine = _smollm2(threads, max_num_seqs=max(BATCHES))
    return {
        "greedy": [
            Point.of(size, decode(engine, size, 128, SMOLLM2_VOCABULARY, seed), size) for size in BATCHES
        ]
    }


def context(seed: int, threads: int) -> Series:
    engine = _smollm2(threads, max_num_seqs=4)
    found: list[Point] = []
    for length in CONTEXTS:
        found.append(Point.of(length, decode(engine, 4, length, SMOLLM2_VOCABULARY, seed), 4))
        say(f"context {length}: {found[-1].median} µs a token")
    return {"greedy, 4 sequences": found}


def vocabulary(seed: int, threads: int) -> Series:
    found: Series = {"greedy": [], "top_p 0.9": []}
    for size in VOCABULARIES:
        with tempfile.TemporaryDirectory() as directory:
            model = Shape("small", SMALL | {"vocab_size": size}).write(Path(directory))
            engine = Engine(_settings(model, threads, max_num_seqs=32), RandomWeights)
            for name, wishes in (("greedy", {"temperature": 0.0}), ("top_p 0.9", {"top_p": 0.9})):
                found[name].append(Point.of(size, decode(engine, 32, 64, size, seed, **wishes), 32))
        say(f"vocabulary {size}: {found['greedy'][-1].median} µs a token")
    return found


def queue(_seed: int, _threads: int) -> Series:
    """Messages of three tenants; each is put once, and the queue only grows from point to point."""
    found: Series = {"claim": [], "acknowledge": []}
    with _valkey() as client:
        messages, waiting = MessageQueue(client, lease_s=60), 0
        for depth in DEPTHS:
            while waiting < depth:
                _put(messages, waiting, min(PUT_AT_ONCE, depth - waiting))
                waiting += min(PUT_AT_ONCE, depth - waiting)
            claims: list[float] = []
            acks: list[float] = []
            for _ in range(min(CLAIMS, depth // 2)):
                started = time.perf_counter()
                message = messages.claim(["work"])
                claimed = time.perf_counter()
                assert isinstance(message, ClaimedMessage)
                messages.ack(message.tag)
                acks.append(time.perf_counter() - claimed)
                claims.append(claimed - started)
                waiting -= 1
            found["claim"].append(Point.of(depth, claims))
            found["acknowledge"].append(Point.of(depth, acks))
            say(f"{depth} waiting: {found['claim'][-1].median} µs a claim")
    return found


PARTS: dict[str, Callable[[int, int], Series]] = {
    "batch": batch,
    "context": context,
    "vocabulary": vocabulary,
    "queue": queue,
}
CHARTS = {
    "batch": Chart("A decode step, by sequences", "sequences that decode together", "µs a token"),
    "context": Chart("A decode step, by context", "tokens before the one that is made", "µs a token"),
    "vocabulary": Chart("One layer and the choice, by vocabulary", "tokens of the vocabulary", "µs a token"),
    "queue": Chart("A claim, by what waits", "messages that wait", "µs a message"),
}


def decode(
    engine: Engine, sequences: int, length: int, vocabulary: int, seed: int, **wishes: Any
) -> list[float]:
    """Seconds of each step in which all decode, and nothing else happens."""
    draw = random.Random(seed + sequences * 1_000_003 + length)
    for index in range(sequences):
        engine.add(
            Request(
                id=f"{length}-{sequences}-{index}-{draw.random()}",
                prompt_ids=[draw.randrange(300, vocabulary) for _ in range(length)],
                max_tokens=_room(sequences, length),
                seed=index,
                ignore_eos=True,
                **({"temperature": 0.0} | wishes),
            )
        )
    steps: list[float] = []
    began: set[str] = set()
    while engine.has_work:
        started = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - started
        if len(began) == sequences and not any(output.finish for output in outputs):
            steps.append(seconds)
        began |= {output.id for output in outputs if output.token_ids}
    return steps[2:][:STEPS]  # the first still ends what filled the batch


def _room(sequences: int, length: int) -> int:
    """Tokens for the steps that are measured, and for those in which the others' prompts come in."""
    return STEPS + 4 + -(-sequences * length // 256)


def _smollm2(threads: int, *, max_num_seqs: int) -> Engine:
    return Engine(_settings(pull("smollm2-135m"), threads, max_num_seqs=max_num_seqs))


def _settings(model: Path, threads: int, *, max_num_seqs: int) -> EngineSettings:
    return EngineSettings(
        model=str(model),
        dtype="bfloat16",
        num_threads=threads,
        max_num_seqs=max_num_seqs,
        prefix_cache=False,
        speculate=0,
    )


@contextmanager
def _valkey() -> Iterator[redis.Redis]:
    """On a socket of its own, as durable as the embedded one."""
    with tempfile.TemporaryDirectory(prefix="gm-scale-") as place:
        socket = f"{place}/v.sock"
        command = [find_server(), "--port", "0", "--unixsocket", socket, "--dir", place, "--save", ""]
        server = subprocess.Popen([*command, "--appendonly", "yes"], stdout=subprocess.DEVNULL)
        try:
            client = redis.Redis(unix_socket_path=socket)
            while not Path(socket).exists():
                time.sleep(0.01)
            yield client
        finally:
            server.kill()
            server.wait()


def _put(messages: MessageQueue, first: int, count: int) -> None:
    """The first by itself, which brings the script to the server; the others in one go."""
    body = "x" * 600  # as long as a job with a short prompt
    messages.put("work", "tenant0", f"m{first}", body)
    with messages.client.pipeline(transaction=False) as pipe:
        for number in range(first + 1, first + count):
            run_script(pipe, PUT, "work", f"tenant{number % 3}", f"m{number}", body, "")
        pipe.execute()


def main() -> None:
    args = arguments()
    report: dict[str, Any] = {"bench": "scale"}
    for part in args.parts:
        say(part)
        series = PARTS[part](args.seed, args.threads)
        report[part] = {name: [vars(point) for point in points] for name, points in series.items()}
        if args.charts:
            draw(args.charts / f"scale-{part}.svg", CHARTS[part], series)
    print(json.dumps(report | {"seed": args.seed, "threads": args.threads, **circumstances()}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench_scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--charts", type=Path, help="a directory for SVGs")
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts: no such part: {', '.join(sorted(unknown))}; of {', '.join(PARTS)}")
    return args


def say(text: str) -> None:
    print(f"bench_scale: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
