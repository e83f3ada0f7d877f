"""Turn a Llama-architecture GGUF file into an ordinary model directory: what Hugging Face calls a checkpoint.

Written: ``model.safetensors`` in bf16, ``config.json``, ``generation_config.json``, ``tokenizer.json`` and
``tokenizer_config.json`` with the chat template. Nothing of the result depends on GGUF any more.
"""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..schemas.errors import ModelInvalid
from .gguf import Floats, GgufFile, Metadata, tensor
from .gguf_tokenizer import tokenizer_of

Progressed = Callable[[int, int], None]

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def convert(source: Path, target: Path, progressed: Progressed | None = None) -> None:
    """Write the model directory of the GGUF file ``source`` into the existing directory ``target``.

    ``progressed(done, total)`` is called as tensors are written. Files are flushed to disk. Raises
    ModelInvalid when the file is not a Llama-architecture model with a byte-level BPE tokenizer.
    """
    with GgufFile(source) as gguf:
        metadata = gguf.metadata
        if metadata.get("general.architecture") != "llama":
            raise ModelInvalid(
                f"{source}: architecture {metadata.get('general.architecture')}; llama is known"
            )
        try:
            config = _config(metadata, tied="output.weight" not in gguf.tensors)
            tokens: list[str] = metadata["tokenizer.ggml.tokens"]
            files = {
                "config.json": config,
                "generation_config.json": _generation_config(metadata),
                "tokenizer.json": tokenizer_of(source, metadata),
                "tokenizer_config.json": _tokenizer_config(metadata, tokens),
            }
        except (KeyError, IndexError) as exc:
            raise ModelInvalid(f"{source}: metadata lacks {exc}") from exc
        for name, content in files.items():
            write_json(target / name, content)
        _write_safetensors(target / "model.safetensors", gguf, config, progressed)


def write_json(path: Path, content: Any) -> None:
    """Write and flush to disk: on return a power cut cannot empty the file."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _config(metadata: Metadata, *, tied: bool) -> dict[str, Any]:
    heads = metadata["llama.attention.head_count"]
    theta = metadata["llama.rope.freq_base"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "dtype": "bfloat16",
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "hidden_size": metadata["llama.embedding_length"],
        "initializer_range": 0.02,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "max_position_embeddings": metadata["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", heads),
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        # A float32 in the file: the shortest decimal that rounds to it (1e-05, not 9.9999997e-06) is what
        # was meant.
        "rms_norm_eps": float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "vocab_size": metadata["llama.vocab_size"],
    }


def _generation_config(metadata: Metadata) -> dict[str, Any]:
    return {
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _tokenizer_config(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    return {
        "add_prefix_space": False,
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "chat_template": metadata["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "model_max_length": metadata["llama.context_length"],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
    }


def _weights(gguf: GgufFile, config: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(name in the file, name to write, heads to unpermute or 0), in the order of the file."""
    for name in gguf.tensors:
        parts = name.split(".")
        heads = 0
        if parts[0] == "blk" and len(parts) == 4 and parts[2] in LAYER_NAMES and parts[3] == "weight":
            heads = {
                "attn_q": int(config["num_attention_heads"]),
                "attn_k": int(config["num_key_value_heads"]),
            }.get(parts[2], 0)
            yield name, f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight", heads
        elif len(parts) == 2 and parts[0] in TOP_NAMES and parts[1] == "weight":
            yield name, f"{TOP_NAMES[parts[0]]}.weight", heads
        elif name != "rope_freqs.weight":
            raise ModelInvalid(f"{gguf.path}: unknown tensor {name}")


def _unpermuted(weight: Floats, heads: int) -> Floats:
    """Undo llama.cpp's interleaving of each head's two rotary halves: rows (d, half) back to (half, d)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def to_bf16(values: Floats) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even. Finite values only."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _write_safetensors(
    path: Path, gguf: GgufFile, config: dict[str, Any], progressed: Progressed | None
) -> None:
    """One tensor in memory at a time. Format: length of the header, header in JSON, the data end to end."""
    weights = sorted(_weights(gguf, config), key=lambda each: each[1])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for source, name, _ in weights:
        shape = gguf.tensors[source].shape
        size = int(np.prod(shape)) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for done, (source, _, heads) in enumerate(weights, start=1):
            values = tensor(gguf, source)
            file.write(to_bf16(_unpermuted(values, heads) if heads else values).tobytes())
            if progressed is not None:
                progressed(done, len(weights))
        file.flush()
        os.fsync(file.fileno())
