"""Sampler: logits -> token ids. What a row gets depends on that row alone."""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .native.sampling import NativeSampling
from .noise import MAX_GUMBEL, noise_key
from .processors import Processed, Processing
from .sequence import Row
from .torch_noise import gumbel, int32, key_rows, noise_bits

WIDTHS = (64, 1024)
"""How many of the best tokens are looked at, first and if that was not enough; then all of them, sorted."""
TYPICAL_WIDTHS = (1024, 8192)
"""The same for those that are closest to what is expected."""
NONE_LEFT = -1
"""In place of a token: the request rules every one of them out."""
NOISE_ROWS = 16
"""Rows of full-vocabulary noise made at once: bounds memory."""


class Sampler:
    """Greedy rows take the largest logit, ties the lowest id; others the largest logit / temperature + noise.

    First comes what a request wants changed in its logits (``processors.py``). The filters are, in this
    order: temperature, top_k, top_p (of what top_k left), min_p, typical_p (of what these left). Among equal
    logits the lower id ranks first, so that exactly ``top_k`` tokens pass whatever the dtype of the logits.

    No row is sorted in full unless its filters reach beyond the best ``WIDTHS`` tokens. A row without
    filters needs none of that: outside of the best few, only a token with enough noise can win, and how much
    is enough is known, so a comparison of raw bits finds the candidates.
    """

    def __init__(
        self, vocab_size: int, device: torch.device | str = "cpu", native: NativeSampling | None = None
    ) -> None:
        """``native`` does the same on the CPU, 10 to 50 times as fast; what is written here is its test."""
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.processing = Processing(vocab_size, self.device)
        self._native = native
        self._tokens = torch.arange(vocab_size, dtype=torch.int32, device=self.device)

    @torch.inference_mode()
    def sample(self, logits: Tensor, seqs: Rows[Row]) -> list[int | None]:
        """The next token of each row; None where the row's logits are not numbers, NONE_LEFT where every
        token was ruled out.

        logits: [rows, vocab], float32 or bfloat16; not written to. One row for each of ``seqs``.
        """
        assert logits.shape == (len(seqs), self.vocab_size), f"{tuple(logits.shape)} for {len(seqs)} rows"
        processed = self.processing.apply(logits, seqs)
        if self._native:
            tokens = _sample_natively(self._native, logits, processed, seqs)
        else:
            tokens = self._sample(logits, seqs)
            if processed:
                again = self._sample(processed.logits, [seqs[row] for row in processed.rows])
                for row, token in zip(processed.rows, again, strict=True):
                    tokens[row] = token
        if processed:
            self._finish(processed, seqs, tokens)
        return tokens

    def _finish(self, processed: Processed, seqs: Rows[Row], tokens: list[int | None]) -> None:
        """What only few rows need."""
        for place, row in enumerate(processed.rows):
            request = seqs[row].request
            if tokens[row] is None:
                tokens[row] = NONE_LEFT if processed.nothing_left(row) else None
            elif request.processors and request.processors.typical_p < 1.0 and not request.greedy:
                tokens[row] = self._typical(processed.logits[place : place + 1], seqs[row])

    def _sample(self, logits: Tensor, seqs: Rows[Row]) -> list[int | None]:
        noisy = [row for row, seq in enumerate(seqs) if not seq.request.greedy]
        if not noisy:
            return _greedy(logits)
        tokens: list[int | None] = [None] * len(seqs)
        if len(noisy) < len(seqs):
            plain = sorted(set(range(len(seqs))) - set(noisy))
            for row, token in zip(plain, _greedy(logits[plain]), strict=True):
                tokens[row] = token
            logits = logits[noisy]
        knobs = _Knobs.of([seqs[row] for row in noisy], self.device)
        for row, token in zip(noisy, self._noisy(logits.float(), knobs), strict=True):
            tokens[row] = token
        return tokens

    def _noisy(self, logits: Tensor, knobs: _Knobs) -> list[int | None]:
        """Each row at the smallest width that settles it. logits: [rows, vocab] float32."""
        first, *wider = self._widths
        tokens, settled = self._choose(logits, knobs, first)
        for row in (i for i, done in enumerate(settled) if not done):
            for width in wider:
                token, done = self._choose(logits[row : row + 1], knobs.row(row), width)
                if done[0]:
                    tokens[row] = token[0]
                    break
        return tokens

    @property
    def _widths(self) -> list[int]:
        return [*(width for width in WIDTHS if width < self.vocab_size), self.vocab_size]

    def _choose(self, logits: Tensor, knobs: _Knobs, width: int) -> tuple[list[int | None], list[bool]]:
        """Token of each row, looking at its best ``width`` tokens, and whether more could change it."""
        best_few = _Best.of(logits, knobs, width)
        ids, scaled, known = best_few.ids, best_few.scaled, best_few.known
        noise = gumbel(noise_bits(ids.int(), knobs.keys))
        best, column = (scaled + noise).masked_fill(~best_few.keep, -math.inf).max(1)
        tokens: list[int | None] = [*_ints(ids.gather(1, column[:, None])[:, 0])]
        if width < self.vocab_size:
            self._look_outside(logits, knobs, best, scaled[:, -1], tokens)
        for row, top in enumerate(_floats(scaled[:, 0])):
            if not math.isfinite(top):
                tokens[row], known[row] = None, True
        return tokens, [bool(k) for k in _ints(known)]

    def _typical(self, logits: Tensor, seq: Row) -> int:
        """Token of one row that has ``typical_p``. logits: [1, vocab] float32."""
        request = seq.request
        assert request.processors is not None
        knobs = _Knobs.of([seq], self.device)
        ids, scaled = self._tokens, logits[0].double() / knobs.temperature[0]
        if request.filtered:
            few = next(few for width in self._widths if (few := _Best.of(logits, knobs, width)).known[0])
            passed = int(few.keep.sum())
            ids, scaled = few.ids[0, :passed].int(), few.scaled[0, :passed]
        keep = typical(scaled, request.processors.typical_p).nonzero()[:, 0]
        ids, scaled = ids[keep], scaled[keep]
        return int(ids[(scaled + gumbel(noise_bits(ids, knobs.keys))[0]).argmax()])

    def _look_outside(
        self, logits: Tensor, knobs: _Knobs, best: Tensor, edge: Tensor, tokens: list[int | None]
    ) -> None:
        """Replace the tokens of unfiltered rows where one outside the best few beats ``best``.

        best: [rows], the score to beat. edge: [rows], no scaled logit outside is larger.
        """
        need = best - edge
        rows = ((need < MAX_GUMBEL) & ~knobs.filtered).nonzero()[:, 0]
        for start in range(0, len(rows), NOISE_ROWS):
            some = rows[start : start + NOISE_ROWS]
            bits = noise_bits(self._tokens, knobs.keys[some])
            # gumbel(bits) > need, as a comparison of integers; a few too many are harmless.
            least = ((-(-need[some]).exp()).exp() * 2.0**32 - 2.0).floor().clamp(min=0.0)
            signed = (least - 2.0**31).int()[:, None]
            at, token = (bits ^ int32(1 << 31) >= signed).nonzero(as_tuple=True)
            row = some[at]
            score = logits[row, token].double() / knobs.temperature[row, 0] + gumbel(bits[at, token])
            better = score > best[row]
            beaten: dict[int, float] = {}
            found = zip(_ints(row[better]), _ints(token[better]), _floats(score[better]), strict=True)
            for r, t, s in found:
                if s > beaten.get(r, -math.inf):
                    beaten[r], tokens[r] = s, t


@dataclass(frozen=True, slots=True)
class _Best:
    """The best few tokens of each row, [rows, width], largest first; those that pass come first."""

    ids: Tensor
    scaled: Tensor
    """Logits / temperature, float64."""
    keep: Tensor
    """Which of them pass the filters."""
    known: Tensor
    """[rows]: those outside do not pass, or the row has no filters."""

    @classmethod
    def of(cls, logits: Tensor, knobs: _Knobs, width: int) -> _Best:
        values, ids = best_few(logits, width)
        whole = width == logits.shape[1]
        scaled = values.double() / knobs.temperature
        keep, known = _filter(scaled, logits, knobs, whole=whole)
        # An equal logit outside may have the lower id: then who is in and who is out is not known yet.
        last_kept = values.masked_fill(~keep, math.inf).amin(1)
        known &= ~knobs.filtered | (~keep[:, -1] & (last_kept > values[:, -1])) | whole
        return cls(ids, scaled, keep, known)


@dataclass(frozen=True, slots=True)
class _Knobs:
    """What the rows of a batch ask for: columns [rows, 1], but ``keys`` [rows, 2] and ``filtered`` [rows]."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    keys: Tensor
    filtered: Tensor

    @classmethod
    def of(cls, seqs: Rows[Row], device: torch.device) -> _Knobs:
        requests = [seq.request for seq in seqs]
        keys = [noise_key(s.request.seed, s.request.choice, s.output_len) for s in seqs]

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        return cls(
            temperature=column([r.temperature for r in requests], torch.float64),
            top_k=column([r.top_k for r in requests], torch.int64),
            top_p=column([r.top_p for r in requests], torch.float64),
            min_p=column([r.min_p for r in requests], torch.float64),
            keys=key_rows(keys, device),
            filtered=torch.tensor([r.filtered for r in requests], device=device),
        )

    def row(self, index: int) -> _Knobs:
        at = slice(index, index + 1)
        return _Knobs(
            self.temperature[at],
            self.top_k[at],
            self.top_p[at],
            self.min_p[at],
            self.keys[at],
            self.filtered[at],
        )


def typical(scaled: Tensor, mass: float) -> Tensor:
    """Which tokens are typical: the fewest whose information is closest to what is expected, and that have
    ``mass`` between them; of equally close ones all.

    scaled: [n] float64, any order, minus infinity allowed. Method: Meister et al. 2022, as in transformers.
    """
    log_p = scaled.log_softmax(0)
    p = log_p.exp()
    expected = -(p * log_p).nansum()
    distance = (-log_p - expected).abs()
    for width in (*(width for width in TYPICAL_WIDTHS if width < len(scaled)), len(scaled)):
        nearest, order = distance.topk(width, largest=False)
        gathered = p[order].cumsum(0)
        if width == len(scaled) or gathered[-1] >= mass:
            last = min(int((gathered < mass).sum()), width - 1)
            return distance <= nearest[last]
    raise AssertionError("the last width is everything")


def _sample_natively(
    native: NativeSampling, logits: Tensor, processed: Processed | None, seqs: Rows[Row]
) -> list[int | None]:
    requests = [seq.request for seq in seqs]
    keys = [noise_key(s.request.seed, s.request.choice, s.output_len) for s in seqs]
    tokens = native.sample(
        logits.contiguous(),
        np.array([(r.temperature, r.top_p, r.min_p) for r in requests], np.float64),
        np.array([r.top_k for r in requests], np.int64),
        np.array(keys, np.uint32),
        None if processed is None else (processed.rows, processed.logits),
    )
    return [None if token < 0 else token for token in tokens]


def _greedy(logits: Tensor) -> list[int | None]:
    """The largest logit of each row, ties the lowest id: what argmax promises in both libraries."""
    if logits.device.type == "cpu":  # 10 x as fast as torch's argmax there
        array = logits.float().numpy()
        tokens = array.argmax(1)
        fine = np.isfinite(array[np.arange(len(array)), tokens])
        return [token if ok else None for token, ok in zip(tokens.tolist(), fine.tolist(), strict=True)]
    best = logits.argmax(1)
    finite = logits.gather(1, best[:, None])[:, 0].isfinite()
    return [token if ok else None for token, ok in zip(_ints(best), _ints(finite), strict=True)]


def best_few(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The ``width`` largest of each row and their ids, largest first, ties the lowest id first.

    Which of several equal values makes it across the edge is not defined unless ``width`` is the vocabulary.
    """
    if width == logits.shape[1]:
        return logits.sort(dim=1, descending=True, stable=True)
    values, ids = logits.topk(width, dim=1)
    ids, order = ids.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _filter(scaled: Tensor, logits: Tensor, knobs: _Knobs, *, whole: bool) -> tuple[Tensor, Tensor]:
    """Which of the best tokens pass, and per row whether that can be told from them alone.

    scaled: [rows, width] float64, sorted. The tokens that pass are always the first few of a row.
    """
    rows, width = scaled.shape
    keep = torch.ones_like(scaled, dtype=torch.bool)
    known = torch.ones(rows, dtype=torch.bool, device=scaled.device)
    limited = (knobs.top_k > 0) & (knobs.top_k < logits.shape[1])
    if limited.any():
        keep &= ~limited | (torch.arange(width, device=scaled.device) < knobs.top_k)
        known &= ~(limited & (knobs.top_k > width))[:, 0]
    if (knobs.top_p < 1.0).any():
        mass = (scaled - scaled[:, :1]).exp() * keep
        total = mass.sum(1, keepdim=True)
        for row in _ints(((knobs.top_p < 1.0) & ~limited)[:, 0].nonzero()[:, 0]) if not whole else []:
            total[row] = _mass(logits[row], knobs.temperature[row])
        keep &= (knobs.top_p >= 1.0) | (mass.cumsum(1) - mass < knobs.top_p * total)
    if (knobs.min_p > 0.0).any():
        keep &= scaled >= scaled[:, :1] + knobs.min_p.log()
    return keep, known


def _mass(logits: Tensor, temperature: Tensor) -> Tensor:
    """Sum of probabilities of a whole row, relative to its largest. One row at a time, because the order of
    additions, hence the last bits, would otherwise depend on how many rows there are."""
    return ((logits - logits.max()) / temperature.to(logits.dtype)).exp().sum(dtype=torch.float64)


def _ints(x: Tensor) -> list[int]:
    return x.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  (untyped in torch)


def _floats(x: Tensor) -> list[float]:
    return x.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
