"""safetensors files → tensors. Nothing is loaded before every name and shape has been checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..schemas.errors import ModelInvalid
from .loading import Loading
from .models.layout import joints, layer_prefix, moe_joints
from .models.spec import ModelSpec

HARMLESS_SUFFIXES = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attn.causal_mask",
    ".attn.attention.bias",
    ".attn.attention.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
"""Frequencies and masks, written by old transformers versions; worked out from the config instead."""
HEADS = ("lm_head.weight", "embed_out.weight")

FLOATS = frozenset({"BF16", "F16", "F32"})

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Stored:
    """How a tensor lies in a checkpoint. ``shape`` None: any. ``kinds``: formats by safetensors' names."""

    shape: tuple[int, ...] | None
    kinds: frozenset[str] = FLOATS
    optional: bool = False
    also: tuple[tuple[int, ...], ...] = ()
    """Other shapes that will do."""


def expected_tensors(spec: ModelSpec) -> Shapes:
    """Name and shape of every tensor that a checkpoint of this spec must hold, in Hugging Face names."""
    names, base, hidden = spec.names, spec.names.base, spec.hidden_size
    shapes: Shapes = {f"{base}{names.embedding}.weight": (spec.vocab_size, hidden)}
    if names.positions is not None:
        rows = spec.max_positions + spec.position_offset
        shapes[f"{base}{names.positions}.weight"] = (rows, hidden)
    if not spec.tied_embeddings:
        shapes[f"{names.head}.weight"] = (spec.vocab_size, hidden)
    if spec.head_bias:
        shapes[f"{names.head}.bias"] = (spec.vocab_size,)
    norms = [base + norm for norm in (names.embedding_norm, names.norm) if norm is not None]
    for layer in range(spec.num_layers):
        prefix = layer_prefix(spec, layer)
        shapes |= _linears(spec, layer, prefix) | _head_norms(spec, prefix)
        found = (names.attention_norm, names.attention_post_norm, names.mlp_norm, names.mlp_post_norm)
        norms += [prefix + norm for norm in found if norm is not None]
    for norm in norms:
        shapes[f"{norm}.weight"] = (hidden,)
        if spec.norm_bias:
            shapes[f"{norm}.bias"] = (hidden,)
    return shapes


def _linears(spec: ModelSpec, layer: int, prefix: str) -> Shapes:
    moe = moe_joints(spec, layer)
    modules = [module for joint in joints(spec, layer).values() for module in joint.modules]
    shapes: Shapes = {}
    for module in (*modules, *(moe.modules if moe else ())):
        size = (module.rows, module.columns)
        shapes[f"{prefix}{module.name}.weight"] = size[::-1] if spec.names.transposed else size
        if module.bias:
            shapes[f"{prefix}{module.name}.bias"] = (module.rows,)
    return shapes


def _head_norms(spec: ModelSpec, prefix: str) -> Shapes:
    shapes: Shapes = {}
    for name, heads in ((spec.names.q_norm, spec.num_heads), (spec.names.k_norm, spec.num_kv_heads)):
        stored: Shapes = {
            "head": {name: (spec.head_dim,)},
            "heads": {name: (heads, spec.head_dim)},
            "listed": {f"{name}.norms.{i}": (spec.head_dim,) for i in range(heads)},
            "row": {name: (heads * spec.head_dim,)},
            None: {},
        }[spec.qk_norm]
        for norm, size in stored.items():
            shapes[f"{prefix}{norm}.weight"] = size
            if spec.qk_norm_bias:
                shapes[f"{prefix}{norm}.bias"] = size
    return shapes


class Checkpoint:
    """The safetensors of one model directory, memory-mapped: one file, or an index over several."""

    def __init__(self, directory: Path, base: str = "") -> None:
        """Open all files. Raises ModelInvalid naming the file that is missing, cut short or not valid.

        ``base``: begins the names of a model with a head; where no name does, the model was saved without
        one, and its tensors are known as if they had it.
        """
        self.directory = directory
        self._files: dict[str, Any] = {}
        single = directory / "model.safetensors"
        index = directory / "model.safetensors.index.json"
        if single.exists():
            self._where = dict.fromkeys(self._open(single), single.name)
        elif index.exists():
            self._where = _read_index(index)
            for file in sorted(set(self._where.values())):
                placed = {name for name, where in self._where.items() if where == file}
                if lost := sorted(placed - self._open(directory / file)):
                    raise ModelInvalid(
                        f"{directory / file} lacks tensor {lost[0]!r}, which the index places there"
                    )
        else:
            raise ModelInvalid(f"{directory} holds neither {single.name} nor {index.name}")
        self.loading = Loading([directory / name for name in self._files])
        bare = base and not any(name.startswith(base) for name in self._where)
        self._stored = {base + name if bare and name not in HEADS else name: name for name in self._where}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._stored)

    def verify(self, expected: Shapes, *, tied: bool) -> None:
        """Raise ModelInvalid unless the checkpoint holds exactly ``expected``, by name and shape.

        A tied model may carry a redundant head; it is not read.
        """
        self.verify_stored({name: Stored(shape) for name, shape in expected.items()}, tied=tied)

    def verify_stored(self, expected: Mapping[str, Stored], *, tied: bool) -> frozenset[str]:
        """The same for tensors in any number format; which of them are there, for some are optional."""
        present = {name for name in self._stored if not name.endswith(HARMLESS_SUFFIXES)}
        if tied:
            present -= set(HEADS)
        wanted = {name for name, stored in expected.items() if not stored.optional}
        if missing := sorted(wanted - present):
            raise self._invalid("lacks", missing)
        if unexpected := sorted(present - expected.keys()):
            raise self._invalid("holds unexpected", unexpected)
        for name, stored in expected.items():
            if name in present:
                self._compare(name, stored)
        return frozenset(present & expected.keys())

    def _compare(self, name: str, stored: Stored) -> None:
        file, stored_name = self._place(name)
        piece = file.get_slice(stored_name)
        found, kind = tuple(cast("list[int]", piece.get_shape())), str(piece.get_dtype())
        if stored.shape is not None and found not in (stored.shape, *stored.also):
            raise ModelInvalid(
                f"{self.directory}: tensor {name!r} is {list(found)}, the config says {list(stored.shape)}"
            )
        if kind not in stored.kinds:
            *most, last = sorted(stored.kinds)
            supported = f"{', '.join(most)} and {last} are" if most else f"{last} is"
            raise ModelInvalid(f"{self.directory}: tensor {name!r} is {kind}; {supported} supported")

    def tensor(self, name: str, dtype: torch.dtype, device: torch.device, *, copy: bool = True) -> Tensor:
        """A private copy: the file may be replaced afterwards. Without ``copy`` maybe its own pages."""
        return self._mapped(name).to(device=device, dtype=dtype, copy=copy)

    def part(
        self, name: str, dim: int, runs: Sequence[range], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A private copy of ``runs`` of dimension 0 or 1, one after another; the rest is not read."""
        try:
            file, stored_name = self._place(name)
            piece = file.get_slice(stored_name)
            cuts = [slice(run.start, run.stop) for run in runs]
            found: list[Tensor] = [piece[cut] if dim == 0 else piece[:, cut] for cut in cuts]
        except SafetensorError as exc:
            raise ModelInvalid(f"{self.directory}: tensor {name!r} cannot be read: {exc}") from exc
        whole = found[0] if len(found) == 1 else torch.cat(found, dim)
        self.loading.add(whole.nbytes)
        return whole.to(device=device, dtype=dtype, copy=True).contiguous()

    def stored(self, name: str, device: torch.device) -> Tensor:
        """A private copy in the number format of the file."""
        return self._mapped(name).to(device=device, copy=True)

    def _mapped(self, name: str) -> Tensor:
        try:
            file, stored_name = self._place(name)
            found: Tensor = file.get_tensor(stored_name)
        except SafetensorError as exc:
            raise ModelInvalid(f"{self.directory}: tensor {name!r} cannot be read: {exc}") from exc
        self.loading.add(found.nbytes)
        return found

    def _place(self, name: str) -> tuple[Any, str]:
        """The open file that holds a tensor, and what it is called there."""
        stored = self._stored[name]
        return self._files[self._where[stored]], stored

    def _open(self, path: Path) -> set[str]:
        """Keep the file open; the names it holds."""
        try:
            handle: Any = safe_open(path, framework="pt")
        except FileNotFoundError as exc:
            raise ModelInvalid(f"{path} is missing: a half-written model?") from exc
        except (SafetensorError, OSError) as exc:
            raise ModelInvalid(f"{path} is not a whole safetensors file: {exc}") from exc
        self._files[path.name] = handle
        return set(cast("list[str]", handle.keys()))

    def _invalid(self, verb: str, names: list[str]) -> ModelInvalid:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ModelInvalid(
            f"{self.directory}: the checkpoint {verb} {', '.join(map(repr, names[:3]))}{more}"
        )


def _read_index(path: Path) -> dict[str, str]:
    """``weight_map`` of an index file: tensor name → file name beside the index."""
    try:
        found = json.loads(path.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ModelInvalid(f"{path} is not a safetensors index: {exc!r}") from exc
    if not isinstance(found, dict) or not found:
        raise ModelInvalid(f"{path}: weight_map is empty")
    places = cast("dict[str, Any]", found)
    for name, file in places.items():
        if not isinstance(file, str) or Path(file).name != file:  # no way out of the model directory
            raise ModelInvalid(f"{path}: tensor {name!r} is placed in {file!r}, expected a plain file name")
    return places
