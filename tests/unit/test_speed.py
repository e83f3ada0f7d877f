"""How fast a run was: without what passed before its first token."""

from __future__ import annotations

import random

import pytest
from gristmill.producer.batch.speed import measured
from gristmill.schemas.batch import ResultObject, RowTimes, ttft_bin, ttft_of


def held(times: RowTimes | None) -> ResultObject:
    return ResultObject(
        segment="b.s1", kind="output", name="x", rows=1, bytes=1, sha256="", lines="", times=times
    )


def test_a_runs_speed_begins_with_its_first_token() -> None:
    waits = [random.Random(1).uniform(0.01, 2.0) for _ in range(200)]
    objects = [held(None)]
    for start in range(0, 200, 50):
        ttft: dict[str, int] = {}
        for wait in waits[start : start + 50]:
            ttft[str(ttft_bin(wait))] = ttft.get(str(ttft_bin(wait)), 0) + 1
        times = RowTimes(
            first_token_at=100.0 + start, finished_at=150.0 + start, completion_tokens=500, ttft=ttft
        )
        objects.append(held(times))
    found = measured(objects)
    assert found is not None
    assert (found.generating_s, found.tokens_per_s) == (200.0, 10.0)
    in_order = sorted(waits)
    assert found.ttft_p50_s == pytest.approx(in_order[100], rel=0.06)
    assert found.ttft_p95_s == pytest.approx(in_order[189], rel=0.06)
    assert measured([held(None)]) is None


def test_a_single_token_has_no_speed() -> None:
    one = RowTimes(first_token_at=7.0, finished_at=7.0, completion_tokens=1, ttft={str(ttft_bin(0.0)): 1})
    found = measured([held(one)])
    assert found is not None
    assert (found.tokens_per_s, found.ttft_p50_s) == (None, ttft_of(0))
