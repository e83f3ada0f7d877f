"""GuidedState: one sequence's place in its grammar.

Positions are those of the output. What the grammar leaves no choice about is *forced*: the tokens of it are
those of the model's own tokenizer for that text, and they are output without a look at the logits. That is
what guided output means here, also where it is done slowly, a token a step: at a forced position only that
token is allowed. So skipping over forced positions changes speed and nothing else.

Near the end of its budget a state holds a plan, a way to a complete text that fits. A token after which
no plan fits is not taken: the plan is, whole and at once. So every text fits its grammar whatever the budget,
if the shortest text does.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from llguidance import LLMatcher

PLAN_FROM = 1_024
"""Tokens of budget left when plans begin. One token that makes the shortest completion longer by more than
this (it opens an object with hundreds of required fields, say) is not foreseen."""


class Closing(Protocol):
    """Knows the way to an end; ``closing.py`` has it."""

    def find(self, matcher: LLMatcher, room: int) -> list[int] | None:
        """Tokens, ``room`` at most, after which the text may end. None: no such way was found."""
        ...

    def completes(self, matcher: LLMatcher, plan: list[int]) -> bool:
        """Whether the text may end after ``plan``."""
        ...


class LeftTheGrammar(Exception):
    """A token that the grammar does not allow here, or a limit of llguidance's."""


@dataclass(slots=True, eq=False)
class GuidedState:
    """``take`` follows every token of output, in order; ``matcher`` says what may come next."""

    matcher: LLMatcher
    closer: Closing
    close: bool
    fast: bool = True
    """Skip over forced positions."""
    closing: bool = field(init=False, default=False)
    """The plan was taken: the text is complete and the budget was why."""
    _ahead: deque[int] = field(init=False, default_factory=deque[int])
    """Tokens that the matcher has taken and the sequence has not: only when slow."""
    _plan: list[int] | None = field(init=False, default=None)
    _look_at: int = field(init=False, default=PLAN_FROM)
    """Without a plan, the next search is made when so much room is left."""
    _pause: int = field(init=False, default=1)

    def start(self, room: int, output: list[int]) -> tuple[int, list[int]]:
        """Go over what an earlier attempt said; returns how much of it holds, and what is forced after it.

        What does not hold may have been said because the text was being closed, or not: the ids do not tell.
        Those tokens are to be sampled again, with ``take`` told what they were.
        room: tokens of output in all. Raises LeftTheGrammar.
        """
        self._ahead.extend(self._force())
        if self.close and room <= PLAN_FROM:
            self._plan = self._search(room - len(self._ahead))
        for index, token in enumerate(output):
            if self._may_be_closing(output[index:]):
                return index, []
            self._follow(token, room - index)
        return len(output), self._give()

    def _may_be_closing(self, rest: list[int]) -> bool:
        """Whether ``rest`` is how the plan begins."""
        return bool(self._plan and not self._ahead and self._plan[: len(rest)] == rest)

    def _follow(self, token: int, room: int) -> None:
        """``take`` a token that was not closing, a token a step."""
        if self._ahead:
            self._take_ahead(token)
            return
        forced = self._consume(token)
        if not self._plan_on(token, forced, room):
            self._plan = None  # another version's closer knew a way
        self._ahead.extend(forced)

    @property
    def forced(self) -> int | None:
        """The only token allowed next, when slow."""
        return self._ahead[0] if self._ahead else None

    @property
    def ended(self) -> bool:
        """Nothing may follow."""
        return not self._ahead and (self.closing or self.matcher.is_stopped())

    @property
    def complete(self) -> bool:
        """The text may end here."""
        return not self._ahead and (self.closing or self.matcher.is_accepting())

    def take(self, token: int, room: int, known: int | None = None) -> list[int]:
        """Follow a sampled token; returns what the sequence is to append, usually it and what is forced.

        room: tokens that may be appended, 1 or more. known: what an earlier attempt has said in this place;
        it stays so, and the sampled token only tells whether the text is closed here. Raises LeftTheGrammar.
        """
        if self._ahead:
            return self._take_ahead(token)
        plan, forced = self._plan, self._consume(token)
        if not self._plan_on(token, forced, room):
            return self._end_by_plan(1 + len(forced))
        if known is not None and token != known:  # in bfloat16 a batch may change what is sampled
            self._take_back(1 + len(forced))
            self._plan = plan
            return self.take(known, room)
        if not self.fast:
            self._ahead.extend(forced)
            return [token]
        return [token, *forced]

    def _take_ahead(self, token: int) -> list[int]:
        if token != self._ahead.popleft():
            raise LeftTheGrammar("a token differs from what the grammar forces")
        return [token]

    def _consume(self, token: int) -> list[int]:
        """Take a token and what it forces, which is returned."""
        if not self.matcher.consume_token(token):
            raise LeftTheGrammar(self.matcher.get_error().split("\n")[0][:200])
        return self._force()

    def _force(self) -> list[int]:
        """Take what the grammar leaves no choice about."""
        forced = self.matcher.compute_ff_tokens()
        if forced and not self.matcher.consume_tokens(forced):
            raise LeftTheGrammar(self.matcher.get_error().split("\n")[0][:200])
        return forced

    def _give(self) -> list[int]:
        if not self.fast:
            return []
        given = list(self._ahead)
        self._ahead.clear()
        return given

    def _plan_on(self, token: int, forced: list[int], room: int) -> bool:
        """Find a plan behind these that fits ``room`` with them, the last one if that still leads to an end.

        False: there is none, and the last one is to be taken instead.
        """
        if not self.close or room > PLAN_FROM:
            return True
        room -= 1 + len(forced)
        before, plan = self._plan, None
        if before is not None:
            plan = self._carry_on(before, [token, *forced])
        if before is None and room > self._look_at:
            return True
        if plan is None or len(plan) > room:
            plan = self._search(room)
        if plan is None and before is not None:
            return False
        self._plan = plan
        return True

    def _carry_on(self, plan: list[int], taken: list[int]) -> list[int] | None:
        """What is left of ``plan``, or all of it: a character more in a string does not change its end."""
        if self.matcher.is_accepting():
            return []
        rest = plan[len(taken) :]
        if plan[: len(taken)] == taken and self.closer.completes(self.matcher, rest):
            return rest
        return plan if self.closer.completes(self.matcher, plan) else None

    def _search(self, room: int) -> list[int] | None:
        """A plan, if one is found. Where none is, a search at each token would take most of the time:
        the pauses between them double."""
        plan = self.closer.find(self.matcher, room) if room >= 0 else None
        if plan is None:
            self._look_at, self._pause = room - self._pause, 2 * self._pause
        return plan

    def _end_by_plan(self, taken: int) -> list[int]:
        assert self._plan is not None
        self._take_back(taken)
        if not self.matcher.consume_tokens(self._plan):
            raise LeftTheGrammar("the way to a complete text is lost")
        self.closing = True
        if self.fast:
            return self._plan
        self._ahead.extend(self._plan[1:])
        return self._plan[:1]

    def _take_back(self, taken: int) -> None:
        if not self.matcher.rollback(taken):
            raise LeftTheGrammar("a token cannot be taken back")
