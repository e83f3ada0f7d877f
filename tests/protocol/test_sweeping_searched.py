"""Whoever stands still and dies: a living owner keeps its claim, and a dead one's comes back."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from gristmill.backends.message_queue import MessageQueue
from gristmill.schemas import keys

from ..support.valkey import Valkey
from .checker import Broken, check
from .sweeping import LEASE, PROPERTIES, Books, Model, Rules, ended, swept

TICK_MS, NOW_MS = 1_000, 1_000_000
ASKED = 300


@pytest.mark.parametrize(("faults", "at_least"), [(1, 2_000), (2, 5_000)])
def test_a_living_owner_keeps_its_claim_and_a_dead_ones_comes_back(faults: int, at_least: int) -> None:
    graph = check(Model(faults), PROPERTIES, ended)
    print(f"{faults} faults: {len(graph.worlds):,} worlds, {graph.steps:,} steps")
    assert len(graph.worlds) >= at_least, "the model lost actions"


@pytest.mark.parametrize("rule", Rules.__dataclass_fields__)
def test_without_this_rule_a_living_owner_loses_its_claim(rule: str) -> None:
    with pytest.raises(Broken) as broken:
        check(Model(1, replace(Rules(), **{rule: False})), PROPERTIES, ended)
    print(broken.value)
    assert broken.value.property == PROPERTIES[0].name


def test_the_real_script_answers_as_the_model_does(valkey: Valkey) -> None:
    """Books as they come about in the search, and whoever may sweep then."""
    worlds = check(Model(1), PROPERTIES, ended).worlds
    asked = {
        (w.books, mine, min(w.back, LEASE))
        for w in worlds
        if w.up
        for mine in (w.survivor, None)
        if mine != -1
    }
    queue = MessageQueue(valkey.client(), lease_s=LEASE * TICK_MS / 1000, now_ms=NOW_MS)
    for books, mine, up_for in random.Random(7).sample(sorted(asked, key=repr), ASKED):
        write(queue, books)
        queue._swept_ms = "" if mine is None else NOW_MS - mine * TICK_MS
        run = "run" if books.known_run else "another"
        answer = queue.sweep(period_s=TICK_MS / 1000, server=(run, NOW_MS - up_for * TICK_MS))
        after, looked = swept(Rules(), books, mine, up_for)
        assert read(queue) == after, (books, mine, up_for)
        if looked or after != books:
            assert answer.hold_s == after.hold * TICK_MS / 1000


def write(queue: MessageQueue, books: Books) -> None:
    values = {
        "at": NOW_MS - books.at * TICK_MS,
        "hold": NOW_MS + books.hold * TICK_MS,
        "gap": "" if books.gap < 0 else NOW_MS - books.gap * TICK_MS,
        "run": "run" if books.known_run else "gone",
    }
    queue.client.hset(keys.SWEEP, mapping=values)


def read(queue: MessageQueue) -> Books:
    at, hold, gap, run = queue.client.hmget(keys.SWEEP, "at", "hold", "gap", "run")
    return Books(
        at=round((NOW_MS - int(at)) / TICK_MS),
        hold=max(0, round((float(hold) - NOW_MS) / TICK_MS)),
        gap=round((NOW_MS - float(gap)) / TICK_MS) if gap else -1,
        known_run=run != b"gone",
    )
