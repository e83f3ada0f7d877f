"""Swap or recompute: whichever the measured costs favour."""

from __future__ import annotations

import random

import pytest
from gristmill.engine.swap import StepCosts, swap_pays


def test_a_token_costs_what_it_adds_to_a_step() -> None:
    costs, draw = StepCosts(), random.Random(1)
    for _ in range(200):
        tokens = draw.choice((1, 16, 128, 512))
        costs.observe(tokens, 0.010 + 0.0003 * tokens + draw.uniform(0.0, 0.001))
    assert costs.token_s == pytest.approx(0.0003, rel=0.05)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    costs = StepCosts()
    for token_s in (0.0003, 0.0009):
        for step in range(400):
            tokens = 1 + step % 100
            costs.observe(tokens, 0.010 + token_s * tokens)
    assert costs.token_s == pytest.approx(0.0009, rel=0.05)


def test_steps_that_are_all_alike_give_their_mean() -> None:
    costs = StepCosts()
    for _ in range(100):
        costs.observe(8, 0.016)
    assert costs.token_s == pytest.approx(0.002)


def test_before_anything_was_measured_nothing_is_swapped() -> None:
    assert StepCosts().token_s is None
    assert not swap_pays(block_tokens=16, token_s=None, block_s=1e-9)


@pytest.mark.parametrize(
    ("token_s", "block_s", "pays"),
    [
        (0.0003, 0.0002, True),  # SmolLM2-135M on a CPU: 4.8 ms against 0.4
        (0.000_004, 0.000_1, False),  # a card that computes 250,000 tokens a second, over a slow bus
        (0.0, 0.0, False),
    ],
)
def test_a_block_goes_both_ways_and_is_computed_once(token_s: float, block_s: float, pays: bool) -> None:
    assert swap_pays(block_tokens=16, token_s=token_s, block_s=block_s) is pays
