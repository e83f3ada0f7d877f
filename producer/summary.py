"""What `gristmill run` says of itself: what it begins, how it went, and how to go on where it stopped."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from .batch.intake import Intake
from .batch.run import Run
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
        found = self._found(seconds)
        found["logs"] = logs
        if self.as_json:
            put_json(found)
        rows = [f"{found['succeeded']:,} done", f"{found['failed']:,} failed"]
        if found["invalid"]:
            rows.append(f"{found['invalid']:,} of them not valid")
        if found["resumed"]:
            rows.append(f"{found['resumed']:,} ended in an earlier run")
        say(f"rows:    {', '.join(rows)}")
        say(
            f"tokens:  {found['prompt_tokens']:,} in, {found['completion_tokens']:,} out"
            f" in {duration(found['seconds'])}, {found['tokens_per_s']:,.0f} tok/s"
        )
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

    def _found(self, seconds: float) -> dict[str, Any]:
        batch, checked = self.job.batch, self.intake.checked
        counts, usage = batch.request_counts, batch.usage
        fresh = counts.completed + counts.failed - self.job.resumed
        busy_s = seconds if batch.in_progress_at is None else min(seconds, time.time() - batch.in_progress_at)
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
            "tokens_per_s": round(usage.completion_tokens / busy_s, 1) if fresh and busy_s > 0 else 0.0,
            "complete": self.job.over,
            "output": self.output,
            "errors": self.errors,
        }
