"""How a checkpoint's modules lie in the decoder's linears: which make up one, and in which order of rows.

The decoder knows one order: all queries, all keys, all values, and within a head the rotated pairs at i
and i + half. Whatever else a family stores is put in that order once, when it is loaded: scores do not
change when the dimensions of queries and keys are permuted alike. LoRA adapters follow the same tables.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .spec import ModelSpec

Joined = Literal["qkv", "output", "gate_up", "down"]
"""The decoder's linears of one layer."""

CODEGEN_SHARDS = 4


@dataclass(frozen=True, slots=True)
class Module:
    """A linear of the checkpoint, named within its layer."""

    name: str
    rows: int
    columns: int
    bias: bool


@dataclass(frozen=True, slots=True)
class Joint:
    """One of the decoder's linears: modules one under the other, then row ``order[i]`` of that as row i."""

    modules: tuple[Module, ...]
    order: tuple[int, ...] | None = None

    @property
    def bias(self) -> bool:
        return self.modules[0].bias

    @property
    def rows(self) -> int:
        return sum(module.rows for module in self.modules)

    @property
    def columns(self) -> int:
        return self.modules[0].columns


@dataclass(frozen=True, slots=True)
class MlpJoints:
    up: Joint
    down: Joint


@dataclass(frozen=True, slots=True)
class MoeJoints:
    """A layer's experts. ``gate`` weights what ``shared`` says; both or neither."""

    router: Module
    experts: tuple[MlpJoints, ...]
    shared: MlpJoints | None
    gate: Module | None

    @property
    def modules(self) -> tuple[Module, ...]:
        mlps = self.experts if self.shared is None else (*self.experts, self.shared)
        linears = [module for mlp in mlps for joint in (mlp.up, mlp.down) for module in joint.modules]
        return (self.router, *linears) if self.gate is None else (self.router, self.gate, *linears)


def layer_prefix(spec: ModelSpec, layer: int) -> str:
    return f"{spec.names.base}{spec.names.layers}.{layer}."


def joints(spec: ModelSpec, layer: int) -> dict[Joined, Joint]:
    """The linears of a layer that every token goes through; without the MLP where that is one of experts."""
    found: dict[Joined, Joint] = {"qkv": _qkv(spec), "output": _output(spec)}
    if moe_joints(spec, layer) is None:
        names = spec.names
        mlp = _mlp(spec, names.up, names.down, spec.intermediate_size, spec.mlp_bias)
        found |= {"gate_up": mlp.up, "down": mlp.down}
    return found


def moe_joints(spec: ModelSpec, layer: int) -> MoeJoints | None:
    """A layer's experts, or None: it has a plain MLP."""
    moe, hidden = spec.moe, spec.hidden_size
    if moe is None or not moe.layers[layer]:
        return None

    def expert(block: str, inner: int) -> MlpJoints:
        up = tuple(f"{block}.{name}" for name in moe.up)
        return _mlp(spec, up, f"{block}.{moe.down}", inner, bias=False)

    return MoeJoints(
        router=Module(f"{moe.block}.gate", moe.experts, hidden, bias=False),
        experts=tuple(expert(f"{moe.block}.experts.{i}", moe.intermediate_size) for i in range(moe.experts)),
        shared=expert(f"{moe.block}.shared_expert", moe.shared_size) if moe.shared_size else None,
        gate=Module(f"{moe.block}.shared_expert_gate", 1, hidden, bias=False) if moe.shared_size else None,
    )


@functools.cache
def head_order(spec: ModelSpec) -> tuple[int, ...] | None:
    """Dimension of a stored head that the decoder has at each place of its own. None: the same one."""
    rope = next((rope for rope in spec.ropes if rope), None)
    if rope is None:
        return None
    dim, rotated = spec.head_dim, rope.rotary_dim or spec.head_dim
    half, kept = rotated // 2, (dim - rotated) // 2
    if rope.interleaved:
        first, second = range(0, rotated, 2), range(1, rotated, 2)
    else:
        first, second = range(half), range(half, rotated)
    order = (*first, *range(rotated, rotated + kept), *second, *range(rotated + kept, dim))
    return None if order == tuple(range(dim)) else order


@functools.cache
def _qkv(spec: ModelSpec) -> Joint:
    hidden, bias, names = spec.hidden_size, spec.qkv_bias, spec.names.qkv
    sizes = (spec.q_size, spec.kv_size, spec.kv_size)
    if len(names) == 1:
        sizes = (sum(sizes),)
    modules = tuple(Module(name, rows, hidden, bias) for name, rows in zip(names, sizes, strict=True))
    heads, within = stored_heads(spec), head_order(spec)
    plain = range(spec.head_dim)
    order = [
        head * spec.head_dim + dim
        for at, head in enumerate(heads)
        for dim in (plain if within is None or at >= spec.num_heads + spec.num_kv_heads else within)
    ]
    return Joint(modules, None if order == list(range(len(order))) else tuple(order))


def stored_heads(spec: ModelSpec) -> Sequence[int]:
    """For each head of the decoder, queries then keys then values, its number in the checkpoint."""
    heads, kv_heads, group = spec.num_heads, spec.num_kv_heads, spec.group
    if spec.qkv_layout == "grouped":
        span = group + 2
        queries = [kv * span + i for kv in range(kv_heads) for i in range(group)]
        return queries + [kv * span + group + which for which in (0, 1) for kv in range(kv_heads)]
    if spec.qkv_layout == "codegen":
        each = heads // CODEGEN_SHARDS
        return [
            (3 * shard + part) * each + i
            for part in (0, 2, 1)  # a shard holds q, v, k
            for shard in range(CODEGEN_SHARDS)
            for i in range(each)
        ]
    return range(heads + 2 * kv_heads)


def _output(spec: ModelSpec) -> Joint:
    return Joint((Module(spec.names.output, spec.hidden_size, spec.q_size, spec.output_bias),))


def _mlp(spec: ModelSpec, up: tuple[str, ...], down: str, inner: int, bias: bool) -> MlpJoints:
    rows = (2 if spec.gated else 1) * inner // len(up)
    return MlpJoints(
        Joint(tuple(Module(name, rows, spec.hidden_size, bias) for name in up)),
        Joint((Module(down, spec.hidden_size, inner, bias),)),
    )
