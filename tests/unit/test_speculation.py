"""Which guesses are worth checking, and what is learned of those that nobody checks."""

from __future__ import annotations

from gristmill.engine.messages import Request
from gristmill.engine.sequence import Sequence
from gristmill.engine.speculation import Speculation

LOOP = [5, 6, 7, 8, 9, 10]
MANY = 64


def sequence(number: int, tokens: list[int], group: str = "") -> Sequence:
    request = Request(id=str(number), prompt_ids=tokens, max_tokens=100, group=group)
    return Sequence(request, limit=1_000, end_ids=frozenset(), number=number)


def speculation(*, row_s: float, step_s: float) -> Speculation:
    """Steps cost so much and each token in them so much more."""
    made = Speculation(8)
    for tokens in (1, 1_000):  # between them lies a straight line
        made.times.add(tokens, step_s + row_s * tokens)
    return made


def repeat(seqs: list[Sequence], more: int) -> None:
    """Everybody says what was guessed."""
    for seq in seqs:
        for _ in range(more):
            seq.tokens.append(LOOP[len(seq.tokens) % len(LOOP)])


def test_guesses_that_are_not_checked_prove_themselves() -> None:
    """Where a token costs nearly a whole step, only guesses that are nearly certain pay."""
    made = speculation(row_s=0.9, step_s=10.0)
    seqs = [sequence(number, LOOP * 3) for number in range(MANY)]
    assert made.draft(seqs, 500) == {}, "a stranger's guess is right half the time"
    for _ in range(40):
        repeat(seqs, 1)
        made.draft(seqs, 500)
    repeat(seqs, 1)
    assert len(made.draft(seqs, 500)) == MANY


def test_guesses_that_never_come_true_are_not_made_any_more() -> None:
    made = speculation(row_s=0.9, step_s=10.0)
    seqs = [sequence(number, LOOP * 3) for number in range(MANY)]
    for step in range(60):
        for seq in seqs:
            seq.tokens += [100 + step, 5, 6]  # 7 is guessed, and never said
        made.draft(seqs, 500)
    assert made.draft(seqs, 500) == {}
    assert made.drafted == 0


def test_the_likeliest_are_checked_first_and_no_more_than_there_is_room_for() -> None:
    made = speculation(row_s=0.001, step_s=10.0)
    good, bad = sequence(0, LOOP * 3), sequence(1, LOOP * 3)
    made.draft([good, bad], 500)
    for _ in range(20):
        made.learn(good, 4, 4)
        made.learn(bad, 4, 0)
    found = made.draft([good, bad], 5)
    assert {seq.id: len(guesses) for seq, guesses in found.items()} == {"0": 5}


def test_a_sequence_that_repeats_itself_is_asked_before_its_group() -> None:
    made = speculation(row_s=0.001, step_s=10.0)
    other = sequence(0, [1, 1, 1, 1], group="g")
    made.draft([other], 500)
    other.tokens += [*LOOP, 77, 78]
    made.forget(other)
    own = sequence(1, LOOP * 2, group="g")
    assert made.draft([own], 500)[own][:2] == LOOP[:2], "what it said itself after the last four tokens"
    fresh = sequence(2, [4, *LOOP], group="g")
    assert made.draft([fresh], 500)[fresh][:2] == [77, 78]
