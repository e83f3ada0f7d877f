"""Hostile grammars, one after another, beside rows that decode: how each ended, and how long steps took.

Each goes the way of a worker's job: a thread asks the checker (a process that may be killed), and what it
lets pass is added to the engine. The engine steps all the while, in this process, so that a lock that a
compiler holds would show.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for tests.support

from gristmill.backends.models import pull
from gristmill.engine.engine import Engine
from gristmill.engine.guided.checker import GrammarChecker
from gristmill.engine.messages import Grammar, Output, Request
from gristmill.engine.settings import EngineSettings
from gristmill.schemas.errors import BadInput

from tests.support.hostile_grammars import hostile, schema

NORMAL_TOKENS = 400
QUIET_STEPS = 200


@dataclass
class Fate:
    """What became of a grammar."""

    name: str
    how: str
    checked_s: float
    """By the clock, in the checker."""
    tokens: int = 0
    longest_step_ms: float = 0.0
    while_checked_ms: float = 0.0
    """Likewise, before it came to the engine."""


class Rows:
    """An engine that never runs out of rows that decode."""

    def __init__(self, engine: Engine, rows: int) -> None:
        self.engine = engine
        self._numbers = count()
        for _ in range(rows):
            self._add()

    def _add(self) -> None:
        number = next(self._numbers)
        prompt = [(number * 7 + at) % 1_000 + 100 for at in range(32)]
        self.engine.add(
            Request(
                id=f"row{number}",
                prompt_ids=prompt,
                max_tokens=NORMAL_TOKENS,
                seed=number,
                ignore_eos=True,
            )
        )

    def step(self) -> tuple[float, list[Output]]:
        """Milliseconds, and what came out for others than our rows."""
        started = time.perf_counter()
        outputs = self.engine.step()
        took = (time.perf_counter() - started) * 1e3
        for output in outputs:
            if output.finish and output.id.startswith("row"):
                self._add()
        return took, [output for output in outputs if not output.id.startswith("row")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="only grammars whose names have one of these")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-tokens", type=int, default=300)
    args = parser.parse_args()
    model = pull("smollm2-135m")
    engine = Engine(EngineSettings(model=str(model), num_threads=args.threads))
    rows = Rows(engine, args.rows)
    checker = GrammarChecker(str(model), engine.info.vocab_size)
    checker.check(schema({}), 100)  # the process starts, and reads the tokenizer
    list(beside(rows, Request(id="first", prompt_ids=[9], max_tokens=5, grammar=schema({}))))
    quiet = [rows.step()[0] for _ in range(QUIET_STEPS)]
    fates: list[Fate] = []
    for name, grammar in hostile().items():
        if not args.words or any(word in name for word in args.words):
            fates.append(judge(rows, checker, name, grammar, args.max_tokens))
            say(fates[-1])
    checker.close()
    print(
        json.dumps(
            {
                "bench": "guided",
                "quiet_step_ms": {"p50": round(median(quiet), 1), "longest": round(max(quiet), 1)},
                "longest_step_ms": round(max(fate.longest_step_ms for fate in fates), 1),
                "longest_while_checked_ms": round(max(fate.while_checked_ms for fate in fates), 1),
                "refused": sum("refused" in fate.how for fate in fates),
                "grammars": len(fates),
                "rows": args.rows,
                "threads": args.threads,
                "machine": platform.processor() or platform.machine(),
                "fates": [asdict(fate) for fate in fates],
            }
        )
    )


def say(fate: Fate) -> None:
    print(
        f"longest step {fate.while_checked_ms:5.0f} ms while checked ({fate.checked_s:.2f} s), "
        f"{fate.longest_step_ms:5.0f} in the engine ({fate.tokens} tokens) | {fate.name}: {fate.how}",
        file=sys.stderr,
    )


def judge(rows: Rows, checker: GrammarChecker, name: str, grammar: Grammar, max_tokens: int) -> Fate:
    """Send it the way of a job, and step until it has ended."""
    started = time.monotonic()
    took = [0.0]
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(checker.check, grammar, max_tokens)
        while not asked.done():
            took.append(rows.step()[0])
    fate = Fate(name, "", round(time.monotonic() - started, 2), while_checked_ms=round(max(took), 1))
    try:
        asked.result()
    except BadInput as exc:
        fate.how = f"refused: {exc.message[:120]}"
        return fate
    request = Request(
        id="hostile", prompt_ids=[9, 8, 7], max_tokens=max_tokens, temperature=1.5, seed=3, grammar=grammar
    )
    for ms, outputs in beside(rows, request):
        fate.longest_step_ms = max(fate.longest_step_ms, round(ms, 1))
        for output in outputs:
            fate.tokens += len(output.token_ids)
            if output.finish:
                closed = ", closed" if output.closed else ""
                fate.how = f"{output.finish}{closed}{(' ' + output.error[:120]) if output.error else ''}"
    return fate


def beside(rows: Rows, request: Request) -> Iterator[tuple[float, list[Output]]]:
    """Steps until ``request`` has ended."""
    rows.engine.add(request)
    while True:
        ms, outputs = rows.step()
        yield ms, outputs
        if any(output.finish for output in outputs):
            return


if __name__ == "__main__":
    main()
