"""A workload through an engine process, timed; and what a reader needs to judge the number."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gristmill.engine.messages import Failed, Request, Stats
from gristmill.engine.process import EngineProcess
from workload import Row

ROOT = Path(__file__).resolve().parent.parent
READY_S, STEP_S = 180.0, 120.0


@dataclass(frozen=True)
class Pass:
    """All rows through one engine."""

    seconds: float
    """From the first request in to the last token out."""
    cached_tokens: int
    """Of the prompts."""
    stats: list[Stats]
    """Of each step."""

    @property
    def drafted(self) -> int:
        """Guesses that were checked …"""
        return self.stats[-1].drafted - self.stats[0].drafted

    @property
    def accepted(self) -> int:
        """… and those of them that were right."""
        return self.stats[-1].accepted - self.stats[0].accepted

    @property
    def loop(self) -> dict[str, float]:
        """Means of a step: what it took, and of that the engine's own loop; and telling of it."""
        own = sorted(step.loop_s for step in self.stats)
        whole = sum(step.step_s for step in self.stats)
        return {
            "steps": len(own),
            "step_ms": round(1000 * whole / len(own), 2),
            "loop_ms": round(1000 * sum(own) / len(own), 2),
            "loop_ms_p95": round(1000 * own[int(0.95 * (len(own) - 1))], 2),
            "loop_share": round(sum(own) / whole, 4),
            "report_ms": round(1000 * sum(step.report_s for step in self.stats) / len(own), 2),
        }


def engine_pass(engine: EngineProcess, rows: Sequence[Row], group: str = "") -> Pass:
    """Run ``rows``, all there at once, as rows of the bulk run ``group``. Raises if one length is not as
    asked."""
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
            group=group,
        )
        for i, row in enumerate(rows)
    )
    ended = cached = 0
    stats: list[Stats] = []
    while ended < len(rows):
        report = engine.recv(STEP_S)
        if report is None or isinstance(report, Failed):
            raise SystemExit(f"the engine failed: {report}")
        stats.append(report.stats)
        for output in report.outputs:
            lengths[output.id] += len(output.token_ids)
            ended += output.finish is not None
            cached += output.cached_tokens or 0
    seconds = time.monotonic() - started
    assert lengths == {row.id: row.max_tokens for row in rows}
    return Pass(seconds, cached, stats)


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
