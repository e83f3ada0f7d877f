"""An adapter's weights, joined the way the decoder's linears are joined, and how they are added to a step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...schemas.errors import AdapterInvalid
from ..layers.invariant import Make
from ..layers.linear import Linear
from ..models.layout import Joined, Joint, joints, layer_prefix
from ..models.spec import ModelSpec
from .config import AdapterConfig, load_config

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


Narrow = Callable[[Joined, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A linear's A [ranks, columns] and B [rows, ranks], in the decoder's order → this rank's part of them."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a Hugging Face module lies in one of the decoder's linears, before that is put in the decoder's
    order: rows ``first : first + rows``."""

    linear: Joined
    first: int
    rows: int
    columns: int


def places(spec: ModelSpec, layer: int) -> dict[str, Place]:
    """Every module of a layer that an adapter may change, by its name within the layer; experts are not."""
    found: dict[str, Place] = {}
    for linear, joint in joints(spec, layer).items():
        first = 0
        for module in joint.modules:
            found[module.name] = Place(linear, first, module.rows, module.columns)
            first += module.rows
    return found


@dataclass(frozen=True, slots=True)
class Part:
    """One adapted module: ``y[place] += x A^T B^T * scale`` with A [rank, columns] and B [rows, rank]."""

    module: str
    place: Place
    rank: int
    scale: float


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A checked adapter before any weight is read: what it changes, and what it will cost.

    The parts of one linear are joined: their A one under the other, their B in blocks on a diagonal, so that
    a layer needs two multiplications for each of its four linears, however many modules are adapted.
    """

    directory: Path
    parts: Mapping[tuple[int, Joined], Sequence[Part]]
    spec: ModelSpec

    @property
    def elements(self) -> int:
        """Numbers in all joined matrices."""
        return sum(
            sum(part.rank for part in parts) * (joint.rows + joint.columns)
            for (layer, linear), parts in self.parts.items()
            for joint in (joints(self.spec, layer)[linear],)
        )


@dataclass(frozen=True, slots=True)
class LowRank:
    """``up(down(x))`` is what a linear's output gains; the scale is in ``up`` already."""

    down: Linear
    up: Linear


class Adapter:
    """A loaded adapter. Immutable; the base model's weights are not touched."""

    def __init__(self, parts: Mapping[tuple[int, Joined], LowRank], digest: str) -> None:
        self._parts, self.digest = parts, digest

    def add(self, layer: int, linear: Joined, x: Tensor, y: Tensor) -> None:
        """Add to ``y``, the output of ``linear`` for the rows ``x``, what this adapter changes there."""
        part = self._parts.get((layer, linear))
        if part is not None:
            y += part.up(part.down(x))


def survey(directory: Path, spec: ModelSpec, max_rank: int) -> Blueprint:
    """Check config, names and shapes without reading a weight. Raises AdapterInvalid with what is wrong."""
    config = load_config(directory, spec.names.layers)
    shapes = _shapes(directory / WEIGHTS_FILE)
    parts: dict[tuple[int, Joined], list[Part]] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for layer in range(spec.num_layers):
        for name, place in places(spec, layer).items():
            module = f"{layer_prefix(spec, layer)}{name}"
            if config.targets(module):
                part = _part(config, module, place, directory, max_rank)
                parts.setdefault((layer, place.linear), []).append(part)
                a, b = _tensor_names(module)
                expected |= {a: (part.rank, place.columns), b: (place.rows, part.rank)}
    _compare(directory, shapes, expected)
    return Blueprint(directory, parts, spec)


def load(
    blueprint: Blueprint, dtype: torch.dtype, device: torch.device, make: Make, narrow: Narrow | None = None
) -> Adapter:
    """Read the weights. Raises AdapterInvalid if they are not what ``survey`` saw, or not all numbers.

    ``narrow``: what of them is wanted here. None: all.
    """
    path = blueprint.directory / WEIGHTS_FILE
    loaded: dict[tuple[int, Joined], LowRank] = {}
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        with torch.inference_mode(), safe_open(path, framework="pt") as opened:  # pyright: ignore[reportUnknownVariableType]
            for (layer, linear), parts in blueprint.parts.items():
                down, up = _join(opened, parts, joints(blueprint.spec, layer)[linear])
                if not (down.isfinite().all() and up.isfinite().all()):
                    raise AdapterInvalid(
                        f"{path}: {parts[0].module} or its neighbours hold values that are no numbers"
                    )
                if narrow is not None:
                    down, up = narrow(linear, down, up)
                pair = (make(matrix.to(device=device, dtype=dtype), None) for matrix in (down, up))
                loaded[layer, linear] = LowRank(*pair)
    except (SafetensorError, OSError) as exc:
        raise AdapterInvalid(f"{path} cannot be read: {exc}") from exc
    digest.update((blueprint.directory / "adapter_config.json").read_bytes())
    return Adapter(loaded, digest.hexdigest())


def _join(opened: Any, parts: Sequence[Part], joint: Joint) -> tuple[Tensor, Tensor]:
    """float32: all A [ranks, columns], and all B, scaled, in their blocks of [rows, ranks]."""
    ranks = sum(part.rank for part in parts)
    down, up = torch.empty(ranks, joint.columns), torch.zeros(joint.rows, ranks)
    at = 0
    for part in parts:
        a, b = (cast("Tensor", opened.get_tensor(name)).float() for name in _tensor_names(part.module))
        down[at : at + part.rank] = a
        up[part.place.first : part.place.first + part.place.rows, at : at + part.rank] = b * part.scale
        at += part.rank
    return down, up if joint.order is None else up[torch.tensor(joint.order)]


def _part(config: AdapterConfig, module: str, place: Place, directory: Path, max_rank: int) -> Part:
    rank = config.rank(module)
    if rank > max_rank:
        raise AdapterInvalid(
            f"{directory}: rank {rank} of {module} is above lora_max_rank ({max_rank}); raise that"
        )
    return Part(module, place, rank, config.scale(module))


def _tensor_names(module: str) -> tuple[str, str]:
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.exists() and path.with_suffix(".bin").exists():
        raise AdapterInvalid(
            f"{path.with_suffix('.bin')} is a pickle, which may run code; save it as safetensors"
        )
    try:
        with safe_open(path, framework="pt") as opened:  # pyright: ignore[reportUnknownVariableType]
            file = cast("Any", opened)
            slices = {name: file.get_slice(name) for name in cast("list[str]", file.keys())}
            odd = {
                name: s.get_dtype()
                for name, s in slices.items()
                if s.get_dtype() not in ("BF16", "F16", "F32")
            }
            if odd:
                raise AdapterInvalid(f"{path}: tensor types {odd} are not supported; BF16, F16 and F32 are")
            return {name: tuple(cast("list[int]", s.get_shape())) for name, s in slices.items()}
    except FileNotFoundError as exc:
        raise AdapterInvalid(f"{path} is missing") from exc
    except (SafetensorError, OSError) as exc:
        raise AdapterInvalid(f"{path} is not a whole safetensors file: {exc}") from exc


def _compare(
    directory: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise AdapterInvalid unless the file holds exactly what the config promises for this model."""
    if not expected:
        raise AdapterInvalid(f"{directory}: target_modules match no linear of this model's layers")
    if unexpected := sorted(found.keys() - expected.keys()):
        raise AdapterInvalid(
            f"{directory} holds {unexpected[0]!r} ({len(unexpected)} such), which is no adapted linear of "
            "this model's layers: made for another model, or with embeddings, a head or magnitudes, which "
            "are not supported"
        )
    if missing := sorted(expected.keys() - found.keys()):
        raise AdapterInvalid(f"{directory} lacks {missing[0]!r} ({len(missing)} such)")
    for name, shape in expected.items():
        if found[name] != shape:
            raise AdapterInvalid(
                f"{directory}: {name!r} is {list(found[name])}, config and model say {list(shape)}"
            )
