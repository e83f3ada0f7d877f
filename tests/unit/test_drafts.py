"""Guesses are copied from where the last few tokens stood before; a plain search over lists is the judge."""

from __future__ import annotations

from gristmill.engine.drafts import GROUP_TOKENS, GROUPS, LONGEST, SHORTEST, FinishedTexts, OwnText, Text
from hypothesis import given
from hypothesis import strategies as st

FEW = st.lists(st.integers(0, 3), max_size=60)
"""Few different tokens: repetitions everywhere."""
WIDE = st.lists(st.sampled_from([0, 1, 256, 257, 65_536, 1 << 24]), max_size=60)
"""Whose bytes look like their neighbours' when they are read out of step."""


def slow_follow(text: list[int], run: list[int], count: int) -> list[int]:
    for at in range(len(text) - len(run) - 1, -1, -1):
        if text[at : at + len(run)] == run:
            copied = list(text)
            for place in range(at + len(run), at + len(run) + count):
                if place >= len(text):
                    copied.append(copied[place - (len(text) - at - len(run))])
            return copied[at + len(run) : at + len(run) + count]
    return []


def slow_propose(tokens: list[int], count: int) -> list[int]:
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        if found := slow_follow(tokens, tokens[-length:], count):
            return found
    return []


@given(text=FEW | WIDE, run=FEW.map(lambda some: some[:3]) | WIDE.map(lambda some: some[:3]))
def test_the_last_place_that_something_follows_is_found(text: list[int], run: list[int]) -> None:
    if run:
        assert Text(text).follow(run, 5) == slow_follow(text, run, 5)


@given(tokens=FEW | WIDE, cuts=st.lists(st.integers(0, 60)), count=st.integers(1, 8))
def test_a_text_that_grows_step_by_step_gives_the_same_guesses(
    tokens: list[int], cuts: list[int], count: int
) -> None:
    own = OwnText()
    for cut in sorted({*cuts, len(tokens)}):
        assert own.propose(tokens[:cut], count) == slow_propose(tokens[:cut], count)


def test_rows_of_one_group_learn_from_each_other_and_from_nobody_else() -> None:
    finished = FinishedTexts()
    finished.add("batch-1", [10, 11, 12, 13, 14, 15])
    assert finished.propose("batch-1", [9, 10, 11, 12, 13], 8) == [14, 15], "not into the next row"
    finished.add("batch-1", [20, 21])
    assert finished.propose("batch-1", [12, 13, 14, 15], 8) == []
    assert finished.propose("batch-2", [9, 10, 11, 12, 13], 8) == []


def test_what_is_remembered_is_bounded() -> None:
    finished = FinishedTexts()
    for group in range(GROUPS + 1):
        finished.add(str(group), [1, 2, 3, 4, 5])
    assert finished.propose("0", [1, 2, 3, 4], 1) == []
    assert finished.propose("1", [1, 2, 3, 4], 1) == [5]
    finished.add("1", [6] * GROUP_TOKENS)
    assert finished.propose("1", [1, 2, 3, 4], 1) == []
    assert finished.propose("1", [6, 6, 6, 6], 2) == [6], "the latest place has one token after it"


def test_a_text_that_repeats_itself_is_taken_to_go_on() -> None:
    assert OwnText().propose([7, 1, 2, 3, 1, 2, 3, 1, 2], 7) == [3, 1, 2, 3, 1, 2, 3]
