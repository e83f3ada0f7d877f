"""Stop strings in a text that arrives in pieces. Pure: no torch, no I/O.

How many tokens count: the consumer pushes the text of one token at a time; when a push reports a match,
tokens up to and including that one are kept, journalled and counted in usage, and the text ends where the
match says. A token whose text ends behind the stop string is counted whole and shown only up to it, as
other servers do.
"""

from __future__ import annotations


class StopMatcher:
    """Passes text on, but holds back what may be the beginning of a stop string.

    The match is the stop string whose last character comes first; of several that end together the longest.
    So the outcome does not depend on how the text was cut into pushes. Constant time per character and stop
    string (Knuth, Morris and Pratt 1977).
    """

    def __init__(self, stop: tuple[str, ...], include_stop: bool) -> None:
        assert all(stop), "an empty stop string would match everywhere"
        self._stops = [(text, _failure(text)) for text in stop]
        self._firsts = frozenset(text[0] for text in stop)
        self._states = [0] * len(stop)
        """Per stop string: how many of its characters the text ends in."""
        self._include_stop = include_stop
        self._held = ""
        self._seen = 0
        self.matched_at: int | None = None
        """Characters of the text before the stop string; set by the push that reports the match."""

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string that was completed, if any. Nothing may
        follow that."""
        assert self.matched_at is None, "push after a match"
        if not any(self._states) and self._firsts.isdisjoint(text):  # no stop string is or gets under way
            self._seen += len(text)
            return text, None
        for index, char in enumerate(text):
            matched = self._advance(char)
            if matched is not None:
                end = self._seen + index + 1
                self.matched_at = end - len(matched)
                buffer = self._held + text[: index + 1]
                self._held = ""
                return (buffer if self._include_stop else buffer[: len(buffer) - len(matched)]), matched
        self._seen += len(text)
        buffer = self._held + text
        keep = 0 if self._include_stop else max(self._states)
        self._held = buffer[len(buffer) - keep :]
        return buffer[: len(buffer) - keep], None

    def pass_over(self, text: str) -> str:
        """Text in which no stop string counts (of tokens before ``min_tokens``): all of it may be shown."""
        assert self.matched_at is None, "push after a match"
        shown, self._held = self._held + text, ""
        self._states = [0] * len(self._stops)
        self._seen += len(text)
        return shown

    def finish(self) -> str:
        """The text ended without a match: what was held back."""
        held, self._held = self._held, ""
        return held

    def _advance(self, char: str) -> str | None:
        """Feed one character to every automaton; the longest stop string that it completes."""
        longest: str | None = None
        for number, (stop, failure) in enumerate(self._stops):
            state = self._states[number]
            while state and stop[state] != char:
                state = failure[state - 1]
            if stop[state] == char:
                state += 1
            self._states[number] = state
            if state == len(stop) and (longest is None or len(stop) > len(longest)):
                longest = stop
        return longest


def _failure(stop: str) -> list[int]:
    """For each prefix of ``stop``: the length of the longest proper prefix that also ends it."""
    failure = [0] * len(stop)
    state = 0
    for index in range(1, len(stop)):
        while state and stop[state] != stop[index]:
            state = failure[state - 1]
        if stop[state] == stop[index]:
            state += 1
        failure[index] = state
    return failure
