"""Engine settings that cannot work together are refused before a model is loaded."""

from __future__ import annotations

import re

import pytest
from gristmill.engine.settings import EngineSettings


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"max_num_seqs": 65, "max_batch_prefill_tokens": 64}, "max_num_seqs (65)"),
        ({"max_batch_total_tokens": 15}, "max_batch_total_tokens (15)"),
        ({"memory_fraction": 1.5}, "memory_fraction"),
        ({"kv_blok_size": 16}, "kv_blok_size"),
    ],
)
def test_what_cannot_work_is_refused_by_name(knobs: dict[str, int], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        EngineSettings(model="m", **knobs)  # type: ignore[arg-type]


def test_the_smallest_that_work_are_taken() -> None:
    EngineSettings(model="m", max_num_seqs=1, max_batch_prefill_tokens=1, max_batch_total_tokens=16)
