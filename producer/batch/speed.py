"""Speed: how fast rows were made, as their workers have noted it with the objects they are in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from ...schemas.batch import ResultObject, ttft_of


@dataclass(frozen=True, slots=True)
class Speed:
    """``generating_s``: from the first token of all to the end of the last row."""

    generating_s: float
    tokens_per_s: float | None
    """Of output, in that time; None: there was none."""
    ttft_p50_s: float
    """Seconds from when a row began to its first token, within 5 %."""
    ttft_p95_s: float


def measured(objects: Iterable[ResultObject]) -> Speed | None:
    """None: nothing is noted. Times of several machines are as good as their clocks agree."""
    times = [each.times for each in objects if each.times is not None]
    if not times:
        return None
    seconds = max(each.finished_at for each in times) - min(each.first_token_at for each in times)
    tokens = sum(each.completion_tokens for each in times)
    rows = Counter[int]()
    for each in times:
        rows.update({int(number): count for number, count in each.ttft.items()})
    rate = tokens / seconds if seconds > 0 else None
    return Speed(max(0.0, seconds), rate, _quantile(rows, 0.5), _quantile(rows, 0.95))


def _quantile(rows: Counter[int], share: float) -> float:
    place = round(share * (rows.total() - 1))
    bins = sorted(rows)
    ended = accumulate(rows[number] for number in bins)
    return next(ttft_of(number) for number, rank in zip(bins, ended, strict=True) if place < rank)
