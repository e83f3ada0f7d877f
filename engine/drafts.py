"""Drafts: guesses of the next tokens, copied from where the last few tokens stood before. Pure.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023) in a sequence's own text, and in what finished rows of
the same group have said: rows of one bulk file often answer alike. A guess costs little and proves nothing:
``speculation.py`` decides how many are worth checking, and the sampler which it would have drawn itself.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable

LONGEST, SHORTEST = 4, 2
"""How many tokens must agree in a sequence's own text: the longest agreement wins, and the latest place."""
GROUP_TOKENS = 65_536
"""Of finished text remembered for a group; the oldest goes first."""
GROUPS = 16
_WIDTH = 4
_NONE = -1
"""Stands between two texts, and is no token."""


class Text:
    """Tokens as bytes, for the search of a short run in a long text: some 20 µs in 65,536 tokens."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._bytes = bytearray()
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._bytes) // _WIDTH

    def extend(self, tokens: Iterable[int]) -> None:
        self._bytes += _pack(tokens)

    def drop(self, count: int) -> None:
        """Forget the first ``count`` tokens."""
        del self._bytes[: count * _WIDTH]

    def follow(self, run: list[int], count: int) -> list[int]:
        """Up to ``count`` tokens after the last place where ``run`` stands and another token follows.

        A text that ends before ``count`` is taken to go on like that: it has just begun to repeat itself.
        """
        wanted, end = _pack(run), len(self._bytes) - _WIDTH
        while (at := self._bytes.rfind(wanted, 0, end)) >= 0:
            start = at + len(wanted)
            if at % _WIDTH == 0 and not self._bytes.startswith(_END, start):
                return self._copy(start // _WIDTH, count)
            end = start - 1  # another text, or bytes of two neighbours: no token begins here
        return []

    def _copy(self, start: int, count: int) -> list[int]:
        some = array("i", bytes(self._bytes[start * _WIDTH : (start + count) * _WIDTH])).tolist()
        if _NONE in some:
            return some[: some.index(_NONE)]
        return [some[i % len(some)] for i in range(count)]


class OwnText:
    """One sequence's prompt and output."""

    def __init__(self) -> None:
        self._text = Text()

    def propose(self, tokens: list[int], count: int, shortest: int = SHORTEST) -> list[int]:
        """Up to ``count`` tokens that once followed the last few of ``tokens``, which may only have grown.

        ``shortest``: so many must agree at least.
        """
        self._text.extend(tokens[len(self._text) :])
        for length in range(min(LONGEST, len(tokens) - 1), shortest - 1, -1):
            if found := self._text.follow(tokens[-length:], count):
                return found
        return []


class FinishedTexts:
    """What rows of the same group have said. Bounded: GROUPS groups, of GROUP_TOKENS each."""

    def __init__(self) -> None:
        self._groups: OrderedDict[str, Text] = OrderedDict()

    def add(self, group: str, tokens: list[int]) -> None:
        """Remember a finished output."""
        text = self._groups.setdefault(group, Text())
        self._groups.move_to_end(group)
        text.extend((*tokens[-GROUP_TOKENS + 1 :], _NONE))
        text.drop(max(0, len(text) - GROUP_TOKENS))
        while len(self._groups) > GROUPS:
            self._groups.popitem(last=False)

    def propose(self, group: str, tokens: list[int], count: int) -> list[int]:
        """Up to ``count`` tokens that followed the last LONGEST of ``tokens`` in another row."""
        text = self._groups.get(group)
        return text.follow(tokens[-LONGEST:], count) if text and len(tokens) >= LONGEST else []


def _pack(tokens: Iterable[int]) -> bytes:
    return array("i", tokens).tobytes()


_END = _pack([_NONE])
