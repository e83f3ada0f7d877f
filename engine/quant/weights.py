"""A model directory's weights for the decoder: dense ones by name, quantized ones as layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..kv_cache import available_bytes
from ..layers.linear import Linear
from ..models.config import Config
from ..models.spec import ModelSpec
from ..weights import Checkpoint, Stored, expected_tensors
from .awq import Awq
from .bnb import bitsandbytes
from .compressed import compressed_tensors
from .fp8 import Fp8Checkpoint
from .gptq import Gptq
from .method import Found, Method, Site, quantization
from .packed import Packed, side_by_side

METHODS: dict[str, Found] = {
    "awq": Awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "fbgemm_fp8": Fp8Checkpoint,
    "fp8": Fp8Checkpoint,
    "gptq": Gptq,
}


class ModelWeights:
    """The checkpoint of a model, checked by name, shape and number format before anything is loaded."""

    def __init__(self, directory: Path, config: Config, spec: ModelSpec) -> None:
        """Raises ModelInvalid."""
        self._checkpoint = Checkpoint(directory, spec.names.base)
        self.method = method_of(config)
        if self.method is not None and spec.names.transposed:
            raise config.invalid(f"{self.method.name} of weights stored [in, out] is not supported")
        expected = {name: Stored(shape) for name, shape in expected_tensors(spec).items()}
        self._sites: dict[str, Site] = {}
        if self.method is not None:
            self._find_sites(config, self.method, expected)
        self._names = self._checkpoint.verify_stored(expected, tied=spec.tied_embeddings)

    @property
    def stored_as(self) -> str | None:
        """The quantization that they are stored in. None: plain numbers."""
        return self.method.name if self.method else None

    def read_ahead(self, part: int, parts: int) -> None:
        """Have the files read beside what else is done; ``part`` of ``parts``: one of several processes."""
        # Half: on a CPU there will be a private copy of every weight besides.
        self._checkpoint.loading.read_ahead(available_bytes() // 2, part=part, parts=parts)

    def _find_sites(self, config: Config, method: Method, expected: dict[str, Stored]) -> None:
        """Replace, in ``expected``, the weights that are quantized by what is stored for them."""
        present = self._checkpoint.names
        for name, stored in list(expected.items()):
            module, _, leaf = name.rpartition(".")
            if leaf != "weight" or len(stored.shape or ()) != 2:
                continue
            if any(f"{module}.{mark}" in present for mark in method.marks):
                site = self._sites[module] = Site(module, *(stored.shape or ()))
                del expected[name]
                expected |= {f"{module}.{part}": each for part, each in method.tensors(site).items()}
        if not self._sites:
            raise config.invalid(
                f"quantization_config says {method.name}, and no tensor of the checkpoint is stored that way "
                f"(module.{method.marks[0]})"
            )

    def fetch(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor by its Hugging Face name; a quantized weight is unpacked."""
        module = name.removesuffix(".weight")
        if module in self._sites:
            return self.packed(module, device).dense(dtype)
        return self._checkpoint.tensor(name, dtype, device)

    def lend(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The same to look at: a dense weight may be the file's own pages."""
        if name.removesuffix(".weight") in self._sites:
            return self.fetch(name, dtype, device)
        return self._checkpoint.tensor(name, dtype, device, copy=False)

    def part(
        self, name: str, dim: int, runs: Sequence[range], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """``runs`` of one dimension of a tensor that is not quantized, one after another; no more is read."""
        return self._checkpoint.part(name, dim, runs, dtype, device)

    def quantized(self, modules: Sequence[str]) -> bool:
        """Whether all of them are."""
        return all(module in self._sites for module in modules)

    def packed(self, module: str, device: torch.device) -> Packed:
        """A quantized weight."""
        assert self.method is not None
        site = self._sites[module]
        names = {part: f"{module}.{part}" for part in self.method.tensors(site)}
        found = {
            part: self._checkpoint.stored(name, device) for part, name in names.items() if name in self._names
        }
        return self.method.read(site, found)

    def layer(
        self, modules: Sequence[str], bias: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> Linear | None:
        """The modules' weights one above the other, as a layer. None: they are not quantized, or not all."""
        if not self.quantized(modules):
            return None
        return side_by_side([self.packed(module, device) for module in modules], dtype, bias)


def method_of(config: Config) -> Method | None:
    """How the checkpoint is quantized. Raises ModelInvalid if that is not supported; None: it is not."""
    found = quantization(config)
    if found is None:
        return None
    name = found.text("quant_method")
    if name not in METHODS:
        raise found.invalid(f"quant_method {name!r} is not supported; {', '.join(sorted(METHODS))} are")
    return METHODS[name](config, found)
