"""Which reader a model directory needs."""

from __future__ import annotations

from pathlib import Path

from ..models.config import Config
from ..models.spec import ModelSpec
from .gguf import FILE, GgufWeights
from .weights import ModelWeights


def stored_weights(directory: Path, config: Config, spec: ModelSpec) -> ModelWeights | GgufWeights:
    """The weights in the directory's safetensors, or in its GGUF file. Raises ModelInvalid."""
    if (directory / FILE).is_file():
        return GgufWeights(directory, config, spec)
    return ModelWeights(directory, config, spec)
