"""Every world of small sizes keeps the promises; with any one of the rules broken, some world does not."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest

from .checker import Broken, check, explore
from .model import Model, Rules, Size
from .properties import PROPERTIES, ended


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Millions of tuples without a cycle: looking for one would take most of the time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "at_least"),
    [
        pytest.param(Size(tokens=1, faults=2), 60_000, id="two faults"),
        pytest.param(Size(tokens=2, faults=1), 3_000, id="two tokens"),
        pytest.param(Size(jobs=2, tokens=1, workers=1, faults=1, cancels=0), 10_000, id="two jobs"),
    ],
)
def test_whatever_happens_every_promise_is_kept(size: Size, at_least: int) -> None:
    graph = check(Model(size), PROPERTIES, ended)
    print(f"{size}: {len(graph.worlds):,} worlds, {graph.steps:,} steps")
    assert len(graph.worlds) >= at_least, "the model lost actions"


@pytest.mark.parametrize(
    ("rule", "size", "promise"),
    [
        ("claim_registers_at_once", Size(faults=1), "nothing lost"),
        ("claim_reads_log", Size(faults=1), "the log is whole"),
        ("claim_takes_done_over", Size(faults=1), "what is done is not run again"),
        ("attempt_from_clock", Size(faults=2), "the log is whole"),
        ("publish_checks_attempt", Size(faults=1), "nobody journals after a newer attempt"),
        ("publish_checks_place", Size(faults=1), "the log is whole"),
        (
            "publish_needs_running",
            Size(tokens=1, workers=1, faults=2, cancels=0),
            "the result is the undisturbed",
        ),
        ("object_create_only", Size(faults=1), "one result"),
        ("finish_reads_object", Size(tokens=1, faults=2), "the final state says what the object says"),
        ("finish_after_object", Size(faults=1), "the final state says what the object says"),
        ("ack_after_object", Size(faults=1), "nothing lost"),
        ("ack_by_tag", Size(faults=1), "living owners keep their claims"),
        ("requeue_by_tag", Size(tokens=1, faults=2, cancels=0), "living owners keep their claims"),
        ("fenced_keeps_message", Size(faults=1), "acknowledged only when durable"),
        ("sweep_holds", Size(faults=1), "living owners keep their claims"),
        ("engine_resumes_from_given", Size(faults=1), "the log is whole"),
    ],
)
def test_without_this_rule_a_promise_is_broken(rule: str, size: Size, promise: str) -> None:
    promised = next(p for p in PROPERTIES if p.name.startswith(promise))
    with pytest.raises(Broken) as broken:
        explore(Model(size, replace(Rules(), **{rule: False})), (promised,))
    print(broken.value)
    assert len(broken.value.trace) <= 20


def test_every_rule_is_needed() -> None:
    mark = next(m for m in test_without_this_rule_a_promise_is_broken.pytestmark if m.name == "parametrize")
    assert {row[0] for row in mark.args[1]} == set(Rules.__dataclass_fields__)
