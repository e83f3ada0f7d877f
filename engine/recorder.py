"""Recorder: what a sampled token means for its sequence: one token more, or the end."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from .guided.state import LeftTheGrammar
from .messages import Output
from .sampler import NONE_LEFT
from .sequence import Sequence

if TYPE_CHECKING:
    from .guided.masks import Masks

BAD_LOGITS = "invalid_logits"
"""Error code of a sequence whose logits were not numbers: a model or a kernel is broken for this input."""
NOTHING_ALLOWED = "nothing_allowed"
"""Error code of a sequence whose own processors leave it no token to sample."""
GRAMMAR_FAILED = "grammar_failed"
"""Error code of a sequence whose grammar went beyond a limit in the middle of the text."""


class End(Protocol):
    """Forget a sequence. ``spoiled``: its keys and values are no good."""

    def __call__(self, seq: Sequence, *, spoiled: bool = False) -> None: ...


class Recorder:
    """Gives sequences their tokens and says what came out; calls ``end`` for those that are done."""

    def __init__(self, end: End) -> None:
        self._end = end

    def record(self, seq: Sequence, token: int | None) -> Output:
        """Append the token, or end the sequence because of it."""
        if token is None:
            self._end(seq, spoiled=True)
            return Output.failed(
                seq.id,
                BAD_LOGITS,
                f"the model gave no numbers after {len(seq.tokens):,} tokens of this sequence",
                _unsaid(seq),
            )
        if token == NONE_LEFT:
            self._end(seq)
            return Output.failed(
                seq.id,
                NOTHING_ALLOWED,
                f"after {seq.output_len:,} tokens of output the request rules out every token: "
                "allowed_token_ids, bad_words, the grammar and min_tokens leave none; allow more",
                _unsaid(seq),
            )
        if seq.sampled and not seq.guided and self._goes_on(seq, token):
            seq.tokens.append(token)
            seq.said += 1
            return Output(id=seq.request.id, token_ids=[token])
        return self.append(seq, [token], cached=self._cached(seq))

    @staticmethod
    def _goes_on(seq: Sequence, token: int) -> bool:
        """Nothing special happens with this token: most of them, and ``append`` would do the same, slower."""
        length = len(seq.tokens)
        return length + 1 < seq.limit and token not in seq.end_ids and seq.said == length

    def _cached(self, seq: Sequence) -> int | None:
        """``Output.cached_tokens``, once: with the first token that was sampled."""
        first, seq.sampled = not seq.sampled, True
        return seq.cached_tokens if first else None

    def append(self, seq: Sequence, tokens: list[int], cached: int | None = None) -> Output:
        """Give the sequence these tokens, as many as its limit allows, and see whether it ends with them.

        An end token among them ends it there, sampled or forced.
        """
        room = seq.limit - len(seq.tokens)
        fit = _before_end(seq, tokens[:room])
        stop = tokens[len(fit)] if len(fit) < min(room, len(tokens)) else None
        seq.tokens += fit
        new, seq.said = _unsaid(seq), max(seq.said, len(seq.tokens))
        guided, cut, finish, closed = seq.guided, len(tokens) > room, None, None
        if stop is not None or (guided and guided.ended and not guided.closing and not cut):
            finish = "stop"
        elif len(seq.tokens) >= seq.limit or (guided and guided.closing and guided.ended):
            finish, closed = "length", guided.complete and not cut if guided else None
        if finish:
            self._end(seq)
        return Output(
            id=seq.id, token_ids=new, finish=finish, stop_token_id=stop, closed=closed, cached_tokens=cached
        )

    def record_guided(self, seq: Sequence, token: int | None, masks: Masks, row: int) -> Output:
        """``record`` for a row with a mask: its token leads further into the grammar."""
        assert seq.guided
        why = masks.failed.get(row)
        if token is not None and seq.guided.forced is not None:
            token = seq.guided.forced  # also where something else in the request rules it out
        if row in masks.complete:
            cached = self._cached(seq)
            self._end(seq)
            return Output(id=seq.id, token_ids=_unsaid(seq), finish="stop", cached_tokens=cached)
        if why is None and (token is None or token == NONE_LEFT or not _before_end(seq, [token])):
            return self.record(seq, token)
        try:
            if why is None and token is not None:
                more = seq.guided.take(token, seq.limit - len(seq.tokens), seq.known)
                return self.append(seq, more, cached=self._cached(seq))
        except LeftTheGrammar as exc:
            why = str(exc)
        self._end(seq)
        return Output.failed(
            seq.id,
            GRAMMAR_FAILED,
            f"after {seq.output_len:,} tokens of output the grammar could not be followed ({why}); "
            "make it simpler",
            _unsaid(seq),
        )

    def record_guessed(
        self, seq: Sequence, guesses: Rows[int], drawn: Rows[int | None], output: Output
    ) -> tuple[Output, int]:
        """Add to ``output`` what was drawn behind right guesses. Returns it, and how many were right.

        drawn: [1 + guesses], each as if the guesses before it were right; the first is in ``output``.
        """
        right = 0
        for guess, before, token in zip(guesses, drawn, drawn[1:], strict=False):
            if output.finish or before != guess:
                break
            right += 1
            if token is None:  # these logits are no numbers: the next step finds out for itself
                break
            more = self.record(seq, token)
            token_ids = [*output.token_ids, *more.token_ids]
            output = replace(more, token_ids=token_ids, cached_tokens=output.cached_tokens)
        return output, right


def _before_end(seq: Sequence, tokens: list[int]) -> list[int]:
    """Those before the first that ends ``seq``. Before ``min_tokens`` none does: a grammar may force one."""
    early = max(0, seq.request.min_tokens - seq.output_len)
    ends = (place for place in range(early, len(tokens)) if tokens[place] in seq.end_ids)
    return tokens[: next(ends, len(tokens))]


def _unsaid(seq: Sequence) -> list[int]:
    """What a grammar forced at the very beginning, and what is new."""
    return seq.tokens[seq.said :]
