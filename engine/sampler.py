"""Sampler: logits -> token ids. What a row gets depends on that row alone."""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .messages import Request
from .native.sampling import NativeSampling
from .noise import FMIX32, GOLDEN32, M32, MAX_GUMBEL, noise_key
from .sequence import Sequence

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: dividing by it would only overflow."""
WIDTHS = (64, 1024)
"""How many of the best tokens are looked at, first and if that was not enough; then all of them, sorted."""
NOISE_ROWS = 16
"""Rows of full-vocabulary noise made at once: bounds memory."""


class Sampler:
    """Greedy rows take the largest logit, ties the lowest id; others the largest logit / temperature + noise.

    The filters are, in this order: temperature, top_k, top_p (of what top_k left), min_p. Among equal logits
    the lower id ranks first, so that exactly ``top_k`` tokens pass whatever the dtype of the logits.

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
        self._native = native
        self._tokens = torch.arange(vocab_size, dtype=torch.int32, device=self.device)

    @torch.inference_mode()
    def sample(self, logits: Tensor, seqs: Rows[Sequence]) -> list[int | None]:
        """The next token of each row; None where the row's logits are not numbers.

        logits: [rows, vocab], float32 or bfloat16; may be written to. One row for each of ``seqs``.
        """
        assert logits.shape == (len(seqs), self.vocab_size), f"{tuple(logits.shape)} for {len(seqs)} rows"
        _forbid_early_end(logits, seqs)
        if self._native:
            return _sample_natively(self._native, logits, seqs)
        noisy = [row for row, seq in enumerate(seqs) if seq.request.temperature >= GREEDY_BELOW]
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
        first = min(WIDTHS[0], self.vocab_size)
        tokens, settled = self._choose(logits, knobs, first)
        wider = [width for width in WIDTHS[1:] if width < self.vocab_size] + [self.vocab_size]
        for row in (i for i, done in enumerate(settled) if not done):
            for width in wider:
                token, done = self._choose(logits[row : row + 1], knobs.row(row), width)
                if done[0]:
                    tokens[row] = token[0]
                    break
        return tokens

    def _choose(self, logits: Tensor, knobs: _Knobs, width: int) -> tuple[list[int | None], list[bool]]:
        """Token of each row, looking at its best ``width`` tokens, and whether more could change it."""
        values, ids = _best(logits, width)
        whole = width == self.vocab_size
        scaled = values.double() / knobs.temperature
        keep, known = _filter(scaled, logits, knobs, whole=whole)
        # An equal logit outside may have the lower id: then who is in and who is out is not known yet.
        last_kept = values.masked_fill(~keep, math.inf).amin(1)
        known &= ~knobs.filtered | (~keep[:, -1] & (last_kept > values[:, -1])) | whole

        noise = _gumbel(noise_bits(ids.int(), knobs.keys))
        best, column = (scaled + noise).masked_fill(~keep, -math.inf).max(1)
        tokens: list[int | None] = [*_ints(ids.gather(1, column[:, None])[:, 0])]
        if not whole:
            self._look_outside(logits, knobs, best, scaled[:, -1], tokens)
        for row, top in enumerate(_floats(values[:, 0])):
            if not math.isfinite(top):
                tokens[row], known[row] = None, True
        return tokens, [bool(k) for k in _ints(known)]

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
            at, token = (bits ^ _int32(1 << 31) >= signed).nonzero(as_tuple=True)
            row = some[at]
            score = logits[row, token].double() / knobs.temperature[row, 0] + _gumbel(bits[at, token])
            better = score > best[row]
            beaten: dict[int, float] = {}
            found = zip(_ints(row[better]), _ints(token[better]), _floats(score[better]), strict=True)
            for r, t, s in found:
                if s > beaten.get(r, -math.inf):
                    beaten[r], tokens[r] = s, t


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
    def of(cls, seqs: Rows[Sequence], device: torch.device) -> _Knobs:
        requests = [seq.request for seq in seqs]
        keys = [noise_key(s.request.seed, s.request.choice, s.output_len) for s in seqs]

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]

        return cls(
            temperature=column([r.temperature for r in requests], torch.float64),
            top_k=column([r.top_k for r in requests], torch.int64),
            top_p=column([r.top_p for r in requests], torch.float64),
            min_p=column([r.min_p for r in requests], torch.float64),
            keys=torch.tensor([[_int32(w) for w in k] for k in keys], dtype=torch.int32, device=device),
            filtered=torch.tensor([_filters(r) for r in requests], device=device),
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


def _filters(request: Request) -> bool:
    return request.top_k > 0 or request.top_p < 1.0 or request.min_p > 0.0


def _forbid_early_end(logits: Tensor, seqs: Rows[Sequence]) -> None:
    """Rows that are short of ``min_tokens`` cannot sample an end token."""
    for row, seq in enumerate(seqs):
        if seq.output_len < seq.request.min_tokens and seq.end_ids:
            logits[row, list(seq.end_ids)] = -math.inf


def _sample_natively(native: NativeSampling, logits: Tensor, seqs: Rows[Sequence]) -> list[int | None]:
    requests = [seq.request for seq in seqs]
    keys = [noise_key(s.request.seed, s.request.choice, s.output_len) for s in seqs]
    tokens = native.sample(
        logits.contiguous(),
        np.array([(r.temperature, r.top_p, r.min_p) for r in requests], np.float64),
        np.array([r.top_k for r in requests], np.int64),
        np.array(keys, np.uint32),
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


def _best(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
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


def noise_bits(tokens: Tensor, keys: Tensor) -> Tensor:
    """``noise.noise_bits`` as int32 with the same bit pattern.

    tokens: int32 [n] or [rows, n]; keys: int32 [rows, 2]. Returns [rows, n]. Multiplications wrap.
    """
    bits = _fmix32(tokens * _int32(GOLDEN32) ^ keys[:, :1])
    return _fmix32(bits.bitwise_xor_(keys[:, 1:]))


def _fmix32(x: Tensor) -> Tensor:
    """In place. int32 has no logical shift, hence the masks."""
    for shift, factor in FMIX32:
        x.bitwise_xor_((x >> shift).bitwise_and_(M32 >> shift))
        if factor != 1:
            x.mul_(_int32(factor))
    return x


def _gumbel(bits: Tensor) -> Tensor:
    """``noise.gumbel`` in float64."""
    uniform = ((bits.long() & M32).double() + 0.5) * 2.0**-32
    return -(-uniform.log()).log()


def _ints(x: Tensor) -> list[int]:
    return x.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]  (untyped in torch)


def _floats(x: Tensor) -> list[float]:
    return x.tolist()  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _int32(x: int) -> int:
    """The int32 with the bits of ``x``."""
    return x - (1 << 32) if x >> 31 else x
