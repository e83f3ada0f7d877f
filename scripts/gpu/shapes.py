"""Models by their shapes alone: configs of well-known ones, and weights drawn on the device, not read."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gristmill.engine.models.config import Config
from gristmill.engine.models.spec import ModelSpec
from gristmill.engine.weights import expected_tensors
from torch import Tensor

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}
QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
QWEN25_05B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 500,
    "eos_token_id": 501,
}


@dataclass(frozen=True)
class Shape:
    """A model without weights."""

    name: str
    config: dict[str, Any]

    def write(self, directory: Path) -> Path:
        """A model directory that has a config and nothing else."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(self.config))
        return directory


SHAPES = {"Llama-3.1-8B": LLAMA_8B, "Qwen3-0.6B": QWEN3_06B, "Qwen2.5-0.5B": QWEN25_05B}


def shape_of(name: str, *, tiny: bool) -> Shape:
    """``tiny``: the same family, as small as can be."""
    return Shape(name, SHAPES[name] | (TINY if tiny else {}))


class RandomWeights:
    """Stands in for a checkpoint: any tensor is drawn when it is asked for, where it is wanted."""

    stored_as = None

    def __init__(self, _directory: Path, _config: Config, spec: ModelSpec) -> None:
        self._shapes = expected_tensors(spec)

    def fetch(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Norms are ones; the rest has the size of a trained model's, so that numbers stay finite."""
        shape = self._shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02)

    def lend(self, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Each is drawn for whoever asks."""
        return self.fetch(name, dtype, device)

    def layer(
        self, modules: Sequence[str], bias: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        """No weight is quantized yet."""


@dataclass(frozen=True)
class Sizes:
    """What a step of a model moves and multiplies."""

    weights: int
    """Parameters of linears, the output layer included; the embedding table is looked up, not read."""
    kv_bytes: int
    """Of one token."""

    @classmethod
    def of(cls, config: dict[str, Any]) -> Sizes:
        hidden, layers = config["hidden_size"], config["num_hidden_layers"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        dim = config.get("head_dim", hidden // heads)
        attention = hidden * dim * (2 * heads + 2 * kv_heads)
        layer = attention + 3 * hidden * config["intermediate_size"]
        return cls(layers * layer + hidden * config["vocab_size"], 2 * layers * kv_heads * dim * 2)


@dataclass(frozen=True)
class Asked:
    """One request of a workload: this many tokens in, exactly this many out."""

    tokens_in: int
    tokens_out: int


def fixed(count: int, tokens_in: int, tokens_out: int) -> list[Asked]:
    return [Asked(tokens_in, tokens_out)] * count


def mixed(count: int, low: int, high: int, seed: int = 0) -> list[Asked]:
    """nano-vllm's benchmark: lengths evenly from ``low`` to ``high``, all inputs first, then outputs."""
    rng = random.Random(seed)
    inputs: list[int] = []
    for _ in range(count):
        inputs.append(rng.randint(low, high))
        for _ in range(inputs[-1]):  # its prompt is drawn from the same numbers
            rng.randint(0, 10_000)
    return [Asked(length, rng.randint(low, high)) for length in inputs]


@dataclass(frozen=True)
class Roofline:
    """The least time the device needs for a workload, from what it was measured to read and multiply."""

    bytes_s: float
    flops: float
    weight_bytes: float = 2.0
    """Of one parameter."""

    def seconds(self, sizes: Sizes, asked: Sequence[Asked], together: int) -> float:
        """Prompts cost their products. A step of ``together`` decodes costs its products or reading all
        weights, whichever is more, and each decoded token reading its own keys and values."""
        tokens_in = sum(one.tokens_in for one in asked)
        tokens_out = sum(one.tokens_out for one in asked)
        kv_read = sum(one.tokens_out * (one.tokens_in + one.tokens_out / 2) for one in asked) * sizes.kv_bytes
        steps = max(tokens_out / together, max(one.tokens_out for one in asked))
        products = 2 * sizes.weights / self.flops
        weights_s = steps * sizes.weights * self.weight_bytes / self.bytes_s
        return tokens_in * products + max(weights_s, tokens_out * products) + kv_read / self.bytes_s
