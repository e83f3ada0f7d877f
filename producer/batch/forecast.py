"""How far a batch is, and how long the rest takes: learns how long outputs are, and how fast they come."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ...schemas.batch import Batch, BatchStatus
from .cutting import Part
from .order import OUTPUT_TOKENS_PER_S, PROMPT_TOKENS_PER_S

LIVE_SHARE = 0.05
"""From this part of the rows on, what was measured counts, and not what was guessed."""
SAMPLES, SAMPLE_S = 120, 2.0
JOIN_S = 10.0
"""How often a worker hands over what has ended, unless it was told otherwise."""
PROMPT_WEIGHT = OUTPUT_TOKENS_PER_S / PROMPT_TOKENS_PER_S
"""What a token of a prompt costs, in tokens of output."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a batch stands. Counts are rows."""

    status: BatchStatus | None = None
    rows: int = 0
    completed: int = 0
    failed: int = 0
    validated: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_per_s: float = 0.0
    """Of output."""
    eta_s: float | None = None
    live: bool = False
    """Enough has ended for the forecast to rest on it."""

    @property
    def ended(self) -> int:
        """Rows that need nothing more."""
        return self.completed + self.failed


class Forecast:
    """Told of a batch's record now and then. ``parts``: its segments in order, as they were estimated."""

    def __init__(self, parts: Sequence[Part] = ()) -> None:
        self._rows = [0, *accumulate(part.rows for part in parts)]
        self._prompts = [0.0, *accumulate(part.prompt_tokens for part in parts)]
        self._outputs = [0.0, *accumulate(part.output_tokens for part in parts)]
        self._samples: deque[tuple[float, Batch]] = deque(maxlen=SAMPLES)

    def progress(self, batch: Batch, now: float | None = None) -> Progress:
        """``now``: seconds of a clock that never stops; for tests."""
        now = time.monotonic() if now is None else now
        self._note(batch, now)
        counts, usage = batch.request_counts, batch.usage
        ended = counts.completed + counts.failed
        seconds, since = now - self._samples[0][0], self._samples[0][1].usage
        fresh = usage.completion_tokens - since.completion_tokens
        work = fresh + PROMPT_WEIGHT * (usage.prompt_tokens - since.prompt_tokens)
        left = self._left(batch, ended)
        return Progress(
            status=batch.status,
            rows=counts.total,
            completed=counts.completed,
            failed=counts.failed,
            validated=batch.validated,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            tokens_per_s=fresh / seconds if seconds > 0 else 0.0,
            eta_s=left / (work / seconds) if work > 0 and seconds > 0 else None,
            live=self.live(batch),
        )

    def live(self, batch: Batch) -> bool:
        """Enough rows have run for what was measured on them to count; refused lines ran nowhere."""
        counts = batch.request_counts
        refused = self._refused(counts.total)
        ran, rows = counts.completed + counts.failed - refused, counts.total - refused
        return ran > 0 and ran >= LIVE_SHARE * rows

    def tokens(self, batch: Batch) -> tuple[float, float]:
        """(of all prompts, of all outputs): rows that have ended count as they are, the others as estimated,
        corrected by how far the estimates of the former were off.
        """
        counts, usage = batch.request_counts, batch.usage
        prompts, outputs = self._tokens_left(batch, counts.completed + counts.failed)
        return usage.prompt_tokens + prompts, usage.completion_tokens + outputs

    def _note(self, batch: Batch, now: float) -> None:
        """A sample every few seconds. Of the time before anything has ended, as much as answers wait until
        they join a batch, many at a time: the first ones took that, and not the time since the last look.
        """
        while (
            self._samples and self._samples[0][1].usage == batch.usage and now - self._samples[0][0] > JOIN_S
        ):
            self._samples.popleft()
        if not self._samples or now - self._samples[-1][0] >= SAMPLE_S:
            self._samples.append((now, batch))

    def _left(self, batch: Batch, ended: int) -> float:
        """Work of the rows that have not ended, in tokens of output."""
        prompts, outputs = self._tokens_left(batch, ended)
        return outputs + PROMPT_WEIGHT * prompts

    def _tokens_left(self, batch: Batch, ended: int) -> tuple[float, float]:
        total, usage = batch.request_counts.total, batch.usage
        prompt_done, prompt_all = self._at(self._prompts, ended, total)
        output_done, output_all = self._at(self._outputs, ended, total)
        outputs = (output_all - output_done) * _ratio(usage.completion_tokens, output_done)
        prompts = (prompt_all - prompt_done) * _ratio(usage.prompt_tokens, prompt_done)
        return prompts, outputs

    def _refused(self, total: int) -> int:
        """They are in no segment, and end first."""
        return total - self._rows[-1] if self._rows[-1] else 0

    def _at(self, sums: Sequence[float], ended: int, total: int) -> tuple[float, float]:
        """(estimate of the first ``ended`` rows, of all). Without estimates rows count alike."""
        if self._rows[-1] == 0:
            return float(ended), float(total)
        ended = min(max(ended - self._refused(total), 0), self._rows[-1])
        place = min(bisect_right(self._rows, ended), len(self._rows) - 1)
        rows = self._rows[place] - self._rows[place - 1]
        share = (ended - self._rows[place - 1]) / rows if rows else 1.0
        return sums[place - 1] + share * (sums[place] - sums[place - 1]), sums[-1]


def _ratio(measured: float, estimated: float) -> float:
    return measured / estimated if estimated > 0 else 1.0
