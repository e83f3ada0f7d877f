"""Replayed steps, in memory that stays where it is, give the tokens of steps launched anew."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gristmill.engine.engine import Engine
from gristmill.engine.graphs import Record
from gristmill.engine.messages import Request
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.settings import EngineSettings
from torch import Tensor

from ..support.framed import FramedTorchAttention, rerun

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("graphs") / "qwen3", "qwen3", max_position_embeddings=1024)


def spoken(
    model: Path, monkeypatch: pytest.MonkeyPatch, record: Record | None = None, *, overlap: bool = False
) -> tuple[dict[str, list[int]], int]:
    """What a mix of requests gets, one of them long; and how many sizes of batch were recorded."""
    monkeypatch.setattr("gristmill.engine.kernels.TorchAttention", FramedTorchAttention)
    settings = EngineSettings(
        model=str(model),
        device="cpu",
        attention="torch",
        num_threads=1,
        max_num_seqs=12,
        max_batch_prefill_tokens=256,
        max_batch_total_tokens=2048,
        overlap=overlap,
        speculate=0,
    )
    engine = Engine(settings)
    if record is not None:
        engine._runner.graphs = engine._runner.graphs_over(12, record)
    rng = random.Random(5)
    said: dict[str, list[int]] = {}
    for i in range(14):
        knobs: dict[str, Any] = {"temperature": (0.0, 0.9)[i % 2], "top_k": 4 if i == 3 else 0, "seed": i}
        prompt = [rng.randrange(256) for _ in range(508 if i == 5 else 3 + 5 * (i % 4))]
        said[f"r{i}"] = []
        engine.add(
            Request(id=f"r{i}", prompt_ids=prompt, max_tokens=6 + 3 * (i % 5), ignore_eos=True, **knobs)
        )
    while engine.has_work:
        for output in engine.step():
            said[output.id] += output.token_ids
        engine.check()
    graphs = engine._runner.graphs
    return said, graphs.recorded if graphs else 0


@pytest.mark.parametrize("overlap", [False, True], ids=["in step", "a step ahead"])
def test_replayed_steps_give_the_same_tokens(
    model: Path, monkeypatch: pytest.MonkeyPatch, overlap: bool
) -> None:
    expected, none = spoken(model, monkeypatch)
    found, recorded = spoken(model, monkeypatch, rerun, overlap=overlap)
    assert found == expected
    assert none == 0
    assert recorded >= 4  # sizes of batches, and keys of the long one


def test_a_step_that_cannot_be_recorded_is_launched(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    assert spoken(model, monkeypatch, refuses) == (spoken(model, monkeypatch)[0], 0)
