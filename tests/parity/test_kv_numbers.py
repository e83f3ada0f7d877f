"""Keys and values in fewer bits: what is generated depends on the request alone there, too."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Request
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.native.build import find_compiler
from gristmill.engine.runner import Runner
from gristmill.engine.settings import EngineSettings
from gristmill.schemas.errors import Misconfigured

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(model: Path, **knobs: Any) -> EngineSettings:
    usual: dict[str, Any] = {
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_batch_prefill_tokens": 64,
        "max_batch_total_tokens": 1024,
        "max_total_tokens": 256,
        "attention": "cpu" if find_compiler() else "torch",
    }
    return EngineSettings(model=str(model), device="cpu", **usual | knobs)


def requests(seed: int) -> list[Request]:
    """Prompts that begin alike; the cache below holds a few of them."""
    draw = random.Random(seed)
    trunk = [draw.randrange(256) for _ in range(100)]
    return [
        Request(
            id=f"r{number}",
            prompt_ids=trunk[: draw.choice((15, 17, 64, 100))] + [draw.randrange(256) for _ in range(20)],
            max_tokens=40,
            temperature=draw.choice((0.0, 1.0)),
            seed=number,
            ignore_eos=True,
        )
        for number in range(10)
    ]


def run(engine: Engine, todo: list[Request]) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {}
    for request in todo:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            said.setdefault(output.id, []).extend(output.token_ids)
        engine.check()
    return said


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_neighbours_cache_hits_and_swapping_change_no_token(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deterministic mode takes the matrix library's own last bits out of it, which rounding may make larger.

    What copying a block was measured to cost is overruled: tiny models compute a token faster.
    """
    monkeypatch.setattr("gristmill.engine.engine.swap_pays", lambda **_: True)
    model = write_tiny(tmp_path, "mistral")
    knobs: dict[str, Any] = {"kv_cache_dtype": kind, "deterministic": True}
    todo = requests(3)
    alone = Engine(settings(model, prefix_cache=False, **knobs))
    expected = {name: said for request in todo for name, said in run(alone, [request]).items()}
    crowded = Engine(settings(model, max_batch_total_tokens=256, swap_gib=0.001, **knobs))
    assert run(crowded, todo) == expected
    assert crowded.stats.prefix_hits
    assert crowded.stats.blocks_loaded


def test_attention_that_cannot_keep_them_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"does not keep keys and values as int8.* attention=auto"):
        Runner(settings(write_tiny(tmp_path), attention="flash", kv_cache_dtype="int8"))


def test_a_byte_and_a_scale_each_are_what_the_cache_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = write_tiny(tmp_path, "llama", head_dim=64)
    taken: dict[str, int] = {}
    for kind in ("auto", "int8", "fp8_e4m3fn"):
        with caplog.at_level(logging.INFO):
            made = Runner(settings(model, attention="torch", kv_cache_dtype=kind))
        summary = caplog.records[-1].__dict__
        assert summary["kv_cache_tokens"] == made.num_blocks * 16 == 1024
        taken[summary["kv_cache_dtype"]] = summary["kv_cache_bytes"]
    assert taken["int8"] == taken["fp8"]
    assert taken["int8"] / taken["float32"] == (64 + 4) / (64 * 4)
