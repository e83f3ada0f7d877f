"""What `gristmill run` says of itself: what it begins, how it went, and how to go on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .batch.intake import Intake
from .batch.run import Run
from .batch.speed import Speed
from .console import put_json, say
from .link import EMBEDDED, shown
from .progress import duration


@dataclass(frozen=True, slots=True)
class Summary:
    """Words on stderr; ``as_json``: what it comes to on stdout, too."""

    job: Run
    intake: Intake
    output: str
    errors: str | None
    fresh: bool
    """The command line says --fresh: again it would begin anew."""
    as_json: bool

    def begin(self, broker: str) -> None:
        """One line, before anything is waited for."""
        batch, before = self.job.batch, self.job.resumed
        where = "the embedded broker" if broker.startswith(EMBEDDED) else shown(broker)
        ended = f", {before:,} of them ended in an earlier run" if before else ""
        say(f"{batch.id}: {batch.request_counts.total:,} rows for {batch.model} on {where}{ended}")

    def end(self, seconds: float, logs: list[str]) -> None:
        """How it went, whatever ended it."""
        speed = self.job.speed()
        found = self._found(seconds, speed)
        found["logs"] = logs
        if self.as_json:
            put_json(found)
        rows = [f"{found['succeeded']:,} done", f"{found['failed']:,} failed"]
        if found["invalid"]:
            rows.append(f"{found['invalid']:,} of them not valid")
        if found["resumed"]:
            rows.append(f"{found['resumed']:,} ended in an earlier run")
        say(f"rows:    {', '.join(rows)}")
        say(f"tokens:  {found['prompt_tokens']:,} in, {found['completion_tokens']:,} out{_rate(speed)}")
        say(f"time:    {duration(seconds)}{_where_it_went(seconds, speed)}")
        if speed is not None:
            say(f"TTFT:    p50 {speed.ttft_p50_s:.3f} s, p95 {speed.ttft_p95_s:.3f} s (from a row's begin)")
        say(f"output:  {self.output}")
        if self.errors and found["failed"]:
            say(f"errors:  {self.errors}")
        for log in logs:
            say(f"log:     {log}")

    def how_to_go_on(self, first: str = "") -> None:
        """After its end came too soon. ``first``: what is to be done before."""
        batch = self.job.batch
        counts = batch.request_counts
        left = counts.total - counts.completed - counts.failed
        again = "without --fresh" if self.fresh else "again"
        say(f"stopped with {left:,} rows to go; {first}run the same command {again} to continue")
        if batch.created_at is not None:
            say(f"  or leave them to other workers:  gristmill batch resume {batch.id}")

    def _found(self, seconds: float, speed: Speed | None) -> dict[str, Any]:
        batch, checked = self.job.batch, self.intake.checked
        counts, usage = batch.request_counts, batch.usage
        return {
            "batch": batch.id,
            "model": batch.model,
            "rows": counts.total,
            "succeeded": counts.completed,
            "failed": counts.failed,
            "invalid": checked.invalid + batch.problems,
            "copies": checked.copies,
            "resumed": self.job.resumed,
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "seconds": round(seconds, 3),
            "tokens_per_s": speed and _rounded(speed.tokens_per_s),
            "generating_s": speed and _rounded(speed.generating_s),
            "ttft_p50_s": speed and _rounded(speed.ttft_p50_s),
            "ttft_p95_s": speed and _rounded(speed.ttft_p95_s),
            "complete": self.job.over,
            "output": self.output,
            "errors": self.errors,
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _rate(speed: Speed | None) -> str:
    """A run of a few rows is mostly loading and waiting; how fast the model is shows between its tokens."""
    rate = None if speed is None else speed.tokens_per_s
    return "" if rate is None else f", {rate:,.{0 if rate >= 10 else 1}f} tok/s since the first"


def _where_it_went(seconds: float, speed: Speed | None) -> str:
    if speed is None:
        return ""
    made_s = min(seconds, speed.generating_s)
    return f": {duration(made_s)} generating, {duration(seconds - made_s)} loading, waiting and writing"
