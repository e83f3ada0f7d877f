"""Each processor does what transformers' processor of that name does, or, where it has none, a plain loop."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from gristmill.engine.messages import Dry, Processors, Request, Watermark
from gristmill.engine.noise import noise_bits
from gristmill.engine.processors import Processing, check_processors
from gristmill.engine.sampler import NONE_LEFT, Sampler, typical
from gristmill.engine.sequence import Sequence
from gristmill.engine.watermark import green_key, z_score
from gristmill.schemas.errors import InvalidRequest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

# Rows this small are not worth a second thread, least of all on a busy machine.
pytestmark = pytest.mark.usefixtures("one_thread")

VOCAB = 300
QUICK = settings(max_examples=30, deadline=None)


def sequence(prompt: list[int], output: list[int], processors: Processors, **knobs: Any) -> Sequence:
    given: dict[str, Any] = {"id": "r", "prompt_ids": prompt, "output_ids": output, "max_tokens": 10_000}
    request = Request(**given | knobs, processors=processors)
    return Sequence(request, limit=20_000, end_ids=frozenset({2}))


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 4


def processed(logits: torch.Tensor, prompt: list[int], output: list[int], **fields: Any) -> torch.Tensor:
    found = Processing(VOCAB, torch.device("cpu")).apply(
        logits, [sequence(prompt, output, Processors(**fields))]
    )
    assert found is not None
    return found.logits


def theirs(name: str, *args: Any, **kwargs: Any) -> Any:
    """transformers' processor of this name."""
    from transformers.generation import logits_process

    return getattr(logits_process, name)(*args, **kwargs)


TOKENS = st.lists(st.integers(0, 40), min_size=1, max_size=60)
"""Few different ones: repetitions are what most processors are about."""


# ---- against transformers


@QUICK
@given(
    prompt=TOKENS, output=TOKENS, penalty=st.sampled_from([0.5, 0.9, 1.1, 1.3, 3.0]), seed=st.integers(0, 99)
)
def test_repetition_penalty_is_transformers(
    prompt: list[int], output: list[int], penalty: float, seed: int
) -> None:
    logits = logits_of(seed)
    expected = theirs("RepetitionPenaltyLogitsProcessor", penalty)(
        torch.tensor([prompt + output]), logits.clone()
    )
    got = processed(logits, prompt, output, repetition_penalty=penalty)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@QUICK
@given(
    prompt=TOKENS,
    output=TOKENS,
    words=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=1, max_size=20),
    seed=st.integers(0, 99),
)
def test_bad_words_are_transformers(
    prompt: list[int], output: list[int], words: list[list[int]], seed: int
) -> None:
    logits = logits_of(seed)
    expected = theirs("NoBadWordsLogitsProcessor", words)(torch.tensor([prompt + output]), logits.clone())
    assert torch.equal(processed(logits, prompt, output, bad_words=words), expected)


@QUICK
@given(
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100, width=32), min_size=1, max_size=20)
)
def test_logit_bias_is_transformers_sequence_bias(bias: dict[int, float]) -> None:
    logits = logits_of(1)
    biases = {(token,): value for token, value in bias.items()}
    expected = theirs("SequenceBiasLogitsProcessor", biases)(torch.tensor([[1, 2]]), logits.clone())
    torch.testing.assert_close(processed(logits, [1], [2], logit_bias=bias), expected)


@QUICK
@given(allowed=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=50))
def test_allowed_token_ids_are_transformers_prefix_constraint(allowed: list[int]) -> None:
    logits = logits_of(2)
    processor = theirs("PrefixConstrainedLogitsProcessor", lambda *_: allowed, 1)
    expected = processor(torch.tensor([[1, 2]]), logits.clone())
    assert torch.equal(processed(logits, [1], [2], allowed_token_ids=allowed), expected)


@pytest.mark.parametrize("length", [0, 3, 4])
def test_min_tokens_is_transformers_min_new_tokens(length: int) -> None:
    logits, output = logits_of(3), [7] * length
    one = sequence([1, 5], output, Processors(), min_tokens=4)
    found = Processing(VOCAB, torch.device("cpu")).apply(logits, [one])
    expected = theirs("MinNewTokensLengthLogitsProcessor", 2, 4, 2)(
        torch.tensor([[1, 5, *output]]), logits.clone()
    )
    assert found is not None
    assert torch.equal(found.logits, expected)


@pytest.mark.parametrize("mass", [0.05, 0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.01, 1.0, 6.0])
@pytest.mark.parametrize("size", [20, 5000])
def test_typical_is_transformers_typical(mass: float, spread: float, size: int) -> None:
    for seed in range(5):
        logits = torch.randn(1, size, generator=torch.Generator().manual_seed(seed)).double() * spread
        expected = theirs("TypicalLogitsWarper", mass)(torch.tensor([[1]]), logits.clone())
        assert torch.equal(typical(logits[0], mass), expected[0] > -math.inf)


def test_typical_comes_last_of_transformers_filters() -> None:
    """Its set is taken of what temperature, top_k, top_p and min_p left."""
    knobs: dict[str, Any] = {"temperature": 1.7, "top_k": 60, "top_p": 0.9, "min_p": 0.02}
    steps = [
        theirs("TemperatureLogitsWarper", 1.7),
        theirs("TopKLogitsWarper", 60),
        theirs("TopPLogitsWarper", 0.9),
        theirs("MinPLogitsWarper", 0.02),
        theirs("TypicalLogitsWarper", 0.5),
    ]
    logits = logits_of(4)
    scores = logits.double()
    for step in steps:
        scores = step(torch.tensor([[1]]), scores)
    possible = set((scores[0] > -math.inf).nonzero()[:, 0].tolist())
    sampler = Sampler(VOCAB)
    drawn = {
        sampler.sample(logits, [sequence([1], [], Processors(typical_p=0.5), seed=seed, **knobs)])[0]
        for seed in range(300)
    }
    assert drawn == possible


def test_all_together_is_transformers_in_its_order() -> None:
    rng = random.Random(3)
    prompt, output = [rng.randrange(40) for _ in range(50)], [rng.randrange(40) for _ in range(30)]
    ids = torch.tensor([prompt + output])
    bias = {token: rng.uniform(-5, 5) for token in range(0, 80, 2)}
    words = [[output[-1], 5], [9], [output[-2], output[-1], 11]]
    logits = logits_of(5)
    expected = logits.clone()
    for step in (
        theirs("SequenceBiasLogitsProcessor", {(token,): value for token, value in bias.items()}),
        theirs("RepetitionPenaltyLogitsProcessor", 1.3),
        theirs("NoBadWordsLogitsProcessor", words),
        theirs("PrefixConstrainedLogitsProcessor", lambda *_: list(range(100)), 1),
    ):
        expected = step(ids, expected)
    got = processed(
        logits,
        prompt,
        output,
        logit_bias=bias,
        repetition_penalty=1.3,
        bad_words=words,
        allowed_token_ids=list(range(100)),
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# ---- against plain loops


@QUICK
@given(
    prompt=TOKENS, output=st.lists(st.integers(0, 40), max_size=60), f=st.floats(-2, 2), p=st.floats(-2, 2)
)
def test_frequency_and_presence_count_the_output_alone(
    prompt: list[int], output: list[int], f: float, p: float
) -> None:
    """OpenAI: mu[j] - c[j] * frequency - (c[j] > 0) * presence, c over what was sampled."""
    logits = logits_of(6)
    expected = logits.double()
    for token in set(output):
        expected[0, token] -= output.count(token) * f + p
    got = processed(logits, prompt, output, frequency_penalty=f, presence_penalty=p)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-4)


def plain_dry(tokens: list[int], dry: Dry) -> dict[int, float]:
    """The longest match for each token that followed one, by comparing every pair of places."""
    window = tokens[-dry.range :] if dry.range else tokens
    # A breaker of several tokens may have begun before the window.
    offset = len(tokens) - len(window)
    ends = [any(tokens[: offset + at + 1][-len(b) :] == b for b in dry.breakers) for at in range(len(window))]
    last, longest = len(window) - 1, dict[int, int]()
    for at in range(last):
        if ends[at + 1]:
            continue
        length = 0
        while length <= at and not ends[last - length] and window[at - length] == window[last - length]:
            length += 1
        longest[window[at + 1]] = max(longest.get(window[at + 1], 0), min(length, 64))
    return {
        token: dry.multiplier * dry.base ** (length - dry.allowed_length)
        for token, length in longest.items()
        if length >= dry.allowed_length
    }


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=80),
    base=st.sampled_from([1.0, 1.75]),
    allowed=st.integers(1, 4),
    window=st.sampled_from([0, 1, 2, 10, 30]),
    breakers=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=2),
)
def test_dry_is_the_loop_over_all_pairs_of_places(
    tokens: list[int], base: float, allowed: int, window: int, breakers: list[list[int]]
) -> None:
    dry = Dry(multiplier=0.8, base=base, allowed_length=allowed, range=window, breakers=breakers)
    logits = torch.zeros(1, VOCAB)
    expected = torch.zeros(1, VOCAB, dtype=torch.float64)
    for token, penalty in plain_dry(tokens, dry).items():
        expected[0, token] = -penalty
    got = processed(logits, tokens[:1], tokens[1:], dry=dry)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_dry_of_an_endless_repetition_is_a_finite_number() -> None:
    got = processed(torch.zeros(1, VOCAB), [5] * 500, [5] * 500, dry=Dry(multiplier=5.0, base=4.0))
    assert -math.inf < float(got[0, 5]) < -1e8


def test_green_tokens_gain_delta_and_are_found_again() -> None:
    mark = Watermark(gamma=0.25, delta=3.0, key=7)
    got = processed(torch.zeros(1, VOCAB), [1], [17], watermark=mark)[0]
    green = [noise_bits(green_key(7, 17), token) < 2**30 for token in range(VOCAB)]
    assert got.tolist() == [3.0 if one else 0.0 for one in green]
    assert 0.15 < np.mean(green) < 0.35

    sampler, marked, plain = Sampler(VOCAB), [1], [1]
    for tokens, processors in ((marked, Processors(watermark=mark)), (plain, Processors())):
        for position in range(120):
            one = sequence(tokens[:1], tokens[1:], processors, seed=3)
            token = sampler.sample(logits_of(position) / 8, [one])[0]
            assert token is not None
            tokens.append(token)
            sampler.processing.forget("r")
    assert z_score(marked, gamma=0.25, key=7) > 6
    assert abs(z_score(plain, gamma=0.25, key=7)) < 4
    assert abs(z_score(marked, gamma=0.25, key=8)) < 4


# ---- states and edges


@st.composite
def mixes(draw: st.DrawFn) -> Processors | None:
    """Any processors together; often none at all."""
    if draw(st.booleans()):
        return None

    def perhaps(strategy: st.SearchStrategy[Any], otherwise: Any) -> Any:
        return draw(strategy) if draw(st.booleans()) else otherwise

    words = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=3), min_size=1, max_size=4)
    return Processors(
        watermark=perhaps(st.builds(Watermark, gamma=st.floats(0.1, 0.9), key=st.integers(0, 9)), None),
        logit_bias=perhaps(st.dictionaries(st.integers(0, 299), st.floats(-9, 9), max_size=5), {}),
        repetition_penalty=perhaps(st.floats(0.5, 3), 1.0),
        frequency_penalty=perhaps(st.floats(-2, 2), 0.0),
        presence_penalty=perhaps(st.floats(-2, 2), 0.0),
        dry=perhaps(st.builds(Dry, multiplier=st.floats(0.1, 3), breakers=words), None),
        bad_words=perhaps(words, []),
        allowed_token_ids=perhaps(st.lists(st.integers(0, 299), min_size=70, max_size=200), None),
        typical_p=perhaps(st.floats(0.1, 0.99), 1.0),
    )


KNOBS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.7, 1.0, 1.5]),
        "top_k": st.sampled_from([0, 0, 5, 80]),
        "top_p": st.sampled_from([1.0, 1.0, 0.9]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05]),
        "min_tokens": st.sampled_from([0, 6]),
    }
)


def continued(
    sampler: Sampler, seqs: list[Sequence], steps: int, leave: dict[int, set[int]]
) -> list[list[int]]:
    """What each sequence says after ``steps`` more tokens; ``leave``: at step, who is not in the batch.

    The model is a hash: logits depend on the last two tokens of the row.
    """
    for step in range(steps):
        some = [seq for i, seq in enumerate(seqs) if i not in leave.get(step, set())]
        if not some:
            continue
        logits = torch.cat([logits_of(seq.tokens[-1] * 301 + seq.tokens[-2]) / 2 for seq in some])
        for seq, token in zip(some, sampler.sample(logits, some), strict=True):
            assume(token != NONE_LEFT)  # wishes that leave nothing end a row, elsewhere
            assert token is not None
            seq.tokens.append(int(token))
    return [seq.tokens[seq.prompt_len :] for seq in seqs]


@settings(max_examples=15, deadline=None)
@given(
    wishes=st.lists(st.tuples(mixes(), KNOBS), min_size=2, max_size=4),
    cut=st.integers(0, 12),
    leave=st.dictionaries(st.integers(0, 11), st.sets(st.integers(0, 3)), max_size=4),
)
def test_what_a_row_says_depends_on_the_row_alone(
    wishes: list[tuple[Processors | None, dict[str, Any]]], cut: int, leave: dict[int, set[int]]
) -> None:
    """Alone, among others, with pauses (a preemption), and continued by somebody else after any token."""

    def made(number: int, output: list[int]) -> Sequence:
        processors, knobs = wishes[number]
        request = Request(
            id=f"r{number}",
            prompt_ids=[3, 1, 4, 1, 5, 9, 2, 6],
            output_ids=output,
            max_tokens=99,
            seed=number,
            processors=processors,
            **knobs,
        )
        return Sequence(request, limit=999, end_ids=frozenset({250, 251}))

    alone = [continued(Sampler(VOCAB), [made(i, [])], 12, {})[0] for i in range(len(wishes))]
    sampler = Sampler(VOCAB)
    together = [made(i, []) for i in range(len(wishes))]
    continued(sampler, together, 12, leave)
    for i, seq in enumerate(together):  # those that paused catch up
        continued(sampler, [seq], 12 - seq.output_len, {})
        assert seq.tokens[seq.prompt_len :] == alone[i]
    resumed = continued(Sampler(VOCAB), [made(i, said[:cut]) for i, said in enumerate(alone)], 12 - cut, {})
    assert resumed == alone


def test_logits_are_left_as_they_were_and_rows_without_wishes_are_not_touched() -> None:
    logits = logits_of(8, rows=3).bfloat16()
    before = logits.clone()
    seqs = [
        sequence([1], [2], Processors(repetition_penalty=2.0)),
        Sequence(Request(id="plain", prompt_ids=[1], max_tokens=5), limit=9, end_ids=frozenset()),
        sequence([1], [2], Processors(logit_bias={5: 1e-3})),
    ]
    found = Processing(VOCAB, torch.device("cpu")).apply(logits, [seqs[0], seqs[1]])
    assert found is not None
    assert found.rows == [0]
    assert torch.equal(logits, before)
    assert Processing(VOCAB, torch.device("cpu")).apply(logits, [seqs[1]]) is None
    small = Processing(VOCAB, torch.device("cpu")).apply(logits, [seqs[2]])
    assert small is not None
    assert float(small.logits[0, 5] - before[0, 5].float()) == pytest.approx(1e-3, rel=1e-3), "rounded away"


def test_a_row_that_rules_out_every_token_is_told_so_and_the_others_go_on() -> None:
    nothing = sequence([1], [], Processors(allowed_token_ids=[7], bad_words=[[7]]))
    broken = sequence([1], [], Processors(presence_penalty=1.0), id="b")
    fine = Sequence(
        Request(id="f", prompt_ids=[1], max_tokens=5, temperature=0.0), limit=9, end_ids=frozenset()
    )
    logits = logits_of(9, rows=3)
    logits[1, 4] = math.nan
    assert Sampler(VOCAB).sample(logits, [nothing, broken, fine]) == [
        NONE_LEFT,
        None,
        int(logits[2].argmax()),
    ]


def test_a_sequence_that_ended_must_be_forgotten() -> None:
    processing = Processing(VOCAB, torch.device("cpu"))
    processing.apply(logits_of(1), [sequence([1], [], Processors(presence_penalty=1.0))])
    processing.check({"r"})
    with pytest.raises(AssertionError, match="not forgotten"):
        processing.check(set())
    processing.forget("r")
    processing.check(set())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"presence_penalty": math.inf}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logit_bias": {VOCAB: 1.0}}, "logit_bias"),
        ({"logit_bias": {1: math.inf}}, "logit_bias"),
        ({"bad_words": [[]]}, "bad_words"),
        ({"bad_words": [[1, VOCAB]]}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"typical_p": 0.0}, "typical_p"),
        ({"dry": Dry(multiplier=-1.0)}, "dry_multiplier"),
        ({"dry": Dry(multiplier=1.0, base=0.5)}, "dry_base"),
        ({"dry": Dry(multiplier=1.0, breakers=[[VOCAB]])}, "dry_sequence_breakers"),
        ({"watermark": Watermark(gamma=1.0)}, "watermark_gamma"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    request = Request(id="r", prompt_ids=[1], max_tokens=1, processors=Processors(**fields))
    with pytest.raises(InvalidRequest) as caught:
        check_processors(request, VOCAB)
    assert caught.value.param == param
