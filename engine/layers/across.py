"""The seam where ranks that hold parts of one model put together what each has worked out."""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as nnf
from torch import Tensor


class Across(Protocol):
    """Every rank of a model calls the same of these in the same order, with tensors of the same shapes."""

    @property
    def alone(self) -> bool:
        """One rank holds all of the model: nothing needs to be put together."""
        ...

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """[rows, hidden], ``weight`` being this rank's part of the vocabulary."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """The sum of all ranks' ``x``, whose memory may be used for it."""
        ...

    def mean(self, x: Tensor) -> Tensor:
        """[rows, 1] float32: over what all ranks have in these rows, however much each has."""
        ...

    def joined(self, logits: Tensor) -> Tensor:
        """[rows, vocab] of each rank's part, at rank 0; elsewhere the part."""
        ...


class Alone:
    """The only rank."""

    alone = True

    def embed(self, tokens: Tensor, weight: Tensor) -> Tensor:
        return nnf.embedding(tokens, weight)

    def total(self, x: Tensor) -> Tensor:
        return x

    def mean(self, x: Tensor) -> Tensor:
        return x.float().mean(-1, keepdim=True)

    def joined(self, logits: Tensor) -> Tensor:
        return logits


ALONE = Alone()
