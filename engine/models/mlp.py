"""What follows attention in a layer: an MLP, or a choice among several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from ..layers.linear import Linear
from ..lora.rows import Rows, project
from ..native.products import Link, NormOf, Product


class FeedForward(Protocol):
    """[rows, hidden] → [rows, hidden]; ``rows``: which of them have an adapter."""

    def __call__(self, x: Tensor, rows: Sequence[Rows] = ()) -> Tensor: ...


class Norm(Protocol):
    """``x`` normed, or ``residual + x`` normed with the sum left in ``residual``; maybe more done with it."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor: ...


class Mlp:
    """down(act(up(x))); the activation of a gated one reads both halves of what ``up`` says."""

    def __init__(
        self,
        up: Linear,
        down: Linear,
        activate: Callable[[Tensor], Tensor],
        layer: int,
        halved: Product | None = None,
    ) -> None:
        """``halved``: activate(up(x)) in one, the same to the last bit."""
        self._up, self._down, self._activate, self._layer = up, down, activate, layer
        self._halved = halved

    def __call__(self, x: Tensor, rows: Sequence[Rows] = ()) -> Tensor:
        if self._halved is not None and not rows:
            inner = self._halved.gated(x)
        else:
            inner = self._activate(project(self._up, x, rows, self._layer, "gate_up"))
        return project(self._down, inner, rows, self._layer, "down")

    def links(self, norm: NormOf | None) -> tuple[Link, ...]:
        """The same of what is normed first, as links of a chain; none: it cannot be put so."""
        if norm is None or self._halved is None or not isinstance(self._down, Product):
            return ()
        return (self._halved, norm), (self._down, None)


class Summed:
    """What each rank's part of an MLP says, put together: once, however many linears it goes through."""

    def __init__(self, part: FeedForward, total: Callable[[Tensor], Tensor]) -> None:
        self._part, self._total = part, total

    def __call__(self, x: Tensor, rows: Sequence[Rows] = ()) -> Tensor:
        return self._total(self._part(x, rows))


class Experts:
    """Each row goes through the experts that the router scores highest, weighted by these scores.

    A row's sum is in the order of the experts' numbers, whoever else is in the batch.
    """

    def __init__(
        self,
        router: Linear,
        experts: Sequence[FeedForward],
        chosen: int,
        normalised: bool,
        shared: FeedForward | None,
        gate: Linear | None,
    ) -> None:
        self._router, self._experts, self._chosen, self._normalised = router, experts, chosen, normalised
        self._shared, self._gate = shared, gate

    def __call__(self, x: Tensor, rows: Sequence[Rows] = ()) -> Tensor:
        del rows  # adapters of experts are refused when they are read
        weights, chosen = self._router(x).float().softmax(-1).topk(self._chosen)
        if self._normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.to(x.dtype)
        out = torch.zeros_like(x)
        reached = cast("list[int]", chosen.flatten().tolist())  # pyright: ignore[reportUnknownMemberType]
        for number in sorted(set(reached)):
            row, place = torch.where(chosen == number)
            out.index_add_(0, row, self._experts[number](x[row]) * weights[row, place, None])
        if self._shared is not None and self._gate is not None:
            out += self._gate(x).sigmoid() * self._shared(x)
        return out
