"""One model directory in, a quantized one out; a layer of it in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import gcd, prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...schemas.errors import Misconfigured, ModelInvalid, Unsupported
from ..models.config import Config
from ..models.families import from_hf
from ..models.layout import joints, layer_prefix
from ..models.spec import ModelSpec
from ..quant.gguf import FILE as GGUF
from ..quant.method import quantization
from ..tokenizer import Tokenizer
from ..weights import Checkpoint, expected_tensors
from . import awq, calibration
from .layouts import NIBBLES, AwqGemm, Fp8Channels, Int8Channels, Layout, Parts
from .settings import QuantizeSettings
from .writer import CheckpointWriter, copy_companions, new_directory, refuse_existing, write_json

Report = Callable[[str, int, int], None]
"""Called with a stage, and how much of how much of it is done."""

CPU = torch.device("cpu")
GROUPS = (128, 64, 32)
"""The usual size first; kernels for this layout know all three."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written."""

    path: str
    method: str
    group_size: int | None
    plain_bytes: int
    quantized_bytes: int


def quantize(settings: QuantizeSettings, report: Report) -> Summary:
    """Write ``settings.out``. Raises ModelNotFound, ModelInvalid, Unsupported, Misconfigured."""
    refuse_existing(settings.out)
    source = Source(settings.model)
    with new_directory(settings.out) as scratch, torch.inference_mode():
        maker = _maker(settings, source, report)
        writer = CheckpointWriter(scratch)
        for index in range(source.spec.num_layers):
            report("layers", index, source.spec.num_layers)
            for name, tensor in maker.layer(index):
                writer.add(name, tensor)
        for name, tensor in source.others().items():
            writer.add(name, tensor)
        report("writing", 0, 0)
        writer.close()
        copy_companions(settings.model, scratch)
        values = source.raw_config | {
            "quantization_config": maker.layout.quantization((source.spec.names.head,))
        }
        write_json(scratch / "config.json", values)
    return Summary(str(settings.out), settings.method, maker.group, source.plain_bytes, writer.total_bytes)


class Maker(Protocol):
    """How a layer is quantized."""

    @property
    def layout(self) -> Layout: ...
    @property
    def group(self) -> int | None: ...

    def layer(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors that are stored for the layer. Called for each, in order."""
        ...


class Source:
    """A plain checkpoint of a family that can be quantized, read a layer at a time."""

    def __init__(self, directory: Path) -> None:
        """Raises ModelNotFound, ModelInvalid, Unsupported."""
        self.config = Config.load(directory)
        self.spec: ModelSpec = from_hf(self.config)
        _refuse(self.config, self.spec)
        if (directory / GGUF).is_file():
            raise ModelInvalid(
                f"{(directory / GGUF).resolve()}: a GGUF file; quantize the safetensors checkpoint it is of"
            )
        self._checkpoint = Checkpoint(directory, self.spec.names.base)
        self._expected = expected_tensors(self.spec)
        self._checkpoint.verify(self._expected, tied=self.spec.tied_embeddings)

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

    def embeddings(self) -> dict[str, Tensor]:
        """What a token is before the first layer."""
        names, base = self.spec.names, self.spec.names.base
        found = (names.embedding, names.positions, names.embedding_norm)
        modules = tuple(f"{base}{name}." for name in found if name is not None)
        return {name: self._read(name) for name in self._expected if name.startswith(modules)}

    def others(self) -> dict[str, Tensor]:
        """What belongs to no layer: embeddings, the last norm, the output layer."""
        layers = f"{self.spec.names.base}{self.spec.names.layers}."
        return {name: self._read(name) for name in self._expected if not name.startswith(layers)}

    @property
    def dtype(self) -> torch.dtype:
        """Of the first layer's first weight."""
        return self._checkpoint.stored(self.linears(0)[0], CPU).dtype

    @property
    def plain_bytes(self) -> int:
        """Of all tensors, in the number format of the first layer."""
        count = sum(prod(shape) for shape in self._expected.values())
        return count * self.dtype.itemsize

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.stored(name, CPU)


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


class RoundToNearest:
    """Each weight by itself."""

    group: int | None = None

    def __init__(self, layout: Layout, source: Source) -> None:
        self.layout, self._source = layout, source

    def layer(self, index: int) -> Iterator[tuple[str, Tensor]]:
        linears = self._source.linears(index)
        for name, tensor in self._source.layer(index).items():
            if name in linears:
                yield from _named(name, self.layout.parts(tensor.float()))
            else:
                yield name, tensor


class Awq:
    """Weights scaled, and clipped, by what a text shows of their inputs."""

    def __init__(self, settings: QuantizeSettings, source: Source, report: Report) -> None:
        report("calibrating", 0, 0)
        self.group = group_size(source, settings.group_size)
        self.layout = AwqGemm(self.group)
        self._source, self._clip = source, settings.clip
        self._device = _device(settings)
        tokenizer = Tokenizer(settings.model)
        text = settings.calibration or calibration.OURS
        found = calibration.sequences(text, tokenizer, settings.calibration_tokens, source.spec.max_positions)
        self._calibration = calibration.Calibration(source.spec, found, source.embeddings(), self._device)

    def layer(self, index: int) -> Iterator[tuple[str, Tensor]]:
        spec, linears = self._source.spec, self._source.linears(index)
        tensors = self._source.layer(index)
        seen = self._calibration.feed(index, tensors)
        for name in linears:
            tensors[name] = tensors[name].to(self._device, torch.float32)
        fed = awq.scale_layer(spec, index, tensors, seen, self.group)
        for name, tensor in tensors.items():
            if name in linears:
                clip = self._clip and awq.clips(spec, index, name)
                found = awq.rounded(tensor, fed[name], self.group, clip=clip)
                yield from _named(name, self.layout.packed(found))
            else:
                yield name, tensor


def group_size(source: Source, wanted: int | None) -> int:
    """Inputs that share a scale: what is wanted, or the largest of ``GROUPS``, that all linears divide into.

    Raises Misconfigured naming a linear that does not.
    """
    modules = [module for joint in joints(source.spec, 0).values() for module in joint.modules]
    for module in modules:
        if module.rows % NIBBLES:
            raise Misconfigured(
                f"method awq takes multiples of {NIBBLES} outputs, and {module.name} has {module.rows}; "
                "method int8 takes any"
            )
    common = gcd(*(module.columns for module in modules))
    fits = [size for size in GROUPS if common % size == 0]
    if wanted is None and fits:
        return fits[0]
    if wanted is not None and common % wanted == 0:
        return wanted
    size = wanted or GROUPS[-1]
    odd = next(module for module in modules if module.columns % size)
    hint = f"group size {' or '.join(map(str, fits))} does" if fits else "method int8 takes any"
    raise Misconfigured(f"{odd.name} has {odd.columns} inputs, which {size} does not divide; {hint}")


def _maker(settings: QuantizeSettings, source: Source, report: Report) -> Maker:
    if settings.method == "awq":
        return Awq(settings, source, report)
    layout = Int8Channels if settings.method == "int8" else Fp8Channels
    return RoundToNearest(layout(source.dtype), source)


def _device(settings: QuantizeSettings) -> torch.device:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise Misconfigured("device=cuda, and torch sees no CUDA device; use --device cpu")
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


def _named(weight: str, parts: Parts) -> Iterator[tuple[str, Tensor]]:
    module = weight.removesuffix(".weight")
    for suffix, part in parts.items():
        yield f"{module}.{suffix}", part
