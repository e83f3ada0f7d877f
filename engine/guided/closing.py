"""A short way from where a matcher stands to where its grammar may end."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

MAX_CHOICES = 256
"""Tokens chosen in one search; those that the grammar forces do not count. Bounds its time."""
CLOSERS = frozenset(b'"]})')
IN_STRINGS = frozenset(b"abcdghijklmopqrsuvwxyzABCDFGHIJKLMNOPQRSTUVWXYZ")
"""Letters outside of strings: e and E in numbers, t, f and n for true, false and null."""
ORDERS = (("qpdlosu", True), ("dlqpsou", True), ("lpqdsou", True), ("dlqpsou", False), ("lpdqsou", False))
"""Classes of bytes by preference: quote, punctuation, digit, letter, opening bracket, space, other. True: the
class used least in this search comes first, so that a loop is left when it can be; False: always this order,
for what wants several of a kind in a row. Within a class the byte used least comes first.
"""


class Closer:
    """Finds completions by walking a copy of the matcher: forced tokens are taken, else a byte is chosen that
    looks like an end. Short, not proven the shortest; the same for the same state, always.
    """

    def __init__(self, tokens: LLTokenizer, vocab_size: int) -> None:
        self._eos = tokens.eos_token
        self._of_byte: dict[int, int] = {}
        self._closers: dict[int, list[int]] = defaultdict(list)
        longer: list[tuple[int, int, bytes]] = []
        for token in range(vocab_size):
            if tokens.is_special_token(token):
                continue
            text = tokens.decode_bytes([token])
            if len(text) == 1:
                self._of_byte.setdefault(text[0], token)
            elif text and CLOSERS.issuperset(text):
                longer.append((-len(text), token, text))
        for _, token, text in sorted(longer):
            self._closers[text[0]].append(token)
        self._bytes = sorted(self._of_byte)
        self._ids = np.array([self._of_byte[byte] for byte in self._bytes], np.int64)

    def completes(self, matcher: LLMatcher, plan: list[int]) -> bool:
        return matcher.validate_tokens([*plan, self._eos]) == len(plan) + 1

    def find(self, matcher: LLMatcher, room: int) -> list[int] | None:
        for order, varied in ORDERS:
            plan = self._walk(matcher.deep_copy(), room, _Taste(order, varied))
            if plan is not None:
                return plan
        return None

    def _walk(self, matcher: LLMatcher, room: int, taste: _Taste) -> list[int] | None:
        plan: list[int] = []
        choices = 0
        while not matcher.is_accepting():
            forced = matcher.compute_ff_tokens()
            if not forced:
                choices += 1
                chosen = self._choose(matcher, taste) if choices <= MAX_CHOICES else None
                if chosen is None:
                    return None
                forced = [chosen]
            plan += forced
            if len(plan) > room or not matcher.consume_tokens(forced):
                return None
        return plan

    def _choose(self, matcher: LLMatcher, taste: _Taste) -> int | None:
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            return None
        allowed = {
            byte for byte, bit in zip(self._bytes, _bits(mask, self._ids).tolist(), strict=True) if bit
        }
        if not allowed:
            return _first(mask)
        byte = _ending(allowed)
        if byte is not None:
            for token in self._closers[byte]:
                if mask[token >> 3] >> (token & 7) & 1:
                    return token
        else:
            byte = taste.choose(allowed)
        return self._of_byte[byte]


class _Taste:
    """Which byte of several, in one search."""

    def __init__(self, order: str, varied: bool) -> None:
        self._order, self._varied = order, varied
        self._used: Counter[int] = Counter()
        self._used_of: Counter[str] = Counter()

    def choose(self, allowed: set[int]) -> int:
        byte = min(allowed, key=self._rank)
        self._used[byte] += 1
        self._used_of[CLASS_OF[byte]] += 1
        return byte

    def _rank(self, byte: int) -> tuple[int, int, int, int]:
        of = CLASS_OF[byte]
        return self._used_of[of] if self._varied else 0, self._order.index(of), self._used[byte], byte


def _ending(allowed: set[int]) -> int | None:
    """The byte that ends what is open, if there is one: a bracket, unless it is a character of a string, as
    it is where letters may stand that begin no value; a string ends with its quote."""
    for bracket in b"}]":
        if bracket in allowed and not allowed & IN_STRINGS:
            return bracket
    return ord('"') if ord('"') in allowed else None


def _class_of(byte: int) -> str:
    char = chr(byte)
    if char == '"':
        return "q"
    if char in "{[(":
        return "o"
    if char in " \t\r\n":
        return "s"
    if byte >= 127 or byte < 32 or char in "\\-":  # a minus sign leads on, never to an end
        return "u"
    return "d" if char.isdigit() else "l" if char.isalpha() else "p"


CLASS_OF = [_class_of(byte) for byte in range(256)]


def _bits(mask: NDArray[np.uint8], tokens: NDArray[np.int64]) -> NDArray[np.uint8]:
    return (mask[tokens >> 3] >> (tokens & 7).astype(np.uint8) & 1).astype(np.uint8)


def _first(mask: NDArray[np.uint8]) -> int | None:
    """The lowest token that is allowed, end tokens among them: then the way ends here."""
    found = np.unpackbits(mask, bitorder="little").nonzero()[0]
    return int(found[0]) if len(found) else None
