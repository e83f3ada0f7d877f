"""Processing: what requests change in their logits before a token is chosen. Rows that ask for nothing pay
nothing.

The order is the order of the fields of ``messages.Processors``, and that of transformers where it has the
processor: watermark (where TGI has it), logit_bias, repetition, frequency and presence (where vLLM has them),
DRY, then what may not be sampled at all: bad words, ends before ``min_tokens``, all that is not in
allowed_token_ids. ``sampler.py`` goes on with temperature, top_k, top_p, min_p and typical_p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..schemas.errors import InvalidRequest
from .messages import Processors, Request
from .row_state import Amounts, Ids, RowState
from .sequence import Row
from .torch_noise import key_rows, noise_bits, unsigned_below
from .watermark import green_below, green_key


@dataclass(frozen=True, slots=True)
class Processed:
    """Rows as they are to be sampled from; the logits they come from are as they were."""

    rows: list[int]
    """Which rows of the batch, ascending."""
    logits: Tensor
    """[rows, vocab] float32: in bfloat16 a small penalty would be rounded away."""

    def nothing_left(self, row: int) -> bool:
        """Whether every token of this row of the batch has been ruled out."""
        return bool((self.logits[self.rows.index(row)] == -math.inf).all())


class Processing:
    """One state for each sequence that has processors, from its first token until ``forget``."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self.device = device
        self._tokens = torch.arange(vocab_size, dtype=torch.int32, device=device)
        self._states: dict[str, RowState] = {}

    def forget(self, seq_id: str) -> None:
        """This sequence has ended."""
        self._states.pop(seq_id, None)

    def check(self, known: AbstractSet[str]) -> None:
        """Raise AssertionError if a sequence that is not ``known`` was not forgotten."""
        assert self._states.keys() <= known, f"not forgotten: {sorted(self._states.keys() - known)}"

    def apply(self, logits: Tensor, seqs: Rows[Row]) -> Processed | None:
        """The rows that ask for something, changed. None: no row does.

        logits: [rows, vocab], one row for each of ``seqs``; not written to.
        """
        rows = [row for row, seq in enumerate(seqs) if _asks(seq)]
        if not rows:
            return None
        scores = logits[rows].float()
        some = [seqs[row] for row in rows]
        states = [(place, state) for place, seq in enumerate(some) if (state := self._state(seq)) is not None]
        self._favour_green(scores, some, states)
        self._add_bias(scores, states)
        self._penalise_repetition(scores, states)
        self._subtract(scores, [(place, found) for place, state in states if (found := state.spent())])
        self._subtract(scores, [(place, found) for place, state in states if (found := state.dry())])
        self._forbid(scores, some, states)
        return Processed(rows, scores)

    def _state(self, seq: Row) -> RowState | None:
        if seq.request.processors is None:
            return None
        state = self._states.get(seq.id)
        if state is None:
            state = self._states[seq.id] = RowState(seq.request)
        state.catch_up(seq.tokens)
        return state

    def _favour_green(self, scores: Tensor, seqs: list[Row], states: list[tuple[int, RowState]]) -> None:
        for place, state in states:
            if mark := state.processors.watermark:
                key = key_rows([green_key(mark.key, seqs[place].tokens[-1])], self.device)
                green = unsigned_below(noise_bits(self._tokens, key)[0], green_below(mark.gamma))
                scores[place] += green * mark.delta

    def _add_bias(self, scores: Tensor, states: list[tuple[int, RowState]]) -> None:
        wanted = [(place, state.bias) for place, state in states if state.processors.logit_bias]
        if wanted:
            at, bias = self._gather(scores, wanted)
            scores.view(-1)[at] += bias

    def _penalise_repetition(self, scores: Tensor, states: list[tuple[int, RowState]]) -> None:
        wanted = [(place, found) for place, state in states if (found := state.repeated())]
        if not wanted:
            return
        at, penalty = self._gather(scores, wanted)
        flat = scores.view(-1)
        before = flat[at]
        flat[at] = torch.where(before < 0, before * penalty, before / penalty)

    def _subtract(self, scores: Tensor, found: list[tuple[int, tuple[Ids, Amounts]]]) -> None:
        if found:
            at, amounts = self._gather(scores, found)
            scores.view(-1)[at] -= amounts

    def _forbid(self, scores: Tensor, seqs: list[Row], states: list[tuple[int, RowState]]) -> None:
        for place, state in states:
            banned = state.banned()
            if len(banned):
                scores[place, self._on_device(banned)] = -math.inf
        for place, seq in enumerate(seqs):
            if seq.output_len < seq.request.min_tokens and seq.end_ids:
                scores[place, list(seq.end_ids)] = -math.inf
        for place, state in states:
            if state.allowed is not None:
                allowed = self._on_device(state.allowed)
                kept = scores[place, allowed]
                scores[place] = -math.inf
                scores[place, allowed] = kept

    def _gather(self, scores: Tensor, found: list[tuple[int, tuple[Ids, Amounts]]]) -> tuple[Tensor, Tensor]:
        """Places in the flattened scores, and a number for each."""
        vocab = scores.shape[1]
        at = [ids + place * vocab for place, (ids, _) in found]
        amounts = [amount for _, (_, amount) in found]
        return self._on_device(np.concatenate(at)), self._on_device(np.concatenate(amounts))

    def _on_device(self, array: Ids | Amounts) -> Tensor:
        return torch.from_numpy(array).to(self.device)  # pyright: ignore[reportUnknownMemberType]  (untyped)


def _asks(seq: Row) -> bool:
    request = seq.request
    return request.processors is not None or seq.output_len < request.min_tokens


def check_processors(request: Request, vocab_size: int) -> None:
    """Raises InvalidRequest for what cannot be done, naming the field."""
    p = request.processors
    if p is None:
        return
    for name, fine, rule in _rules(p):
        if not fine:
            raise InvalidRequest(f"{name} must be {rule}", param=name)
    for name, sequences in (
        ("logit_bias", [list(p.logit_bias)]),
        ("bad_words", p.bad_words),
        ("allowed_token_ids", [p.allowed_token_ids or []]),
        ("dry_sequence_breakers", p.dry.breakers if p.dry else []),
    ):
        if wrong := next((i for ids in sequences for i in ids if not 0 <= i < vocab_size), None):
            raise InvalidRequest(f"token id {wrong} in {name} is not below {vocab_size:,}", param=name)


def _rules(p: Processors) -> list[tuple[str, bool, str]]:
    """(field, whether it is in range, the range in words). A NaN is in no range."""
    inf = math.inf
    rules = [
        ("logit_bias", all(math.isfinite(bias) for bias in p.logit_bias.values()), "numbers"),
        ("repetition_penalty", 0.0 < p.repetition_penalty < inf, "above 0"),
        ("frequency_penalty", math.isfinite(p.frequency_penalty), "a number"),
        ("presence_penalty", math.isfinite(p.presence_penalty), "a number"),
        ("bad_words", all(p.bad_words), "sequences of at least one token"),
        ("allowed_token_ids", p.allowed_token_ids != [], "at least one token"),
        ("typical_p", 0.0 < p.typical_p <= 1.0, "above 0 and at most 1"),
    ]
    if dry := p.dry:
        rules += [
            ("dry_multiplier", 0.0 <= dry.multiplier < inf, "0 (off) or more"),
            ("dry_base", 1.0 <= dry.base < inf, "1 or more"),
            ("dry_allowed_length", dry.allowed_length >= 1, "at least 1"),
            ("dry_range", dry.range >= 0, "0 (all) or more"),
            ("dry_sequence_breakers", all(dry.breakers), "sequences of at least one token"),
        ]
    if mark := p.watermark:
        rules += [
            ("watermark_gamma", 0.0 < mark.gamma < 1.0, "above 0 and below 1"),
            ("watermark_delta", math.isfinite(mark.delta), "a number"),
            ("watermark key", 0 <= mark.key < 2**64, "an unsigned 64-bit integer"),
        ]
    return rules
