"""A GGUF file's weights for the decoder, as they are: quantized ones stay packed.

llama.cpp names tensors by their place whatever the family, so one table serves all. What it changes of the
weights when it converts them is undone here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...schemas.errors import ModelInvalid
from ...schemas.gguf import GgufFile, TensorInfo
from ..layers.linear import Linear
from ..models.config import Config
from ..models.layout import layer_prefix
from ..models.spec import ModelSpec
from ..weights import expected_tensors
from .gguf_blocks import FORMATS, grouped
from .grouped import Grouped
from .packed import side_by_side

FILE = "model.gguf"
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROTATED_PAIRWISE = ("llama", "granite")
"""Architectures whose queries and keys llama.cpp stores with the rotated pairs side by side."""
UNREAD = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Frequencies: config.json has what they were made of."""


class GgufWeights:
    """The file beside a config.json made from it; names and shapes are checked before anything is read."""

    stored_as = "gguf"

    def __init__(self, directory: Path, config: Config, spec: ModelSpec) -> None:
        """Raises ModelInvalid."""
        del config
        self._file, self._spec = GgufFile(directory / FILE), spec
        architecture = self._file.metadata.get("general.architecture")
        self._names = names(spec)
        self._pairwise = {
            name
            for name in self._names
            if architecture in ROTATED_PAIRWISE and _module(name).endswith(tuple(spec.names.qkv[:2]))
        }
        self._verify()

    def fetch(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor by its Hugging Face name; a quantized one is unpacked."""
        info = self._info(name)
        if info.layout.name in FORMATS:
            return self._grouped(name).dense(dtype).to(device)
        raw = torch.frombuffer(bytearray(self._file.raw(info.name)), dtype=DENSE[info.layout.name])
        values = raw.view(info.shape)
        if name in self._pairwise:
            values = values[_halves(info.shape[0], self._spec.head_dim)]
        if self._spec.norm_plus_one and _module(name).endswith("norm"):
            values = values.float() - 1  # llama.cpp stores the whole weight
        return values.to(device=device, dtype=dtype, copy=True)

    def lend(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.fetch(name, dtype, device)

    def layer(
        self, modules: Sequence[str], bias: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> Linear | None:
        """The modules' weights one above the other, as a layer. None: they are not quantized, or not all."""
        weights = [f"{module}.weight" for module in modules]
        if not all(self._info(name).layout.name in FORMATS for name in weights):
            return None
        return side_by_side([self._grouped(name).to(device) for name in weights], dtype, bias)

    def _grouped(self, name: str) -> Grouped:
        info = self._info(name)
        rows, columns = info.shape
        raw = torch.frombuffer(bytearray(self._file.raw(info.name)), dtype=torch.uint8)
        weight = grouped(info.layout.name, raw, rows, columns, info.layout.size_bytes)
        return weight.rows(_halves(rows, self._spec.head_dim)) if name in self._pairwise else weight

    def _info(self, name: str) -> TensorInfo:
        return self._file.tensors[self._names[name]]

    def _verify(self) -> None:
        path, stored = self._file.path, self._file.tensors
        wanted = set(self._names.values())
        tied = {"output.weight"} if self._spec.tied_embeddings else set[str]()
        if missing := sorted(wanted - stored.keys()):
            raise ModelInvalid(f"{path}: lacks {', '.join(missing[:3])}")
        if unexpected := sorted(stored.keys() - wanted - tied - {*UNREAD}):
            raise ModelInvalid(f"{path}: holds unexpected {', '.join(unexpected[:3])}")
        for name, shape in expected_tensors(self._spec).items():
            found = stored[self._names[name]].shape
            if found != shape:
                raise ModelInvalid(
                    f"{path}: tensor {self._names[name]} is {list(found)}, the config says {list(shape)}"
                )


def names(spec: ModelSpec) -> dict[str, str]:
    """Hugging Face name → llama.cpp's, for every tensor of the model."""
    here = spec.names
    top = {here.embedding: "token_embd", here.norm: "output_norm", here.positions: "position_embd"}
    qkv = ("attn_q", "attn_k", "attn_v") if len(here.qkv) == 3 else ("attn_qkv",)
    up = ("ffn_gate", "ffn_up") if len(here.up) == 2 else ("ffn_up",)
    layer: dict[str | None, str] = {
        here.attention_norm: "attn_norm",
        **dict(zip(here.qkv, qkv, strict=True)),
        here.q_norm: "attn_q_norm",
        here.k_norm: "attn_k_norm",
        here.output: "attn_output",
        here.attention_post_norm: "post_attention_norm",
        here.mlp_norm: "ffn_norm",
        **dict(zip(here.up, up, strict=True)),
        here.down: "ffn_down",
        here.mlp_post_norm: "post_ffw_norm",
    }
    modules = {f"{here.base}{ours}": theirs for ours, theirs in top.items() if ours is not None}
    modules[here.head] = "output"
    for index in range(spec.num_layers):
        prefix = layer_prefix(spec, index)
        modules |= {f"{prefix}{ours}": f"blk.{index}.{theirs}" for ours, theirs in layer.items() if ours}
    found: dict[str, str] = {}
    for name in expected_tensors(spec):
        module, _, leaf = name.rpartition(".")
        found[name] = f"{modules[module]}.{leaf}"
    return found


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _halves(rows: int, head_dim: int) -> Tensor:
    """Row of the file for each row of ours: within a head (d, half) there is (half, d) here."""
    at = torch.arange(rows).view(-1, head_dim // 2, 2)
    return at.transpose(1, 2).reshape(-1)
