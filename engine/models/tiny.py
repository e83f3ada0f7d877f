"""Tiny models with random weights, written as ordinary model directories: real arithmetic for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]  (PathLike is bare there)

from ..weights import expected_tensors
from .config import Config
from .families import from_hf

VOCAB = 288
"""Every byte, and room for a few special tokens."""
BOS, EOS = 256, 257

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "dtype": "float32",
}
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 24, "head_dim": 16},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
}
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tiny(
    directory: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    shards: int = 1,
    tokenizer: bool = False,
    **config: Any,
) -> Path:
    """Write a model of ``family`` with random weights into ``directory``; ``config`` overrides fields.

    ``shards`` > 1 splits the weights over files with an index. ``tokenizer`` adds a byte-level one (ids 0–255
    are the bytes) with a chat template. The same arguments write the same bytes. Returns ``directory``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    values = {"model_type": family, **_BASE, **_FAMILY[family], **config}
    (directory / "config.json").write_text(json.dumps(values, indent=1))
    spec = from_hf(Config(values, "tiny"))
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in expected_tensors(spec).items():
        noise = torch.randn(shape, generator=generator)
        # Scores well apart, and no layer that drowns the others: outputs then depend on every weight.
        tensors[name] = (
            1 + 0.2 * noise
            if name.endswith("norm.weight")
            else noise * (2.0 if len(shape) == 1 else 1.5) / shape[-1] ** 0.5
        )
    _save(directory, tensors, shards)
    if tokenizer:
        _write_tokenizer(directory)
    return directory


def _save(directory: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    places: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from ..token_pieces import ALPHABET

    tokenizer = Tokenizer(models.BPE(vocab=ALPHABET, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    added = [AddedToken(text, special=True, normalized=False) for text in specials]
    tokenizer.add_special_tokens(added)  # pyright: ignore[reportUnknownMemberType]  (untyped list there)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": _CHAT_TEMPLATE,
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
