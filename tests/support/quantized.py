"""Tiny models whose linears are stored quantized, each beside its twin with the same numbers stored plainly.

The twin's weights come from the definition of the layout, one number at a time where that is what it says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.reference import Reference
from gristmill.engine.runner import Runner
from gristmill.engine.settings import EngineSettings
from safetensors.torch import load_file, save_file
from torch import Tensor

from .feeding import generate

Store = Callable[[str, Tensor], tuple[Mapping[str, Tensor], Tensor]]
"""A module's name and weight → what is stored for it, by suffix, and the weight that this means."""

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
PROMPT = [5, 99, 17, 200, 3, 42, 7]


def write_quantized(
    directory: Path, quantization: dict[str, Any], store: Store, **config: Any
) -> tuple[Path, Path]:
    """(quantized, plain): directories of two models that compute the same."""
    quantized = write_tiny(directory / "quantized", **{"family": "qwen2", **SHAPE, **config})
    tensors = load_file(quantized / "model.safetensors")
    plain = dict(tensors)
    for name in list(tensors):
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and ".layers." in name and tensors[name].dim() == 2:
            parts, plain[name] = store(module, tensors.pop(name))
            tensors |= {f"{module}.{suffix}": part.contiguous() for suffix, part in parts.items()}
    save_file(tensors, quantized / "model.safetensors")
    twin = write_tiny(directory / "plain", **{"family": "qwen2", **SHAPE, **config})
    save_file({name: each.contiguous() for name, each in plain.items()}, twin / "model.safetensors")
    reconfigure(quantized, quantization_config=quantization)
    return quantized, twin


def reconfigure(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def runner(directory: Path, **settings: Any) -> Runner:
    chosen = {"dtype": "float32", "attention": "torch", "max_batch_total_tokens": 256, **settings}
    return Runner(EngineSettings(model=str(directory), device="cpu", **chosen))


def spoken(directory: Path, **settings: Any) -> Tensor:
    """Logits of eight steps after ``PROMPT``."""
    return torch.stack(generate(runner(directory, **settings), [PROMPT], 8)[0].rows)


def assert_same_model(quantized: Path, plain: Path) -> None:
    """Unpacked on load bit for bit; packed, and with joined layers, within float32's rounding."""
    assert torch.equal(Reference(quantized).logits(PROMPT), Reference(plain).logits(PROMPT))
    torch.testing.assert_close(spoken(quantized), spoken(plain), rtol=1e-4, atol=1e-4)


def packed_along(fields: Tensor, bits: int) -> Tensor:
    """int32 [n * bits / 32, m] of integers [n, m]: down each column one stream of bits, lowest first."""
    n, m = fields.shape
    words = torch.empty(n * bits // 32, m, dtype=torch.int32)
    for column in range(m):
        stream = sum(int(field) << (bits * i) for i, field in enumerate(fields[:, column].tolist()))
        raw = stream.to_bytes(n * bits // 8, "little")
        words[:, column] = torch.frombuffer(bytearray(raw), dtype=torch.int32)
    return words
