"""Bisection after engine crashes: every culprit is found, nobody else is blamed, and it ends soon."""

from __future__ import annotations

import math

from gristmill.worker.trials import SOON_TOKENS, Trials
from hypothesis import given, settings
from hypothesis import strategies as st

ATTEMPTS = 3


class Fleet:
    """An engine, as far as trials see one: each round every request in it makes a token, or it crashes."""

    def __init__(self, lengths: dict[str, int], poison: dict[str, int]) -> None:
        self.left, self.poison = dict(lengths), poison  # poison: dies with it at its n-th token
        self.made = dict.fromkeys(lengths, 0)
        self.strikes = dict.fromkeys(lengths, 0)
        self.crashes = 0
        self.trials = Trials()
        for name in lengths:
            self.trials.add(name)

    def round(self) -> None:
        running = self.trials.runnable
        assert running, "somebody waits and nobody runs"
        self.trials.check()
        if any(self.poison.get(name) == self.made[name] for name in running):
            self.crashes += 1
            verdict = self.trials.crashed(running)
            assert verdict.suspects <= running
            if verdict.alone:
                assert running == {verdict.alone}
                self.strikes[verdict.alone] += 1
                if self.strikes[verdict.alone] == ATTEMPTS:
                    self._end(verdict.alone)
            return
        for name in sorted(running):
            self.made[name] += 1
            self.left[name] -= 1
            self.trials.progress(name, 1)
            if self.left[name] == 0:
                self._end(name)

    def _end(self, name: str) -> None:
        self.trials.remove(name)
        del self.left[name]


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    names = [f"r{n:02}" for n in range(draw(st.integers(1, 24)))]
    lengths = {name: draw(st.integers(1, 12)) for name in names}
    culprits = draw(st.lists(st.sampled_from(names), unique=True, max_size=3))
    return Fleet(lengths, {name: draw(st.integers(0, lengths[name] - 1)) for name in culprits})


@settings(max_examples=300, deadline=None)
@given(fleets())
def test_every_culprit_is_struck_out_and_everybody_else_ends(fleet: Fleet) -> None:
    requests, culprits = len(fleet.made), set(fleet.poison)
    for _ in range(2_000):
        if not fleet.left:
            break
        fleet.round()
    assert not fleet.left, "it never ends"
    assert {name for name, strikes in fleet.strikes.items() if strikes} == culprits
    # Halving finds each; one crash more showed each that it is there, and a few that tokens do not clear.
    assert fleet.crashes <= len(culprits) * (math.ceil(math.log2(requests + 1)) + ATTEMPTS + 3)


@settings(max_examples=200, deadline=None)
@given(
    veterans=st.integers(0, 8),
    newcomers=st.integers(0, 8),
    head_start=st.integers(SOON_TOKENS, 3 * SOON_TOKENS),
    delays=st.tuples(*[st.integers(1, SOON_TOKENS)] * 2),
)
def test_who_dies_soon_again_is_a_suspect_the_second_time_and_who_ran_for_long_is_not(
    veterans: int, newcomers: int, head_start: int, delays: tuple[int, int]
) -> None:
    """Each engine died a few tokens after it was given the culprit: four of them, before anybody looked."""
    trials = Trials()
    old, new = {f"old{n}" for n in range(veterans)}, {f"new{n}" for n in range(newcomers)} | {"slow"}

    def lives(tokens: int) -> set[str]:
        """Who is in the engine when it dies of the culprit, or the culprit's trial is over."""
        for _ in range(tokens):
            for name in trials.runnable:
                trials.progress(name, 1)
        return set(trials.runnable)

    for name in sorted(old):
        trials.add(name)
    lives(head_start)
    for name in sorted(new):
        trials.add(name)
    assert trials.crashed(lives(delays[0])).suspects == frozenset()
    verdict = trials.crashed(lives(delays[1]))
    assert verdict.suspects == new, "those who came with it, and nobody who had run for long"
    assert not trials.runnable & old, "who wait meanwhile"
    trials.check()


def test_one_culprit_among_twenty_costs_a_handful_of_crashes() -> None:
    fleet = Fleet({f"r{n:02}": 5 for n in range(21)}, {"r13": 0})
    while fleet.left:
        fleet.round()
    assert fleet.crashes <= 1 + math.ceil(math.log2(21)) + ATTEMPTS
    assert fleet.strikes["r13"] == ATTEMPTS
    assert sum(fleet.strikes.values()) == ATTEMPTS


def test_a_request_that_makes_tokens_between_crashes_is_found_all_the_same() -> None:
    """It kills each engine some tokens after it was given to it, so that it never stands still."""
    trials = Trials()
    for name in ("good", "slow_poison"):
        trials.add(name)
    struck = crashes = 0
    while struck < ATTEMPTS:
        running = trials.runnable
        for _ in range(3):
            for name in running:
                trials.progress(name, 1)
        if "slow_poison" in trials.runnable & running:
            crashes += 1
            struck += trials.crashed(running).alone == "slow_poison"
        assert crashes < 20
    assert "good" in trials


def test_a_suspect_by_its_journal_is_tried_alone_and_then_the_others_go_on() -> None:
    trials = Trials()
    trials.add("a")
    trials.progress("a", 5)
    trials.add("doubtful", suspect=True)
    assert trials.alone == "doubtful"
    assert trials.runnable == {"doubtful"}
    trials.progress("doubtful", 1)
    assert not trials.on
    assert trials.runnable == {"a", "doubtful"}


def test_a_crash_of_requests_that_were_being_stopped_blames_no_trial() -> None:
    """Others still left the engine when it died: the trial had not begun, and nobody was alone."""
    trials = Trials()
    trials.add("a")
    trials.add("b")
    trials.add("doubtful", suspect=True)
    verdict = trials.crashed({"a", "b"})
    assert verdict.alone is None
    assert verdict.suspects == {"a", "b"}
    trials.check()


def test_a_crash_of_an_empty_engine_blames_nobody() -> None:
    trials = Trials()
    trials.add("a", suspect=True)
    assert trials.crashed(frozenset()).suspects == frozenset()
    assert trials.alone == "a"
