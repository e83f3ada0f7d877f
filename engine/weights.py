"""safetensors files → tensors. Nothing is loaded before every name and shape has been checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..schemas.errors import ModelInvalid
from .models.spec import ModelSpec

HARMLESS_SUFFIX = ".rotary_emb.inv_freq"
"""Written by old transformers versions; worked out from the config instead."""

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
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes: Shapes = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (spec.q_size, hidden, spec.qkv_bias),
        "self_attn.k_proj": (spec.kv_size, hidden, spec.qkv_bias),
        "self_attn.v_proj": (spec.kv_size, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, spec.q_size, spec.output_bias),
        "mlp.gate_proj": (inner, hidden, spec.mlp_bias),
        "mlp.up_proj": (inner, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, inner, spec.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if spec.qk_norm:
        norms |= {"self_attn.q_norm": spec.head_dim, "self_attn.k_norm": spec.head_dim}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, columns, bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        for name, size in norms.items():
            shapes[f"{prefix}{name}.weight"] = (size,)
    return shapes


class Checkpoint:
    """The safetensors of one model directory, memory-mapped: one file, or an index over several."""

    def __init__(self, directory: Path) -> None:
        """Open all files. Raises ModelInvalid naming the file that is missing, cut short or not valid."""
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

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._where)

    def verify(self, expected: Shapes, *, tied: bool) -> None:
        """Raise ModelInvalid unless the checkpoint holds exactly ``expected``, by name and shape.

        A tied model may carry a redundant ``lm_head.weight``; it is not read.
        """
        self.verify_stored({name: Stored(shape) for name, shape in expected.items()}, tied=tied)

    def verify_stored(self, expected: Mapping[str, Stored], *, tied: bool) -> frozenset[str]:
        """The same for tensors in any number format; which of them are there, for some are optional."""
        present = {name for name in self._where if not name.endswith(HARMLESS_SUFFIX)}
        if tied:
            present.discard("lm_head.weight")
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
        piece = self._files[self._where[name]].get_slice(name)
        found, kind = tuple(cast("list[int]", piece.get_shape())), str(piece.get_dtype())
        if stored.shape is not None and found not in (stored.shape, *stored.also):
            raise ModelInvalid(
                f"{self.directory}: tensor {name!r} is {list(found)}, the config says {list(stored.shape)}"
            )
        if kind not in stored.kinds:
            *most, last = sorted(stored.kinds)
            supported = f"{', '.join(most)} and {last} are" if most else f"{last} is"
            raise ModelInvalid(f"{self.directory}: tensor {name!r} is {kind}; {supported} supported")

    def tensor(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A private copy of one tensor: the file may be replaced afterwards."""
        return self._mapped(name).to(device=device, dtype=dtype, copy=True)

    def stored(self, name: str, device: torch.device) -> Tensor:
        """A private copy in the number format of the file."""
        return self._mapped(name).to(device=device, copy=True)

    def _mapped(self, name: str) -> Tensor:
        try:
            return self._files[self._where[name]].get_tensor(name)
        except SafetensorError as exc:
            raise ModelInvalid(f"{self.directory}: tensor {name!r} cannot be read: {exc}") from exc

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
