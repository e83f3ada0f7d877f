"""One knob of the engine, on and off: two engine processes take turns, pair after pair, each with fresh rows.

A pair's two passes lie beside one another in time, so a machine that drifts cancels out of their ratio. Who
goes first changes from pair to pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import Any

from engine_passes import READY_S, Pass, engine_pass
from gristmill.engine.process import EngineProcess
from gristmill.engine.settings import EngineSettings
from tokenizers import Tokenizer
from workload import Row, copies, w1, w2

FEWEST_FOR_AN_INTERVAL = 4


@dataclass(frozen=True)
class Comparison:
    """What is compared, on which rows."""

    on: dict[str, Any]
    off: dict[str, Any]
    workload: str
    rows: Callable[[Tokenizer, int, int], list[Row]]
    """Of a tokenizer, a seed and a number of them."""


COMPARISONS = {
    "prefix": Comparison({}, {"prefix_cache": False}, "w2", w2),
    "speculation": Comparison({}, {"speculate": 0}, "copies", copies),
    "speculation_w1": Comparison({}, {"speculate": 0}, "w1", w1),
    "deterministic": Comparison({"deterministic": True}, {}, "w1", w1),
    "products": Comparison({}, {"native_products": False}, "w1", w1),
    "products_int8": Comparison(
        {"quantize": "int8"}, {"quantize": "int8", "native_products": False}, "w1", w1
    ),
    "shared_attention": Comparison({}, {"shared_attention": False}, "w2", w2),
    "int8": Comparison({"quantize": "int8"}, {}, "w1", w1),
}


def compare(
    name: str,
    settings: EngineSettings,
    tokenizer: Tokenizer,
    *,
    seed: int,
    requests: int,
    pairs: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """How many times as many tokens per second there are with the knob on, and what else came of it."""
    what = COMPARISONS[name]
    passes: dict[str, list[Pass]] = {"on": [], "off": []}
    with (
        EngineProcess(settings.model_copy(update=what.on)) as on,
        EngineProcess(settings.model_copy(update=what.off)) as off,
    ):
        engines = {"on": on, "off": off}
        for engine in engines.values():
            engine.wait_ready(READY_S)
            engine_pass(engine, w1(tokenizer, seed - 1, 8))
        for pair in range(pairs):
            rows = what.rows(tokenizer, seed + pair, requests)
            for turn in ("on", "off") if pair % 2 else ("off", "on"):
                say(f"pair {pair + 1} of {pairs}: {requests} requests, {name} {turn}")
                passes[turn].append(engine_pass(engines[turn], rows, group=f"pair {pair}"))
    asked = sum(row.max_tokens for row in rows)
    logs = [math.log(o.seconds / i.seconds) for i, o in zip(passes["on"], passes["off"], strict=True)]
    drafted, accepted = (
        sum(getattr(one, field) for one in passes["on"]) for field in ("drafted", "accepted")
    )
    within = interval(logs)
    report = {
        "bench": f"engine_{name}",
        "ratio": round(math.exp(fmean(logs)), 3),
        "interval_95": within and [round(math.exp(end), 3) for end in within],
        "ratios": [round(math.exp(one), 2) for one in logs],
        "on_tok_s": [round(asked / one.seconds, 1) for one in passes["on"]],
        "off_tok_s": [round(asked / one.seconds, 1) for one in passes["off"]],
        "cached_share": round(passes["on"][-1].cached_tokens / sum(len(row.prompt_ids) for row in rows), 3),
        "drafted": drafted,
        "acceptance": round(accepted / drafted, 3) if drafted else None,
        "pairs": pairs,
        "workload": what.workload,
        "requests": requests,
        "output_tokens": asked,
    }
    say(
        f"{name} on gives {report['ratio']} times the tokens per second of off, 95 %: {report['interval_95']}"
    )
    return report


def interval(logs: list[float]) -> tuple[float, float] | None:
    """Where the mean of such logarithms lies, 95 %, if they are about normal. None: too few to tell."""
    freedom = len(logs) - 1
    if len(logs) < FEWEST_FOR_AN_INTERVAL:
        return None
    z = NormalDist().inv_cdf(0.975)
    # To Student's t: Cornish and Fisher, three terms, within 1 % from here on.
    t = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    half = t * stdev(logs) / math.sqrt(len(logs))
    return fmean(logs) - half, fmean(logs) + half
