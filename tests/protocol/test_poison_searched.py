"""Every world in which rows kill what runs them: nobody else is blamed, and it ends."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest
from gristmill.worker import engine_client

from .checker import Broken, check, most_harm
from .poison import PROPERTIES, FakeProcess, Model, Rules, Size, ended

NEIGHBOURS = 20
AMONG_TWENTY = Size((None,) * 7 + (0,) + (None,) * 8 + (0,) + (None,) * (NEIGHBOURS - 15), hasty=True)
"""Two that kill."""


@pytest.fixture(autouse=True)
def engines_that_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is logged of their deaths, and nobody looks for cycles in tuples that have none."""
    monkeypatch.setattr(engine_client, "EngineProcess", FakeProcess)
    monkeypatch.setattr(engine_client.log, "disabled", True)
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    ("size", "deaths", "at_least"),
    [
        pytest.param(Size((0, None)), 5, 1_500, id="one culprit, one neighbour"),
        pytest.param(Size((0, None), faults=1), 5, 10_000, id="and a kill or a drain from outside"),
        pytest.param(Size((0, None), tokens=2, faults=1), 5, 15_000, id="and each has two tokens to make"),
        pytest.param(Size((1, None)), 11, 4_000, id="it makes a token each time"),
        pytest.param(Size((0, 0)), 10, 10_000, id="two culprits"),
        pytest.param(AMONG_TWENTY, 16, 10_000, id="two culprits, twenty neighbours"),
    ],
)
def test_nobody_is_blamed_for_others_and_culprits_are_given_up_in_so_many_deaths(
    size: Size, deaths: int, at_least: int
) -> None:
    """The engine or the whole worker, as chance will have it; claims, writes and answers in any order."""
    model = Model(size)
    graph = check(model, PROPERTIES, ended)
    most = most_harm(model, graph)
    print(f"{size}: {len(graph.worlds):,} worlds, {graph.steps:,} steps, at most {most} deaths to come")
    assert most <= deaths
    assert len(graph.worlds) >= at_least, "the model lost actions"


@pytest.mark.parametrize(
    ("rule", "promise"),
    [
        ("runs_after_the_record", "no strike for what others did"),
        ("others_run_after_the_record", "no strike for what others did"),
        ("company_is_no_strike", "no strike for what others did"),
        ("doubtful_run_alone", "it ends"),
        ("a_crash_alone_is_a_strike", "it ends"),
    ],
)
def test_without_this_rule_somebody_is_blamed_or_it_never_ends(rule: str, promise: str) -> None:
    model = Model(Size((0, None)), replace(Rules(), **{rule: False}))
    with pytest.raises(Broken) as broken:
        most_harm(model, check(model, PROPERTIES, ended))
    print(broken.value)
    assert broken.value.property == promise
    assert len(broken.value.trace) <= 25


def test_every_rule_is_needed() -> None:
    mark = next(
        m
        for m in test_without_this_rule_somebody_is_blamed_or_it_never_ends.pytestmark
        if m.name == "parametrize"
    )
    assert {row[0] for row in mark.args[1]} == set(Rules.__dataclass_fields__)
