"""One model directory in, a quantized one out; a layer of it in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...schemas.errors import ModelInvalid, Unsupported
from ..models.config import Config
from ..models.families import from_hf
from ..models.layout import joints, layer_prefix
from ..models.spec import ModelSpec
from ..quant.method import quantization
from ..weights import Checkpoint, expected_tensors
from .layouts import Fp8Channels, Int8Channels, Layout
from .settings import LayoutName, QuantizeSettings
from .writer import CheckpointWriter, copy_companions, new_directory, refuse_existing, write_json

Report = Callable[[str, int, int], None]
"""Called with a stage, and how much of how much of it is done."""

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written."""

    path: str
    method: str
    plain_bytes: int
    quantized_bytes: int


def quantize(settings: QuantizeSettings, report: Report) -> Summary:
    """Write ``settings.out``. Raises ModelNotFound, ModelInvalid, Unsupported, Misconfigured."""
    refuse_existing(settings.out)
    source = Source(settings.model)
    layout = _layout(settings.method, source)
    with new_directory(settings.out) as scratch, torch.inference_mode():
        writer = CheckpointWriter(scratch)
        for index in range(source.spec.num_layers):
            report("layers", index, source.spec.num_layers)
            _write_layer(writer, layout, source.linears(index), source.layer(index))
        for name, tensor in source.others().items():
            writer.add(name, tensor)
        report("writing", 0, 0)
        writer.close()
        copy_companions(settings.model, scratch)
        values = source.raw_config | {"quantization_config": layout.quantization((source.spec.names.head,))}
        write_json(scratch / "config.json", values)
    return Summary(str(settings.out), settings.method, source.bytes_read, writer.total_bytes)


class Source:
    """A plain checkpoint of a family that can be quantized, read a layer at a time."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelNotFound, ModelInvalid, Unsupported."""
        self.config = Config.load(directory)
        self.spec: ModelSpec = from_hf(self.config)
        _refuse(self.config, self.spec)
        self._checkpoint = Checkpoint(directory, self.spec.names.base)
        self._expected = expected_tensors(self.spec)
        self._checkpoint.verify(self._expected, tied=self.spec.tied_embeddings)
        self.bytes_read = 0

    @property
    def raw_config(self) -> dict[str, Any]:
        """config.json as it is."""
        return json.loads(Path(self.config.source).read_bytes())

    def linears(self, index: int) -> list[str]:
        """Names of a layer's weights that are quantized."""
        prefix = layer_prefix(self.spec, index)
        modules = [module for joint in joints(self.spec, index).values() for module in joint.modules]
        return [f"{prefix}{module.name}.weight" for module in modules]

    def layer(self, index: int) -> dict[str, Tensor]:
        """A layer's tensors, as they are stored."""
        prefix = layer_prefix(self.spec, index)
        return {name: self._read(name) for name in self._expected if name.startswith(prefix)}

    def others(self) -> dict[str, Tensor]:
        """What belongs to no layer: embeddings, the last norm, the output layer."""
        layers = f"{self.spec.names.base}{self.spec.names.layers}."
        return {name: self._read(name) for name in self._expected if not name.startswith(layers)}

    @property
    def dtype(self) -> torch.dtype:
        """Of the first layer's first weight."""
        return self._checkpoint.stored(self.linears(0)[0], CPU).dtype

    def _read(self, name: str) -> Tensor:
        tensor = self._checkpoint.stored(name, CPU)
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor


def _refuse(config: Config, spec: ModelSpec) -> None:
    found = quantization(config)
    if found is not None:
        method = found.values.get("quant_method")
        raise ModelInvalid(f"{config.source}: quantized as {method} already; quantize the plain checkpoint")
    if spec.moe is not None:
        raise Unsupported(
            f"{config.source}: quantizing experts ({spec.family}) is not supported", param="model"
        )
    if spec.names.transposed:
        raise Unsupported(
            f"{config.source}: quantizing weights stored [in, out] ({spec.family}) is not supported",
            param="model",
        )


def _layout(method: LayoutName, source: Source) -> Layout:
    if method == "int8":
        return Int8Channels(source.dtype)
    return Fp8Channels(source.dtype)


def _write_layer(
    writer: CheckpointWriter, layout: Layout, linears: list[str], tensors: dict[str, Tensor]
) -> None:
    for name, tensor in tensors.items():
        if name not in linears:
            writer.add(name, tensor)
            continue
        module = name.removesuffix(".weight")
        for suffix, part in layout.parts(tensor.float()).items():
            writer.add(f"{module}.{suffix}", part)
