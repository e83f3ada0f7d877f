"""Speculation: how many guessed tokens a step checks along with the next one. Pure, but for measured times.

A step that feeds a few more tokens costs little more while the batch is small: it reads the weights once
either way. Each guess that turns out to be what the sampler draws saves a step. A token's noise depends on
its position alone, so what comes out is what would have come out without guesses, greedy or sampled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from operator import itemgetter

from .drafts import LONGEST, FinishedTexts, OwnText
from .sequence import Sequence

MOST_SEQS_AHEAD = 32
"""Where the next step is launched before the last one's tokens are known, guessing for more sequences than
this costs more than it saves: guesses have to wait for those tokens."""
FIRST_TRUST = 0.5
"""Chance that a guess is right, as long as nothing is known of a sequence …"""
FIRST_WEIGHT = 2
"""… which is worth as much as so many observations."""
LEARN = 0.2
"""Weight of the newest observation, once there are many."""
LEAST_TRUST = 0.1
"""Below this a sequence is left alone for a while."""
LONGEST_REST = 64
"""Steps."""
STALE_STEPS = 500
"""A measured time that old no longer counts: the machine may have become faster since."""


@dataclass(slots=True)
class StepTimes:
    """Seconds of steps by how many tokens they fed, measured in pure decode steps."""

    _points: dict[int, tuple[float, int]] = field(default_factory=dict[int, tuple[float, int]])
    """Tokens → (seconds, smoothed; step of the last measurement)."""
    _step: int = 0

    def add(self, tokens: int, seconds: float) -> None:
        """Learn from a step. A spike counts as twice the expected at most."""
        self._step += 1
        known = self._points.get(tokens)
        if known is not None and self._step - known[1] <= STALE_STEPS:
            seconds = known[0] + LEARN * (min(seconds, 2 * known[0]) - known[0])
        self._points[tokens] = (seconds, self._step)

    def expect(self, tokens: int) -> float | None:
        """Between two measured sizes a straight line; beyond the largest the same as there, so that it is
        tried. None: nothing as small was measured yet."""
        fresh = {n: s for n, (s, step) in self._points.items() if self._step - step <= STALE_STEPS}
        below = max((n for n in fresh if n <= tokens), default=None)
        above = min((n for n in fresh if n >= tokens), default=None)
        if below is None:
            return None
        if above is None or above == below:
            return fresh[below]
        return fresh[below] + (fresh[above] - fresh[below]) * (tokens - below) / (above - below)


@dataclass(slots=True)
class _Record:
    """What is known of one sequence's guesses."""

    text: OwnText = field(default_factory=OwnText)
    trust: float = FIRST_TRUST
    seen: int = 0
    """Guessed tokens that turned out right or wrong."""
    unchecked: tuple[int, int] | None = None
    """A guess that no step has checked: its place and its token. What comes there will tell all the same."""
    rest: int = 0
    """Steps for which it is left alone."""
    next_rest: int = 1

    def learn(self, right: int, wrong: int) -> None:
        """So many guessed tokens were right, and then, if any, one was wrong."""
        count = right + wrong
        self.seen += count
        weight = max(1 - (1 - LEARN) ** count, count / (self.seen + FIRST_WEIGHT))
        self.trust += weight * (right / count - self.trust)
        if right:
            self.next_rest = 1
        elif self.trust < LEAST_TRUST:
            self.rest = self.next_rest
            self.next_rest = min(LONGEST_REST, 2 * self.next_rest)


class Speculation:
    """Proposes guesses for pure decode steps, and learns which were right and what they cost."""

    def __init__(self, most: int, most_seqs: int | None = None) -> None:
        """``most`` guesses for one sequence in one step, of ``most_seqs`` at most (None: of any number)."""
        self._most, self._most_seqs = most, most_seqs
        self.times = StepTimes()
        self.drafted = self.accepted = 0
        """Guesses checked, and those that were right, since the start."""
        self._records: dict[Sequence, _Record] = {}
        self._finished = FinishedTexts()

    def draft(self, seqs: Rows[Sequence], budget: int) -> dict[Sequence, list[int]]:
        """Guesses worth checking beside the next token of each of ``seqs``: at most ``budget`` in all."""
        if not self.looks_at(len(seqs)):
            return {}
        guesses = {seq: found for seq in seqs if _may(seq) and (found := self._propose(seq))}
        counts = self._worth(guesses, len(seqs), budget)
        for seq, found in guesses.items():  # of all: a step may yet leave out what was chosen
            self._records[seq].unchecked = (len(seq.tokens), found[0])
        return {seq: found[: counts[seq]] for seq, found in guesses.items() if counts[seq]}

    def looks_at(self, seqs: int) -> bool:
        """Whether a step of so many sequences may have guesses."""
        return self._most_seqs is None or seqs <= self._most_seqs

    def learn(self, seq: Sequence, drafted: int, accepted: int) -> None:
        """``accepted`` of ``drafted`` guesses were right; the one after them, if any, was wrong."""
        self.drafted += drafted
        self.accepted += accepted
        record = self._records[seq]
        record.unchecked = None
        record.learn(accepted, wrong=min(1, drafted - accepted))

    def forget(self, seq: Sequence) -> None:
        """This sequence has ended; what it said may help others of its group."""
        self._records.pop(seq, None)
        if seq.request.group:
            self._finished.add(seq.request.group, seq.tokens[seq.prompt_len :])

    def check(self, known: Iterable[Sequence]) -> None:
        """Raise AssertionError if a sequence that has ended was not forgotten."""
        assert self._records.keys() <= set(known), "a sequence that has ended was not forgotten"

    def _propose(self, seq: Sequence) -> list[int]:
        record = self._records.setdefault(seq, _Record())
        if record.unchecked is not None and len(seq.tokens) > record.unchecked[0]:
            place, token = record.unchecked
            right = seq.tokens[place] == token
            record.unchecked = None
            record.learn(right, not right)
        if record.rest:
            record.rest -= 1
            return []
        count = min(self._most, seq.limit - len(seq.tokens) - 1)
        if count < 1:
            return []
        if not seq.request.group:
            return record.text.propose(seq.tokens, count)
        return (  # where as many tokens agree, its own text is the better witness
            record.text.propose(seq.tokens, count, LONGEST)
            or self._finished.propose(seq.request.group, seq.tokens, count)
            or record.text.propose(seq.tokens, count)
        )

    def _worth(self, guesses: dict[Sequence, list[int]], rows: int, budget: int) -> Counter[Sequence]:
        """How many of each sequence's guesses a step of ``rows`` should check: the likeliest of all, as many
        as promise the most tokens per second. The n-th of a sequence is right with a chance of trust ** n."""
        base = self.times.expect(rows)
        if base is None or not guesses:
            return Counter()
        chances = [
            (self._records[seq].trust ** n, seq)
            for seq, found in guesses.items()
            for n in range(1, len(found) + 1)
        ]
        chances.sort(key=itemgetter(0), reverse=True)
        del chances[budget:]
        best, best_rate, gained = 0, rows / base, 0.0
        for count, (chance, _) in enumerate(chances, 1):
            gained += chance
            if count & (count - 1) == 0 or count == len(chances):
                seconds = self.times.expect(rows + count)
                assert seconds is not None, "more tokens than the base"
                if (rate := (rows + gained) / seconds) > best_rate:
                    best, best_rate = count, rate
        return Counter(seq for _, seq in chances[:best])


def _may(seq: Sequence) -> bool:
    """What looks at each token, or changes logits by what was said, would have to be done for each guess."""
    request = seq.request
    plain = request.processors is None and seq.guided is None and request.logprobs is None
    return plain and seq.output_len >= request.min_tokens
