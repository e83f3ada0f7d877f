"""Log probabilities: of sampled tokens, and of a prompt's.

They are those of the model, before processors, temperature and filters, as OpenAI and vLLM have them. Only
the best few are normalised: nothing of the size of the vocabulary outlives a step, and the rows of a prompt
pass a few at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ..schemas.logprobs import TokenLogprobs
from .messages import Output
from .sequence import Row, Sequence


class Work(Protocol):
    """``count`` tokens of ``seq`` go through the model."""

    @property
    def seq(self) -> Sequence: ...
    @property
    def count(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Scores:
    """The best few of some rows. Taken before anybody rules tokens out; told once a token is chosen.

    That works because whoever rules others out leaves the logit of the chosen one as it was.
    """

    rows: list[int]
    """Which rows of the batch."""
    counts: list[int]
    """How many of the best each of them is told."""
    total: Tensor
    """[rows] float64: log of the sum of exponentials."""
    values: Tensor
    """[rows, most]: logits, largest first."""
    ids: Tensor

    @classmethod
    def take(cls, logits: Tensor, seqs: Rows[Row]) -> Scores | None:
        """None: nobody asks. logits: [rows, vocab], one row for each of ``seqs``."""
        rows = [row for row, seq in enumerate(seqs) if seq.request.logprobs is not None]
        if not rows:
            return None
        counts = [seqs[row].request.logprobs or 0 for row in rows]
        return cls(rows, counts, *_reduce(logits[rows].float(), max(counts)))

    def tell(self, outputs: Rows[Output], logits: Tensor) -> list[Output]:
        """``outputs``, one for each row, with what those that asked are told of the token they got."""
        told = self.of(logits, [output.token_ids[-1] if output.token_ids else None for output in outputs])
        return [
            replace(output, logprobs=[told[row]]) if row in told else output
            for row, output in enumerate(outputs)
        ]

    def of(self, logits: Tensor, tokens: Rows[int | None]) -> dict[int, TokenLogprobs]:
        """What each row that got a token is told, by row."""
        chosen = [
            (place, row, token)
            for place, row in enumerate(self.rows)
            if (token := tokens[row]) is not None and token >= 0
        ]
        values = logits[[row for _, row, _ in chosen], [token for *_, token in chosen]]
        at = [place for place, *_ in chosen]
        told = _told(values, self.total[at], self.values[at], self.ids[at], [self.counts[i] for i in at])
        return {row: one for (_, row, _), one in zip(chosen, told, strict=True)}


@dataclass(slots=True)
class _Piece:
    """Consecutive tokens of one prompt, from position ``start`` on."""

    seq: Sequence
    start: int
    told: list[TokenLogprobs]


class PromptScorer:
    """Log probabilities of the prompt tokens that follow those which one step feeds.

    ``rows``, counted over all tokens of the step, are those whose logits it wants; ``take`` is given them a
    few at a time, in order.
    """

    def __init__(self, work: Rows[Work]) -> None:
        self.rows: list[int] = []
        self._targets: list[int] = []
        self._owners: list[_Piece] = []
        self._pieces: list[_Piece] = []
        self._taken = 0
        first = 0
        for one in work:
            if one.seq.request.prompt_logprobs is not None:
                self._want(one.seq, one.count, first)
            first += one.count

    @classmethod
    def of(cls, work: Rows[Work]) -> PromptScorer | None:
        """None: nobody asks."""
        return cls(work) if any(one.seq.request.prompt_logprobs is not None for one in work) else None

    def tell(self, outputs: Rows[Output]) -> list[Output]:
        """``outputs`` with what the step told of prompts, and new ones for sequences that have none."""
        pieces = self.finish()
        found = [
            replace(output, prompt_from=piece[0], prompt_logprobs=piece[1])
            if (piece := pieces.pop(output.id, None))
            else output
            for output in outputs
        ]
        return found + [
            Output(id=seq_id, token_ids=[], prompt_from=start, prompt_logprobs=told)
            for seq_id, (start, told) in pieces.items()
        ]

    def _want(self, seq: Sequence, count: int, first: int) -> None:
        """Those of ``count`` tokens, fed from row ``first`` on, that say something new of the prompt."""
        start = max(seq.prompt_scored, seq.computed + 1)
        end = min(seq.prompt_len, seq.computed + 1 + count)
        if start >= end:
            return
        assert start == seq.prompt_scored, f"{seq.id}: tokens before {start} were not fed"
        piece = _Piece(seq, start, [])
        self._pieces.append(piece)
        self._owners += [piece] * (end - start)
        self._targets += seq.tokens[start:end]
        self.rows += range(first + start - 1 - seq.computed, first + end - 1 - seq.computed)

    def take(self, logits: Tensor) -> None:
        """[n, vocab]: of the next ``n`` of ``rows``."""
        some = slice(self._taken, self._taken + len(logits))
        self._taken = some.stop
        owners, targets = self._owners[some], self._targets[some]
        counts = [owner.seq.request.prompt_logprobs or 0 for owner in owners]
        scores = logits.float()
        values = scores[list(range(len(targets))), targets]
        for owner, one in zip(owners, _told(values, *_reduce(scores, max(counts)), counts), strict=True):
            owner.told.append(one)

    def finish(self) -> dict[str, tuple[int, list[TokenLogprobs]]]:
        """By sequence: the position of the first token, and what is told of it and of those behind.

        Call once the step has succeeded: the sequences remember how far they have come.
        """
        assert self._taken == len(self.rows), f"{self._taken} of {len(self.rows)} rows came"
        for piece in self._pieces:
            piece.seq.prompt_scored = piece.start + len(piece.told)
        return {piece.seq.id: (piece.start, piece.told) for piece in self._pieces}


def _reduce(scores: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, vocab] float32 to: log of the sum of exponentials [rows] float64, the ``most`` best, their ids.

    Added up in float64, so that how many rows there are shows in no digit.
    """
    top = scores.amax(1, keepdim=True)
    total = (scores - top).exp_().sum(1, dtype=torch.float64).log() + top[:, 0]
    return total, *_best(scores, most)


def _best(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the ``most`` best of each row, of equal ones the lower id first.

    In bfloat16 many are equal, and which of them ``topk`` finds depends on how many rows there are.
    """
    if not most:
        return scores[:, :0], torch.empty(len(scores), 0, dtype=torch.int64, device=scores.device)
    values, ids = scores.topk(min(most + 1, scores.shape[1]), 1)
    left_out = (values[:, most:] == values[:, most - 1 : most]).any(1).nonzero()[:, 0]
    values, ids = values[:, :most], ids[:, :most]
    if len(left_out):
        ids[left_out] = _lowest(scores[left_out], values[left_out, -1:])[:, :most]
        values = scores.gather(1, ids)
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _lowest(scores: Tensor, least: Tensor) -> Tensor:
    """Ids of each row's scores from ``least`` on, the best first, of equal ones the lower id; as many columns
    as the longest row has, and what is behind a shorter one is another's."""
    row, token = (scores >= least).nonzero(as_tuple=True)
    best = scores[row, token].sort(descending=True, stable=True).indices
    by_row = best[row[best].sort(stable=True).indices]
    counts = row.bincount(minlength=len(scores))
    starts = counts.cumsum(0) - counts
    places = starts[:, None] + torch.arange(int(counts.max()), device=scores.device)
    return token[by_row[places.clamp_(max=len(token) - 1)]]


def _told(
    chosen: Tensor, total: Tensor, values: Tensor, ids: Tensor, counts: Iterable[int]
) -> list[TokenLogprobs]:
    """One record for each row. chosen: [rows], logits; the others as from ``_reduce``."""
    mine = _floats(chosen.double() - total)
    best, best_ids = _float_rows(values.double() - total[:, None]), _int_rows(ids)
    return [
        TokenLogprobs(logprob=logprob, top_ids=tokens[:count], top_logprobs=values[:count])
        for logprob, values, tokens, count in zip(mine, best, best_ids, counts, strict=True)
    ]


def _floats(x: Tensor) -> list[float]:
    return x.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  (untyped in torch)


def _float_rows(x: Tensor) -> list[list[float]]:
    return x.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _int_rows(x: Tensor) -> list[list[int]]:
    return x.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
