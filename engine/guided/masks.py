"""Masks of all guided rows of a step, computed beside the forward pass, and laid on their logits."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence as Rows
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from llguidance import LLExecutor
from numpy.typing import NDArray
from torch import Tensor

from ..sequence import Sequence

MAX_THREADS = 4


class Masker:
    """Owns the threads. ``eos_token_ids``: the tokens with which a grammar's mask says that it may end."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._words = -(-vocab_size // 32)
        self._executor = LLExecutor(min(MAX_THREADS, max(1, (os.cpu_count() or 1) // 2)))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="guided-masks")

    def start(self, seqs: Rows[Sequence], eos_token_ids: Rows[int]) -> Masks:
        """Begin computing; the matchers are taken until ``Masks.apply`` or ``Masks.drop``."""
        rows = [row for row, seq in enumerate(seqs) if seq.guided]
        bits = np.zeros((len(rows), self._words), np.int32)
        masks = Masks([seqs[row] for row in rows], rows, bits, self._vocab_size, tuple(eos_token_ids))
        free = [
            (seq.guided.matcher, index)
            for index, seq in enumerate(masks.seqs)
            if seq.guided and seq.guided.forced is None
        ]
        if free:
            masks.future = self._thread.submit(
                self._executor.unsafe_compute_mask_ptr, free, bits.ctypes.data, 4 * self._words, len(rows)
            )
        return masks

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


@dataclass(slots=True)
class Masks:
    """One step's."""

    seqs: list[Sequence]
    rows: list[int]
    """Of the logits; one for each of ``seqs``."""
    bits: NDArray[np.int32]
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    future: Future[None] | None = None
    complete: set[int] = field(default_factory=set[int])
    """Rows whose text can only end: their token does not count."""
    failed: dict[int, str] = field(default_factory=dict[int, str])
    """Rows whose mask could not be computed."""

    def drop(self) -> None:
        """The step failed: give the matchers back."""
        if self.future:
            self.future.result()

    @torch.inference_mode()
    def apply(self, logits: Tensor) -> None:
        """Minus infinity for what the grammars forbid. logits: [rows, vocab], written to."""
        if not self.rows:
            return
        self.drop()
        allowed = np.unpackbits(self.bits.view(np.uint8), axis=1, count=self.vocab_size, bitorder="little")
        kept = [index for index in range(len(self.rows)) if self._settle(index, allowed[index])]
        if not kept:
            return
        forbidden = torch.as_tensor(allowed[kept, : logits.shape[1]] == 0, device=logits.device)
        if len(kept) == len(logits):
            logits.masked_fill_(forbidden, -math.inf)
        else:
            for index, row in zip(range(len(kept)), kept, strict=True):
                logits[self.rows[row]].masked_fill_(forbidden[index], -math.inf)

    def _settle(self, index: int, allowed: NDArray[np.uint8]) -> bool:
        """Make the row's mask final. False: there is nothing to sample."""
        seq, row = self.seqs[index], self.rows[index]
        guided = seq.guided
        assert guided
        if guided.forced is not None:
            allowed[guided.forced] = 1
            return True
        if guided.matcher.is_error():
            self.failed[row] = guided.matcher.get_error().split("\n")[0][:200]
            return False
        early = seq.output_len < seq.request.min_tokens
        barred = [t for t in self.eos_token_ids if early or t not in seq.end_ids]
        allowed[barred] = 0
        if early:
            allowed[list(seq.end_ids)] = 0
        if allowed.any():
            return True
        self.complete.add(row)  # a complete text goes before min_tokens and ignore_eos
        return False
