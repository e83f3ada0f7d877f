"""Tiny LoRA adapters with random weights, written as PEFT writes them; no PEFT needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gristmill.engine.lora.adapter import places
from gristmill.engine.lora.config import load_config
from gristmill.engine.models.config import Config
from gristmill.engine.models.families import from_hf
from gristmill.engine.models.layout import layer_prefix
from safetensors.torch import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYWHERE = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def write_adapter(
    directory: Path,
    model: Path,
    *,
    seed: int = 0,
    targets: Sequence[str] | str = EVERYWHERE,
    rank: int = 4,
    strength: float = 1.0,
    **config: Any,
) -> Path:
    """An adapter for ``model`` that changes what it says; ``config`` overrides fields. Returns ``directory``.

    Which modules get weights, and of which rank, is what our own reading of the config says: PEFT disagrees
    loudly if that is wrong.
    """
    directory.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(model),
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.05,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "bias": "none",
        "inference_mode": True,
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(values))
    spec, read = from_hf(Config.load(model)), load_config(directory)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(spec.num_layers):
        for name, place in places(spec, layer).items():
            module = f"{layer_prefix(spec, layer)}{name}"
            if read.targets(module):
                r = read.rank(module)
                key = f"base_model.model.{module}"
                a = torch.randn(r, place.columns, generator=generator) / place.columns**0.5
                b = torch.randn(place.rows, r, generator=generator) * strength / r**0.5
                tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a, b
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory
