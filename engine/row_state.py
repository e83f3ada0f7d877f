"""RowState: what the processors of one sequence know of its tokens. Numpy on the host; no torch."""

from __future__ import annotations

from collections.abc import Sequence as Tokens
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from .messages import Dry, Processors, Request

Ids = NDArray[np.int64]
Amounts = NDArray[np.float32]

LONGEST_MATCH = 64
"""Tokens of a repetition that DRY looks back at: by then its penalty forbids, whatever the base."""
MOST = 1e9
"""No penalty of DRY is larger: a logit stays a number."""

N = TypeVar("N", np.int64, np.float32, np.bool_)


class RowState:
    """Built from ids alone, so that it is the same after a preemption, in another batch, and in an attempt
    that continues another's tokens.

    Invariant: it stands for the first ``seen`` tokens of its sequence. What ``catch_up`` does takes time in
    the number of new tokens, not of all.
    """

    def __init__(self, request: Request) -> None:
        processors = request.processors
        assert processors is not None, f"{request.id} has no processors"
        self.processors: Processors = processors
        self.seen = 0
        self._prompt_len = len(request.prompt_ids)
        ids, amounts = processors.logit_bias.keys(), processors.logit_bias.values()
        self.bias = np.array([*ids], np.int64), np.array([*amounts], np.float32)
        words = processors.bad_words
        self._bad_tokens = np.array([word[0] for word in words if len(word) == 1], np.int64)
        self._bad_ends = _by_last([word for word in words if len(word) > 1], last=-2)
        allowed = processors.allowed_token_ids
        self.allowed: Ids | None = None if allowed is None else np.unique(np.array(allowed, np.int64))
        repeats = processors.repetition_penalty != 1.0
        in_output = processors.presence_penalty != 0.0 or processors.frequency_penalty != 0.0
        self._counts = _Counts() if repeats or in_output else None
        self._count_from = 0 if repeats else self._prompt_len
        self._dry = _DryState(processors.dry) if processors.dry is not None else None
        self._tail: list[int] = []
        self._tail_len = max((len(word) - 1 for word in words), default=0)

    def catch_up(self, tokens: Tokens[int]) -> None:
        """Take in the tokens that came since the last call. ``tokens`` is the whole sequence."""
        assert self.seen <= len(tokens), "a sequence lost tokens"
        if self._counts is not None:
            prompt = tokens[max(self.seen, self._count_from) : self._prompt_len]
            output = tokens[max(self.seen, self._prompt_len) :]
            self._counts.add(prompt, 0.0)
            self._counts.add(output, 1.0)
        if self._dry is not None:
            self._dry.add(tokens, self.seen)
        self._tail = list(tokens[max(0, len(tokens) - self._tail_len) :]) if self._tail_len else []
        self.seen = len(tokens)

    def repeated(self) -> tuple[Ids, Amounts] | None:
        """Tokens of prompt and output, and the penalty for each."""
        penalty = self.processors.repetition_penalty
        if self._counts is None or penalty == 1.0:
            return None
        return self._counts.ids, np.full(len(self._counts.ids), penalty, np.float32)

    def spent(self) -> tuple[Ids, Amounts] | None:
        """Tokens, and how much presence and frequency take off their logits."""
        frequency, presence = self.processors.frequency_penalty, self.processors.presence_penalty
        if self._counts is None or frequency == presence == 0.0:
            return None
        times = self._counts.times
        return self._counts.ids, np.float32(frequency) * times + np.float32(presence) * (times > 0)

    def dry(self) -> tuple[Ids, Amounts] | None:
        """Tokens that would prolong a repetition, and what that costs them."""
        return self._dry.penalties() if self._dry is not None else None

    def banned(self) -> Ids:
        """Tokens that would complete a bad word."""
        ends = self._bad_ends.get(self._tail[-1]) if self._tail else None
        tail = self._tail
        now = [word[-1] for word in ends or () if tail[len(tail) - len(word) + 1 :] == word[:-1]]
        return np.concatenate([self._bad_tokens, np.array(now, np.int64)]) if now else self._bad_tokens


class _Counts:
    """Tokens in the order of their first coming, and how often each came in the output."""

    def __init__(self) -> None:
        self._slots: dict[int, int] = {}
        self._ids, self._times = _Growing[np.int64](np.int64), _Growing[np.float32](np.float32)

    def add(self, tokens: Tokens[int], times: float) -> None:
        fresh = [token for token in dict.fromkeys(tokens) if token not in self._slots]
        for token in fresh:
            self._slots[token] = len(self._slots)
        self._ids.extend(fresh)
        self._times.extend([0.0] * len(fresh))
        if times:
            np.add.at(self._times.values, [self._slots[token] for token in tokens], times)

    @property
    def ids(self) -> Ids:
        return self._ids.values

    @property
    def times(self) -> Amounts:
        return self._times.values


class _DryState:
    """All tokens, and at which of them a breaker ends."""

    def __init__(self, dry: Dry) -> None:
        self._dry = dry
        self._single = frozenset(breaker[0] for breaker in dry.breakers if len(breaker) == 1)
        self._longer = _by_last([breaker for breaker in dry.breakers if len(breaker) > 1], last=-1)
        self._tokens, self._broken = _Growing[np.int64](np.int64), _Growing[np.bool_](np.bool_)

    def add(self, tokens: Tokens[int], seen: int) -> None:
        self._tokens.extend(tokens[seen:])
        self._broken.extend([self._breaks(tokens, at) for at in range(seen, len(tokens))])

    def _breaks(self, tokens: Tokens[int], at: int) -> bool:
        token = tokens[at]
        if token in self._single:
            return True
        return any(
            at + 1 >= len(longer) and list(tokens[at + 1 - len(longer) : at + 1]) == longer
            for longer in self._longer.get(token, ())
        )

    def penalties(self) -> tuple[Ids, Amounts] | None:
        """Places where the last token came before; how far each of them, going back, equals the end."""
        dry, window = self._dry, self._dry.range
        tokens, broken = self._tokens.values[-window:], self._broken.values[-window:]
        if len(tokens) < 2 or broken[-1]:
            return None
        at = np.flatnonzero(tokens[:-1] == tokens[-1])
        at = at[~broken[at + 1]]
        lengths = np.ones(len(at), np.int64)
        alive, back = np.arange(len(at)), 1
        while len(alive) and back < min(LONGEST_MATCH, len(tokens)) and not broken[-1 - back]:
            earlier = at[alive] - back
            alive = alive[(earlier >= 0) & (tokens[earlier] == tokens[-1 - back])]
            back += 1
            lengths[alive] = back
        ids, which = np.unique(tokens[at + 1], return_inverse=True)
        longest = np.zeros(len(ids), np.int64)
        np.maximum.at(longest, which, lengths)
        counts = longest >= dry.allowed_length
        excess = (longest[counts] - dry.allowed_length).astype(np.float64)
        amounts = np.minimum(dry.multiplier * dry.base**excess, MOST)
        return ids[counts], amounts.astype(np.float32)


class _Growing(Generic[N]):
    """An array that grows at its end, at constant cost per element."""

    def __init__(self, dtype: type[N]) -> None:
        self._data: NDArray[N] = np.empty(64, dtype)
        self._size = 0

    def extend(self, more: Tokens[float]) -> None:
        size = self._size + len(more)
        if size > len(self._data):
            grown = np.empty(max(size, 2 * len(self._data)), self._data.dtype)
            grown[: self._size] = self._data[: self._size]
            self._data = grown
        self._data[self._size : size] = more
        self._size = size

    @property
    def values(self) -> NDArray[N]:
        """A view: valid until the next ``extend``."""
        return self._data[: self._size]


def _by_last(sequences: list[list[int]], *, last: int) -> dict[int, list[list[int]]]:
    """Sequences by their token at ``last``: those that a sequence may end in are found in one look."""
    found: dict[int, list[list[int]]] = {}
    for sequence in sequences:
        found.setdefault(sequence[last], []).append(sequence)
    return found
