"""Whose time a step was: the model's and the sampler's, or the loop's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Request
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.stopwatch import Stopwatch

from ..support.engines import tiny_settings

SLOW_S = 0.1


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine(tiny_settings(write_tiny(tmp_path_factory.mktemp("tiny"))))


def slowly(act: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*args: Any, **more: Any) -> Any:
        time.sleep(SLOW_S)
        return act(*args, **more)

    return slow


def step_of(engine: Engine) -> tuple[float, float]:
    engine.add(Request(id="one", prompt_ids=[1, 2, 3], max_tokens=1, ignore_eos=True))
    engine.step()
    assert not engine.has_work
    return engine.stats.step_s, engine.stats.loop_s


@pytest.mark.parametrize(
    ("part", "act", "the_loops"),
    [("_runner._decoder", "forward", False), ("_sampler", "sample", False), ("_scheduler", "plan", True)],
)
def test_a_slow_part_is_told_as_what_it_is(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, part: str, act: str, the_loops: bool
) -> None:
    owner: Any = engine
    for name in part.split("."):
        owner = getattr(owner, name)
    monkeypatch.setattr(owner, act, slowly(getattr(owner, act)))
    step_s, loop_s = step_of(engine)
    assert step_s >= SLOW_S
    assert 0 < loop_s <= step_s
    assert loop_s >= SLOW_S if the_loops else loop_s <= step_s - SLOW_S, (step_s, loop_s)


def test_a_stopwatch_adds_up_what_is_inside_it() -> None:
    watch, began = Stopwatch(), time.monotonic()
    for _ in range(2):
        with watch:
            time.sleep(0.02)
        time.sleep(0.05)
    whole_s = time.monotonic() - began
    assert 0.04 <= watch.take() <= whole_s - 0.1
    assert watch.take() == 0.0
