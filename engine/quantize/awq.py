"""Which weights matter, by what they are fed: AWQ, Lin et al., MLSys 2024 (arXiv 2306.00978).

Rounding a weight hurts as much as its input is large. So inputs of a linear are divided by scales, its
columns multiplied by them, and whatever makes the inputs takes the division in: the model computes the same,
and large inputs meet finer weights. How far to go is searched: scales are powers of how large inputs and
weights are, and the power is the one that leaves the least error in what the linears say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.layout import Joint, joints, layer_prefix
from ..models.spec import ModelSpec
from .calibration import Seen
from .layouts import Rounded

GRID = 20
"""Powers that are tried, from 0 on; beside them, to scale nothing."""
SHARES = tuple(1 - 0.05 * step for step in range(11))
"""Parts of a group's range that are tried when it is clipped."""
TINY = 1e-4

Tensors = dict[str, Tensor]
"""A layer's by their names, weights of linears in float32; what is scaled is replaced."""
Pool = Callable[[Tensor], Tensor]
Fold = Callable[[Tensors, Tensor], Tensor]
"""Divides what a linear is fed by scales, by changing who makes it. The scales as rounding left them."""


@dataclass(frozen=True, slots=True)
class Group:
    """Linears that read one thing, and how that is divided by scales."""

    readers: tuple[str, ...]
    fold: Fold
    pool: Pool | None = None
    """Makes scales equal that must be."""


def scale_layer(
    spec: ModelSpec, index: int, tensors: Tensors, seen: Mapping[str, Seen], size: int
) -> dict[str, Seen]:
    """Scale a layer's weights; without rounding it computes what it did. What its linears are fed from now
    on, by weight."""
    fed = _by_weight(spec, index, seen)
    for group in _groups(spec, index):
        here = fed[group.readers[0]]
        scales = _search([tensors[name] for name in group.readers], here, size, group.pool)
        if scales is None:
            continue
        scales = group.fold(tensors, scales)
        for name in group.readers:
            tensors[name] = tensors[name] * scales
            fed[name] = here.divided(scales)
    return fed


def rounded(weight: Tensor, seen: Seen, size: int, *, clip: bool) -> Rounded:
    """``weight`` in four bits; ``clip``: where a narrower range leaves less error in a group, that one."""
    if not clip:
        return Rounded.nearest(weight, size)
    groups = weight.shape[1] // size
    at = torch.arange(groups, device=weight.device)
    grams = seen.gram.view(groups, size, groups, size)[at, :, at]
    best = torch.full((groups, len(weight)), torch.inf, device=weight.device)
    shares = torch.ones_like(best)
    for share in SHARES:
        off = (Rounded.nearest(weight, size, share).dense() - weight).view(len(weight), groups, size)
        off = off.transpose(0, 1)
        error = torch.bmm(off, grams).mul_(off).sum(-1)
        better = error < best
        best[better], shares[better] = error[better], share
    return Rounded.nearest(weight, size, shares.T[..., None])


def clips(spec: ModelSpec, index: int, weight: str) -> bool:
    """Whether a weight's range may be narrowed: not for queries and keys, whose errors multiply."""
    joint = joints(spec, index)["qkv"]
    prefix = layer_prefix(spec, index)
    names = [f"{prefix}{module.name}.weight" for module in joint.modules]
    return weight not in (names[:2] if len(names) == 3 else names)


def _search(weights: Sequence[Tensor], seen: Seen, size: int, pool: Pool | None) -> Tensor | None:
    """The scales of inputs that leave the least error. None: none at all."""
    x = (seen.magnitude / seen.rows).clamp_min(TINY)
    w = torch.cat([_relative(weight, size) for weight in weights]).mean(0)
    said = [_energy(weight, seen) for weight in weights]
    best, least = (
        None,
        sum(
            _energy(Rounded.nearest(weight, size).dense() - weight, seen) / all_
            for weight, all_ in zip(weights, said, strict=True)
        ),
    )
    for step in range(GRID):
        power = step / GRID
        scales = (x.pow(power) / (w.pow(1 - power) + TINY)).clamp_min(TINY)
        scales = scales if pool is None else pool(scales)
        scales = scales / (scales.max() * scales.min()).sqrt()
        error = sum(
            _energy((Rounded.nearest(weight * scales, size).dense() / scales).sub_(weight), seen) / all_
            for weight, all_ in zip(weights, said, strict=True)
        )
        if error < least:
            best, least = scales, error
    return best


def _energy(weight: Tensor, seen: Seen) -> float:
    """Of what a linear says: the sum of squares over all rows that it was fed."""
    return float((weight @ seen.gram).mul_(weight).sum().clamp_min(torch.finfo(torch.float32).tiny))


def _relative(weight: Tensor, size: int) -> Tensor:
    """Each number's size, as a part of its group's largest."""
    grouped = weight.abs().view(len(weight), -1, size)
    return (grouped / grouped.amax(-1, keepdim=True).clamp_min(TINY)).view(weight.shape)


# ---- who reads what, and who makes it


def _by_weight(spec: ModelSpec, index: int, seen: Mapping[str, Seen]) -> dict[str, Seen]:
    """What each weight is fed; modules of a joint are fed the same."""
    prefix = layer_prefix(spec, index)
    fed: dict[str, Seen] = {}
    for joint in joints(spec, index).values():
        names = _names(prefix, joint)
        fed |= dict.fromkeys(names, seen[names[0]])
    return fed


def _groups(spec: ModelSpec, index: int) -> list[Group]:
    """In this order: no fold changes what a later search sees of its weights but for their rows' sizes."""
    prefix, names, linears = layer_prefix(spec, index), spec.names, joints(spec, index)
    groups: list[Group] = []
    readers = _names(prefix, linears["qkv"])
    if spec.parallel and names.mlp_norm is None:  # one norm feeds both
        readers += _names(prefix, linears["gate_up"])
    elif names.mlp_norm is not None:
        groups.append(Group(_names(prefix, linears["gate_up"]), norm_fold(spec, prefix + names.mlp_norm)))
    if names.attention_norm is not None:
        groups.append(Group(readers, norm_fold(spec, prefix + names.attention_norm)))
    if spec.qkv_clip is None:  # cutting values off is not linear
        fold = _rows_fold(prefix, linears["qkv"], _value_rows(spec, linears["qkv"]), _one_of_each(spec))
        groups.append(Group(_names(prefix, linears["output"]), fold, _shared(spec)))
    if spec.gated or spec.activation == "relu":  # the others bend what they are given
        rows = range(linears["gate_up"].rows)[-spec.intermediate_size :]
        groups.append(Group(_names(prefix, linears["down"]), _rows_fold(prefix, linears["gate_up"], rows)))
    return groups


def _names(prefix: str, joint: Joint) -> tuple[str, ...]:
    return tuple(f"{prefix}{module.name}.weight" for module in joint.modules)


def norm_fold(spec: ModelSpec, norm: str) -> Fold:
    plus = 1 if spec.norm_plus_one else 0

    def fold(tensors: Tensors, scales: Tensor) -> Tensor:
        weight = tensors[f"{norm}.weight"]
        before = weight.to(scales) + plus
        changed = (before / scales - plus).to(weight)  # which may be on another device
        after = changed.to(scales) + plus
        # What the stored numbers' rounding made of the scales is what columns are multiplied by.
        whole = (before != 0) & (after != 0)
        scales = torch.where(whole, before / after, 1.0)
        tensors[f"{norm}.weight"] = torch.where(whole.to(weight.device), changed, weight)
        if spec.norm_bias:
            bias = tensors[f"{norm}.bias"]
            tensors[f"{norm}.bias"] = (bias.to(scales) / scales).to(bias)
        return scales

    return fold


def _rows_fold(prefix: str, joint: Joint, rows: Sequence[int], chosen: Pool | None = None) -> Fold:
    """Divide ``rows`` of a joint's weight and bias; ``chosen``: of scales, one for each of these rows."""

    def fold(tensors: Tensors, scales: Tensor) -> Tensor:
        factors = scales.new_ones(joint.rows)
        factors[torch.tensor(list(rows), device=scales.device)] = scales if chosen is None else chosen(scales)
        parts = torch.split(factors, [module.rows for module in joint.modules])
        for module, part in zip(joint.modules, parts, strict=True):
            name = f"{prefix}{module.name}"
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"] / part[:, None]
            if module.bias:
                bias = tensors[f"{name}.bias"]
                tensors[f"{name}.bias"] = (bias.to(part) / part).to(bias)
        return scales

    return fold


def _value_rows(spec: ModelSpec, joint: Joint) -> Sequence[int]:
    """Rows of values, as the checkpoint has them, in the decoder's order."""
    order = range(joint.rows) if joint.order is None else joint.order
    return order[spec.q_size + spec.kv_size :]


def _shared(spec: ModelSpec) -> Pool:
    """A value head is read once for each query head of its group: their scales become their mean."""

    def pool(scales: Tensor) -> Tensor:
        each = scales.view(spec.num_kv_heads, spec.group, spec.head_dim)
        return each.mean(1, keepdim=True).expand_as(each).reshape(-1)

    return pool


def _one_of_each(spec: ModelSpec) -> Pool:
    return lambda scales: scales.view(spec.num_kv_heads, spec.group, spec.head_dim)[:, 0].reshape(-1)
