"""A model cut for several ranks: each holds a narrower model, whose tensors are cut from the whole one's.

Each has some of the heads, some of every MLP's inner width and some of the vocabulary; what is left of the
families' tables describes its part (Shoeybi et al. 2019, "Megatron-LM", section 3). So loading, layers,
attention and adapters know nothing of ranks: they see a model with fewer heads. Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

from ...schemas.errors import Misconfigured
from ..models.layout import Joined, Joint, MlpJoints, joints, layer_prefix, moe_joints, stored_heads
from ..models.spec import ModelSpec

GRAINS = (128, 64, 32, 16, 8, 4, 2, 1)
"""What a width is cut in multiples of, if it can be: quantized weights have groups, kernels have lanes."""

Runs = tuple[range, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """This rank's part of a linear: rows of the weight, which are outputs, or columns, which are inputs."""

    side: Literal["rows", "columns"]
    runs: Runs


@dataclass(frozen=True, slots=True)
class Piece:
    """Where a tensor of the narrow model lies in the checkpoint: ``runs`` of dimension ``dim``, one after
    another. None: all of it."""

    name: str
    dim: int = 0
    runs: Runs | None = None
    elsewhere: bool = False
    """Another rank adds it: here it counts as zeros."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's part of a model."""

    spec: ModelSpec
    """The narrower model."""
    whole: ModelSpec
    rank: int
    size: int
    vocab: tuple[range, ...]
    """By rank, the tokens whose embedding and whose logits it has."""
    linears: dict[Joined, Cut] = field(default_factory=dict["Joined", Cut])
    """Each of the decoder's linears, in the decoder's order; experts' are not among them."""
    cuts: dict[str, Cut] = field(default_factory=dict[str, Cut])
    """By module, in the checkpoint's names. What is not here every rank has whole."""
    pieces: dict[str, Piece] = field(default_factory=dict[str, Piece])
    """By tensor, what is cut otherwise than its module."""

    def piece(self, name: str) -> Piece:
        """A tensor of the narrow model."""
        if name in self.pieces:
            return self.pieces[name]
        module, _, leaf = name.rpartition(".")
        cut = self.cuts.get(module)
        if cut is None:
            return Piece(name)
        if leaf == "bias":
            if cut.side == "columns":
                return Piece(name, elsewhere=self.rank > 0)
            return Piece(name, 0, cut.runs)
        in_layer = module.startswith(f"{self.spec.names.base}{self.spec.names.layers}.")
        by_rows = (cut.side == "rows") != (self.spec.names.transposed and in_layer)
        return Piece(name, 0 if by_rows else 1, cut.runs)


def shard(spec: ModelSpec, rank: int, size: int) -> Shard:
    """The part of ``rank``. Raises Misconfigured, the same on every rank, if there is no such cut."""
    if size == 1:
        return Shard(spec, spec, rank, size, (range(spec.vocab_size),))
    queries, keys = _heads(spec, rank, size)
    inner = _width(spec.intermediate_size, rank, size, "MLPs are")
    vocab = tuple(_width(spec.vocab_size, each, size, "vocabulary is") for each in range(size))
    narrow = replace(
        spec,
        vocab_size=len(vocab[rank]),
        num_heads=len(queries),
        num_kv_heads=len(keys),
        intermediate_size=len(inner),
        alibi=spec.alibi[queries.start : queries.stop],
        qkv_layout="joined",
    )
    found = Shard(narrow, spec, rank, size, vocab)
    if spec.moe is not None:
        experts = _width(spec.moe.intermediate_size, rank, size, "experts are")
        shared = range(0)
        if spec.moe.shared_size:
            shared = _width(spec.moe.shared_size, rank, size, "shared experts are")
        moe = replace(spec.moe, intermediate_size=len(experts), shared_size=len(shared))
        found = replace(found, spec=replace(narrow, moe=moe))
    for name in (f"{spec.names.base}{spec.names.embedding}", spec.names.head):
        found.cuts[name] = Cut("rows", (vocab[rank],))
    found.linears.update(_linears(spec, queries, keys, inner))
    for layer in range(spec.num_layers):
        _cut_layer(found, layer, queries, keys)
    return found


def cut(total: int, size: int, unit: int = 1) -> list[range]:
    """``total`` in ``size`` runs of whole units, the first ones a unit longer where they cannot be alike."""
    units, left = divmod(total // unit, size)
    ends = [(i * units + min(i, left)) * unit for i in range(size + 1)]
    return [range(first, end) for first, end in pairwise(ends)]


def _heads(spec: ModelSpec, rank: int, size: int) -> tuple[range, range]:
    """Query and key heads of a rank: whole groups, or one key head whose queries several ranks share."""
    group, kv_heads = spec.group, spec.num_kv_heads
    if size <= kv_heads:
        keys = cut(kv_heads, size)[rank]
        return range(keys.start * group, keys.stop * group), keys
    sharers = cut(size, kv_heads)
    if len(sharers[0]) > group:
        raise Misconfigured(
            f"tensor_parallel_size is {size}, and the model has {spec.num_heads} attention heads in "
            f"{kv_heads} groups: at most {spec.num_heads} ranks have one each; lower it"
        )
    if spec.qk_norm == "row" and size % kv_heads:
        raise Misconfigured(
            f"tensor_parallel_size is {size}, no multiple of the model's {kv_heads} key heads, which it "
            f"norms together; use a multiple, or at most {kv_heads}"
        )
    head, ranks = next((head, ranks) for head, ranks in enumerate(sharers) if rank in ranks)
    queries = cut(group, len(ranks))[rank - ranks.start]
    return range(head * group + queries.start, head * group + queries.stop), range(head, head + 1)


def _width(total: int, rank: int, size: int, what: str) -> range:
    """A rank's run of a width: all alike if some grain allows it, else as nearly as the coarsest does."""
    even = (grain for grain in GRAINS if total % (grain * size) == 0)
    nearly = (grain for grain in GRAINS if total % grain == 0 and total // grain >= size)
    grain = next(even, None) or next(nearly, None)
    if grain is None:
        raise Misconfigured(
            f"tensor_parallel_size is {size}, and the model's {what} {total} wide; lower it to {total}"
        )
    return cut(total, size, grain)[rank]


def _linears(spec: ModelSpec, queries: range, keys: range, inner: range) -> dict[Joined, Cut]:
    dim, heads, kv_heads = spec.head_dim, spec.num_heads, spec.num_kv_heads
    behind = (heads, heads + kv_heads)  # keys behind queries, values behind keys
    qkv = (queries, *(range(first + keys.start, first + keys.stop) for first in behind))
    halves = (0, spec.intermediate_size) if spec.gated else (0,)
    gate_up = tuple(range(first + inner.start, first + inner.stop) for first in halves)
    return {
        "qkv": Cut("rows", tuple(_scaled(each, dim) for each in qkv)),
        "output": Cut("columns", (_scaled(queries, dim),)),
        "gate_up": Cut("rows", gate_up),
        "down": Cut("columns", (inner,)),
    }


def _cut_layer(found: Shard, layer: int, queries: range, keys: range) -> None:
    whole, prefix = found.whole, layer_prefix(found.whole, layer)
    linears = joints(whole, layer)
    for module, runs in _qkv(whole, linears["qkv"], queries, keys):
        found.cuts[prefix + module] = Cut("rows", runs)
    (output,) = linears["output"].modules
    found.cuts[prefix + output.name] = Cut("columns", (_scaled(queries, whole.head_dim),))
    _cut_norms(found, prefix, queries, keys)
    if "down" in linears:
        mlp = MlpJoints(linears["gate_up"], linears["down"])
        _cut_mlp(found, prefix, mlp, found.spec.intermediate_size)
    moe, narrow = moe_joints(whole, layer), found.spec.moe
    if moe is not None and narrow is not None:
        for expert in moe.experts:
            _cut_mlp(found, prefix, expert, narrow.intermediate_size)
        if moe.shared is not None:
            _cut_mlp(found, prefix, moe.shared, narrow.shared_size)


def _qkv(spec: ModelSpec, joint: Joint, queries: range, keys: range) -> Iterator[tuple[str, Runs]]:
    """Rows of each module, head by head in the decoder's order, wherever the checkpoint has them."""
    heads, kv_heads, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
    stored = stored_heads(spec)
    of_keys = [heads + head for head in keys]
    of_values = [heads + kv_heads + head for head in keys]
    wanted = [stored[head] for head in (*queries, *of_keys, *of_values)]
    first = 0
    for module in joint.modules:
        count = module.rows // dim
        here = [head - first for head in wanted if first <= head < first + count]
        yield module.name, _joined([range(head * dim, (head + 1) * dim) for head in here])
        first += count


def _cut_mlp(found: Shard, prefix: str, mlp: MlpJoints, narrow: int) -> None:
    """``narrow``: this rank's width, which says where it lies, since all ranks are cut by one rule."""
    (down,) = mlp.down.modules
    inner = _width(down.columns, found.rank, found.size, "MLPs are")
    assert len(inner) == narrow, f"{len(inner)} columns of {down.name}, {narrow} in the spec"
    for module in mlp.up.modules:
        parts = range(0, module.rows, down.columns)  # gate and up may be one module, one under the other
        runs = tuple(range(first + inner.start, first + inner.stop) for first in parts)
        found.cuts[prefix + module.name] = Cut("rows", runs)
    found.cuts[prefix + down.name] = Cut("columns", (inner,))


def _cut_norms(found: Shard, prefix: str, queries: range, keys: range) -> None:
    spec = found.whole
    for name, heads in ((spec.names.q_norm, queries), (spec.names.k_norm, keys)):
        for leaf in ("weight", "bias"):
            whole = f"{prefix}{name}.{leaf}"
            if spec.qk_norm == "heads":
                found.pieces[whole] = Piece(whole, 0, (heads,))
            elif spec.qk_norm == "row":
                found.pieces[whole] = Piece(whole, 0, (_scaled(heads, spec.head_dim),))
            elif spec.qk_norm == "listed":
                for i, head in enumerate(heads):
                    found.pieces[f"{prefix}{name}.norms.{i}.{leaf}"] = Piece(
                        f"{prefix}{name}.norms.{head}.{leaf}"
                    )


def _scaled(heads: range, dim: int) -> range:
    return range(heads.start * dim, heads.stop * dim)


def _joined(runs: Sequence[range]) -> Runs:
    """Neighbours as one."""
    joined: list[range] = []
    for run in runs:
        if joined and joined[-1].stop == run.start:
            joined[-1] = range(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)
