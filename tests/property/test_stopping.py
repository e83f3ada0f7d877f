"""StopMatcher: the same match for any cut of the text, and nothing of a stop string shown before it is
one."""

import pytest
from gristmill.engine.stopping import StopMatcher
from hypothesis import given
from hypothesis import strategies as st

STOPS = st.lists(st.text("ab\né", min_size=1, max_size=5), max_size=4).map(tuple)
TEXT = st.text("ab\né", max_size=30)


def first_match(text: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """The law, said plainly: (start, stop) of the stop string that ends first, of several the longest."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return end - len(longest), longest
    return None


def pieces_of(text: str, data: st.DataObject) -> list[str]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8), "cuts"))
    return [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@given(text=TEXT, stops=STOPS, include=st.booleans(), data=st.data())
def test_any_cut_gives_the_same_match_and_the_same_text(
    text: str, stops: tuple[str, ...], include: bool, data: st.DataObject
) -> None:
    matcher, shown, matched, pushed = StopMatcher(stops, include), "", None, 0
    for piece in pieces_of(text, data):
        emitted, matched = matcher.push(piece)
        shown += emitted
        pushed += len(piece)
        if matched is not None:
            break
    shown += matcher.finish()

    expected = first_match(text, stops)
    if expected is None:
        assert (shown, matched, matcher.matched_at) == (text, None, None)
    else:
        start, stop = expected
        assert (matched, matcher.matched_at) == (stop, start)
        assert shown == text[: start + (len(stop) if include else 0)]
        assert pushed >= start + len(stop) > pushed - len(piece), "reported by the push that completed it"


@given(text=TEXT, stops=STOPS, data=st.data())
def test_held_back_is_only_what_may_still_become_a_stop_string(
    text: str, stops: tuple[str, ...], data: st.DataObject
) -> None:
    matcher, shown, pushed = StopMatcher(stops, False), "", ""
    for piece in pieces_of(text, data):
        emitted, matched = matcher.push(piece)
        if matched is not None:
            return
        shown, pushed = shown + emitted, pushed + piece
        prefixes = [stop[:n] for stop in stops for n in range(1, len(stop)) if pushed.endswith(stop[:n])]
        assert len(pushed) - len(shown) == max(map(len, prefixes), default=0)


@given(early=TEXT, late=TEXT, stops=STOPS)
def test_text_that_is_passed_over_counts_for_the_offset_and_for_nothing_else(
    early: str, late: str, stops: tuple[str, ...]
) -> None:
    matcher = StopMatcher(stops, False)
    shown = matcher.pass_over(early)
    assert shown == early
    emitted, matched = matcher.push(late)
    expected = first_match(late, stops)
    assert matched == (expected and expected[1])
    if expected:
        assert matcher.matched_at == len(early) + expected[0]
        assert early + late[: expected[0]] == shown + emitted


def test_of_two_that_end_together_the_longer_is_the_match() -> None:
    matcher = StopMatcher(("bc", "abc"), False)
    assert matcher.push("xab") == ("x", None)
    assert matcher.push("cd") == ("", "abc")


def test_the_one_that_ends_first_wins_over_one_that_began_earlier() -> None:
    assert StopMatcher(("abcd", "bc"), False).push("abcd") == ("a", "bc")


def test_without_stop_strings_everything_passes_at_once() -> None:
    matcher = StopMatcher((), False)
    assert [matcher.push(text) for text in ("a", "", "b")] == [("a", None), ("", None), ("b", None)]


def test_nothing_may_follow_a_match() -> None:
    matcher = StopMatcher(("a",), False)
    matcher.push("a")
    with pytest.raises(AssertionError):
        matcher.push("b")
