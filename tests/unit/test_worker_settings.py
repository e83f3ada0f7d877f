"""What the worker refuses to start with, and how it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from gristmill.schemas.errors import Misconfigured
from gristmill.worker.settings import load_worker_settings


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"max_batch_total_tokens": 1}, "max_batch_total_tokens (1) must be at least kv_block_size (16)"),
        (
            {"max_batch_prefill_tokens": 16},
            "max_num_seqs (128) must not exceed max_batch_prefill_tokens (16)",
        ),
    ],
)
def test_knobs_that_contradict_each_other_are_named(knobs: dict[str, int], words: str) -> None:
    settings = load_worker_settings(model="m", **knobs)
    with pytest.raises(Misconfigured) as caught:
        settings.engine(Path("/m"))
    assert words in caught.value.message


@pytest.mark.parametrize("name", ["idle_exit_s", "drain_s", "heartbeat_every_s"])
def test_a_time_span_has_an_end(name: str) -> None:
    with pytest.raises(Misconfigured, match=name.upper()):
        load_worker_settings(model="m", **{name: float("inf")})
