"""What a row gets is what the plain definition says, whatever shortcuts were taken, whoever is beside it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from gristmill.engine import sampler as sampler_module
from gristmill.engine.messages import Request
from gristmill.engine.native.sampling import load_sampling
from gristmill.engine.noise import MAX_GUMBEL, gumbel, noise_bits, noise_key
from gristmill.engine.sampler import Sampler
from gristmill.engine.sequence import Sequence
from gristmill.schemas.settings import default_home
from hypothesis import given, settings
from hypothesis import strategies as st

from ..support.emulated import EmulatedSampling, arm
from ..support.flavours import is_arm, kernel_target

# Rows this small are not worth a second thread, least of all on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")

Make = Callable[[int], Sampler]
VOCAB = 2000  # larger than both widths


@pytest.fixture(scope="module", params=["torch", "native"])
def make(request: pytest.FixtureRequest) -> Make:
    """A sampler for a vocabulary of this size. Both kinds are one definition."""
    if request.param == "torch":
        return Sampler
    kernels = default_home() / "kernels"
    native = (
        EmulatedSampling(arm(kernel_target())) if is_arm() else load_sampling(kernels, 2, kernel_target())
    )
    if native is None:
        pytest.skip("no C++ compiler here")
    return lambda vocab: Sampler(vocab, native=native)


def seq(position: int = 0, *, end_ids: frozenset[int] = frozenset(), **knobs: Any) -> Sequence:
    request = Request(
        id="r", prompt_ids=[1, 2, 3], output_ids=[5] * position, max_tokens=10_000, **{"seed": 1} | knobs
    )
    return Sequence(request, limit=10_000, end_ids=end_ids)


def plain(logits: torch.Tensor, one: Sequence) -> int:
    """The definition: sort everything, filter, add noise to whatever is left."""
    request = one.request
    row = logits.float().numpy().astype(np.float64)
    order = np.lexsort((np.arange(len(row)), -row))
    if request.temperature == 0:
        return int(order[0])
    scaled = row[order] / request.temperature
    passed = len(order) if not request.top_k else min(request.top_k, len(order))
    mass = np.exp(scaled[:passed] - scaled[0])
    if request.top_p < 1:
        passed = int((np.cumsum(mass) - mass < request.top_p * mass.sum()).sum())
    if request.min_p > 0:
        passed = int((scaled[:passed] >= scaled[0] + math.log(request.min_p)).sum())
    key = noise_key(request.seed, request.choice, one.output_len)
    scores = [scaled[i] + gumbel(noise_bits(key, int(order[i]))) for i in range(passed)]
    return int(order[int(np.argmax(scores))])


def logits_of(
    spread: float, *, rows: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, VOCAB, generator=generator) * spread).to(dtype)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**32 - 1),
    tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20),
)
def test_torch_makes_the_same_noise_integers_as_the_definition(
    seed: int, choice: int, position: int, tokens: list[int]
) -> None:
    key = noise_key(seed, choice, position)
    words = torch.tensor([[w - 2**32 if w >= 2**31 else w for w in key]], dtype=torch.int32)
    got = sampler_module.noise_bits(torch.tensor(tokens, dtype=torch.int32), words)
    assert [bits & 0xFFFFFFFF for bits in got[0].tolist()] == [noise_bits(key, token) for token in tokens]


def test_the_noise_of_a_token_is_what_it_was_in_the_first_release() -> None:
    """A resumed job continues with the noise of an older worker: these numbers never change."""
    assert noise_key(42, 1, 7) == (0xA8FECB37, 0x89A5AE04)
    assert [noise_bits(noise_key(42, 1, 7), t) for t in (0, 1, 49151)] == [0xBEB9E770, 0xF738C6CE, 0x1DDEAB73]


def test_gumbel_noise_is_finite_and_increasing_from_the_first_bit_pattern_to_the_last() -> None:
    values = [gumbel(bits) for bits in (0, 1, 2**16, 2**31, 2**32 - 2, 2**32 - 1)]
    assert values == sorted(values)
    assert values[0] > -3.2
    assert values[-1] == pytest.approx(MAX_GUMBEL)


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0], ids=["flat", "middling", "peaked"])
@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.3},
        {"temperature": 20.0},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 64},
        {"top_k": 65},
        {"top_k": 1500},
        {"top_k": 10**6},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.9, "top_k": 50},
        {"top_p": 0.5, "top_k": 500, "temperature": 0.7},
        {"min_p": 0.1},
        {"min_p": 0.9},
        {"min_p": 1.0},
        {"min_p": 0.02, "top_p": 0.95, "top_k": 200, "temperature": 1.4},
    ],
    ids=lambda knobs: ",".join(f"{k}={v}" for k, v in knobs.items()),
)
def test_a_token_is_the_one_that_sorting_everything_would_give(
    make: Make, knobs: dict[str, Any], spread: float
) -> None:
    logits = logits_of(spread, rows=4)
    rows = [seq(position=i, **knobs) for i in range(4)]
    assert make(VOCAB).sample(logits.clone(), rows) == [
        plain(row, one) for row, one in zip(logits, rows, strict=True)
    ]


def as_transformers(logits: torch.Tensor, one: Sequence) -> int:
    """The same noise on what transformers' own processors leave of the logits."""
    from transformers.generation import logits_process as their

    request, scores = one.request, logits.double()[None]
    steps = {
        "temperature": (request.temperature != 1, their.TemperatureLogitsWarper),
        "top_k": (request.top_k > 0, their.TopKLogitsWarper),
        "top_p": (request.top_p < 1, their.TopPLogitsWarper),
        "min_p": (request.min_p > 0, their.MinPLogitsWarper),
    }
    for name, (asked, processor) in steps.items():
        if asked:
            scores = processor(getattr(request, name))(torch.tensor([[1]]), scores)
    key = noise_key(request.seed, request.choice, one.output_len)
    left = (scores[0] > -math.inf).nonzero()[:, 0].tolist()
    return max(left, key=lambda token: float(scores[0, token]) + gumbel(noise_bits(key, token)))


@pytest.mark.parametrize(
    "knobs",
    [
        *({"temperature": value} for value in (0.2, 1.7)),
        *({"top_k": value} for value in (1, 5, 300)),
        *({"top_p": value} for value in (0.05, 0.5, 0.9, 0.999)),
        *({"min_p": value} for value in (0.01, 0.3, 0.9)),
        {"temperature": 1.4, "top_k": 500, "top_p": 0.95, "min_p": 0.01},
    ],
)
def test_each_filter_leaves_what_transformers_leaves(make: Make, knobs: dict[str, Any]) -> None:
    sampler = make(VOCAB)
    for seed in range(8):
        logits = logits_of(2.0, seed=seed)
        one = seq(seed=seed, **knobs)
        assert sampler.sample(logits, [one]) == [as_transformers(logits[0], one)]


@pytest.mark.parametrize(
    "knobs", [{"temperature": 0.0}, {"top_k": 1}, {"top_k": 7}, {"top_p": 0.3}, {"min_p": 0.5}]
)
def test_among_equal_logits_the_lower_id_ranks_first(make: Make, knobs: dict[str, Any]) -> None:
    """bfloat16 logits are full of ties, and top-k libraries break them as they like."""
    logits = logits_of(1.0, rows=8).round()
    rows = [seq(position=i, **knobs) for i in range(8)]
    assert make(VOCAB).sample(logits.clone(), rows) == [
        plain(row, one) for row, one in zip(logits, rows, strict=True)
    ]
    assert make(VOCAB).sample(logits.bfloat16(), rows) == make(VOCAB).sample(logits, rows)


def test_a_row_gets_the_same_token_alone_and_in_any_batch(make: Make) -> None:
    rng = random.Random(7)
    logits = logits_of(3.0, rows=48)
    rows = [
        seq(
            position=i,
            seed=rng.getrandbits(64),
            temperature=rng.choice([0.0, 0.7, 1.0, 2.0]),
            top_k=rng.choice([0, 0, 5, 100]),
            top_p=rng.choice([1.0, 1.0, 0.9]),
            min_p=rng.choice([0.0, 0.0, 0.05]),
        )
        for i in range(48)
    ]
    sampler = make(VOCAB)
    together = sampler.sample(logits.clone(), rows)
    assert together == [sampler.sample(logits[i : i + 1].clone(), rows[i : i + 1])[0] for i in range(48)]
    order = rng.sample(range(48), 48)
    shuffled = sampler.sample(logits[order].clone(), [rows[i] for i in order])
    assert shuffled == [together[i] for i in order]


def test_seed_choice_and_position_each_change_the_noise(make: Make) -> None:
    logits = logits_of(0.5).expand(5, -1)
    rows = [seq(), seq(), seq(seed=2), seq(choice=1), seq(position=1)]
    first, again, *others = make(VOCAB).sample(logits.clone(), rows)
    assert first == again
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    ("knobs", "expected"),
    [
        ({}, [0.4, 0.3, 0.15, 0.1, 0.05]),
        ({"temperature": 0.5}, [0.16, 0.09, 0.0225, 0.01, 0.0025]),
        ({"top_k": 3}, [0.4, 0.3, 0.15, 0, 0]),
        ({"top_p": 0.65}, [0.4, 0.3, 0, 0, 0]),
        ({"min_p": 0.3}, [0.4, 0.3, 0.15, 0, 0]),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p"],
)
def test_tokens_come_as_often_as_their_probabilities_say(
    make: Make, knobs: dict[str, Any], expected: list[float]
) -> None:
    """Chi-square over 10,000 draws with fixed seeds; 5 classes, so 23.5 is the 99.99 % point."""
    draws = 10_000
    ids = [17, 3, 900, 1999, 42]
    logits = torch.full((VOCAB,), -50.0)
    logits[ids] = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()
    sampler = make(VOCAB)
    counts: dict[int | None, int] = {}
    for start in range(0, draws, 1000):
        rows = [seq(position=0, seed=start + i, **knobs) for i in range(1000)]
        for token in sampler.sample(logits.expand(1000, -1).clone(), rows):
            counts[token] = counts.get(token, 0) + 1
    assert set(counts) == {token for token, p in zip(ids, expected, strict=True) if p}
    total = sum(expected)
    wanted = {token: draws * p / total for token, p in zip(ids, expected, strict=True) if p}
    chi2 = sum((counts[token] - want) ** 2 / want for token, want in wanted.items())
    assert chi2 < 23.5, counts


def test_positions_of_one_sequence_are_independent_draws(make: Make) -> None:
    """Successive pairs over four equally likely tokens: 16 classes, 99.99 % point of chi-square 44.3."""
    logits = torch.full((2000, VOCAB), -50.0)
    logits[:, :4] = 0.0
    tokens = make(VOCAB).sample(logits, [seq(position=i, seed=9) for i in range(2000)])
    pairs = np.zeros((4, 4))
    for a, b in pairwise(tokens):
        assert a is not None
        assert b is not None
        pairs[a, b] += 1
    want = (len(tokens) - 1) / 16
    assert ((pairs - want) ** 2 / want).sum() < 44.3


def test_min_tokens_keeps_the_end_away_until_then(make: Make) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 3], logits[0, 4], logits[0, 9] = 30.0, 25.0, 20.0
    for knobs in ({"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 1}):
        early = seq(position=4, min_tokens=5, end_ids=frozenset({3, 4}), **knobs)
        late = seq(position=5, min_tokens=5, end_ids=frozenset({3, 4}), **knobs)
        assert make(VOCAB).sample(logits.clone(), [early]) == [9]
        assert make(VOCAB).sample(logits.clone(), [late]) in ([3], [4])


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_numbers_gets_no_token_and_leaves_the_others_alone(
    make: Make, poison: float
) -> None:
    logits = logits_of(2.0, rows=4)
    rows = [seq(temperature=0.0), seq(), seq(temperature=0.0), seq(top_p=0.9)]
    healthy = make(VOCAB).sample(logits.clone(), rows)
    logits[0, 100] = logits[1, 200] = poison
    assert make(VOCAB).sample(logits.clone(), rows) == [None, None, healthy[2], healthy[3]]


def test_a_temperature_next_to_nothing_is_greedy(make: Make) -> None:
    logits = logits_of(1.0)
    assert make(VOCAB).sample(logits.clone(), [seq(temperature=1e-9)]) == [int(logits.argmax())]


def test_a_vocabulary_smaller_than_the_first_look_works(make: Make) -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    rows = [seq(), seq(top_k=5), seq(top_p=0.5)]
    expected = [plain(row, one) for row, one in zip(logits, rows, strict=True)]
    assert make(20).sample(logits.clone(), rows) == expected
