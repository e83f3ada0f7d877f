"""A GGUF file's metadata → config.json, for the architectures that the engine has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..schemas.errors import ModelInvalid
from ..schemas.gguf import GgufFile, Metadata

Values = dict[str, Any]
SLIDING, FULL = "sliding_attention", "full_attention"


class _Fields:
    """Metadata of the file's architecture."""

    def __init__(self, path: Path, metadata: Metadata, architecture: str) -> None:
        self._path, self._metadata, self._architecture = path, metadata, architecture

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise ModelInvalid(f"{self._path}: metadata lacks {self._architecture}.{name}")
        return value

    def get(self, name: str, default: Any = None) -> Any:
        value = self._metadata.get(f"{self._architecture}.{name}", default)
        # A float32 in the file: the shortest decimal that rounds to it is what was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value


def config_of(gguf: GgufFile) -> Values:
    """Raises ModelInvalid naming the architecture, the field or the kind of scaling that is not known."""
    metadata = gguf.metadata
    architecture = metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ModelInvalid(
            f"{gguf.path}: architecture {architecture!r} is not supported; {', '.join(ARCHITECTURES)} are"
        )
    fields = _Fields(gguf.path, metadata, architecture)
    if fields.get("expert_count"):
        raise ModelInvalid(f"{gguf.path}: experts in GGUF files ({architecture}) are not supported")
    if fields["block_count"] > len(gguf.tensors):  # before lists of that length are made
        raise ModelInvalid(f"{gguf.path}: {fields['block_count']:,} layers in {len(gguf.tensors):,} tensors")
    tokens = metadata.get("tokenizer.ggml.tokens") or ()
    ids = {
        f"{name}_token_id": metadata[key]
        for name, key in (
            ("bos", "tokenizer.ggml.bos_token_id"),
            ("eos", "tokenizer.ggml.eos_token_id"),
            ("pad", "tokenizer.ggml.padding_token_id"),
        )
        if key in metadata
    }
    heads = fields["attention.head_count"]
    common = {
        "model_type": architecture,
        "hidden_size": fields["embedding_length"],
        "intermediate_size": fields["feed_forward_length"],
        "num_hidden_layers": fields["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("attention.head_count_kv", heads),
        "max_position_embeddings": fields["context_length"],
        "vocab_size": fields.get("vocab_size", len(tokens)),
        "rope_theta": fields.get("rope.freq_base", 10_000.0),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "head_dim": fields.get("attention.key_length", fields["embedding_length"] // heads),
        **ids,
    }
    return common | _scaling(gguf, fields) | ARCHITECTURES[architecture](gguf, fields)


def _scaling(gguf: GgufFile, fields: _Fields) -> Values:
    kind = fields.get("rope.scaling.type", "none")
    if "rope_freqs.weight" in gguf.tensors:
        return {"rope_scaling": _llama3(gguf, fields)}
    if kind in ("none", ""):
        return {}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": "linear", "factor": fields["rope.scaling.factor"]}}
    if kind == "yarn":
        original = fields["rope.scaling.original_context_length"]
        scaling = {"rope_type": "yarn", "factor": fields["rope.scaling.factor"]}
        return {"rope_scaling": scaling | {"original_max_position_embeddings": original}}
    raise ModelInvalid(f"{gguf.path}: rope scaling {kind!r} is not supported; linear and yarn are")


def _llama3(gguf: GgufFile, fields: _Fields) -> Values:
    """Llama 3.1 and later: the file has what its formula made for each frequency. All of them have the same
    parameters but for the factor, which is the largest of these."""
    stored = np.frombuffer(gguf.raw("rope_freqs.weight"), dtype=np.float32)
    factor, low, high, original = float(stored.max()), 1.0, 4.0, 8192
    theta, count = float(fields.get("rope.freq_base", 10_000.0)), len(stored)
    turns = original / (2 * np.pi * theta ** (np.arange(count) / count))  # within the original length
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - smooth) / factor + smooth), stored, rtol=1e-3):
        raise ModelInvalid(f"{gguf.path}: rope_freqs.weight is not what Llama 3's formula gives")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _rms(fields: _Fields) -> Values:
    return {"rms_norm_eps": fields["attention.layer_norm_rms_epsilon"]}


def _llama(gguf: GgufFile, fields: _Fields) -> Values:
    """Llama, Mistral, SmolLM2, Yi and all that llama.cpp stores as such."""
    bias = {
        "attention_bias": "blk.0.attn_q.bias" in gguf.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in gguf.tensors,
    }
    return _rms(fields) | bias


def _qwen(_gguf: GgufFile, fields: _Fields) -> Values:
    return _rms(fields)


def _gemma(_gguf: GgufFile, fields: _Fields) -> Values:
    return _rms(fields)


def _gemma2(gguf: GgufFile, fields: _Fields) -> Values:
    layers, heads = fields["block_count"], fields["attention.head_count"]
    size = fields.get("attention.key_length", 256)
    # The file has the scale only through the model's size: 27B divides by hidden_size / heads.
    query = fields["embedding_length"] / heads if layers == 46 else size
    return _gemma(gguf, fields) | {
        "attn_logit_softcapping": fields.get("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": fields.get("final_logit_softcapping", 30.0),
        "sliding_window": fields["attention.sliding_window"],
        "query_pre_attn_scalar": query,
        "layer_types": [FULL if i % 2 else SLIDING for i in range(layers)],
    }


def _gemma3(gguf: GgufFile, fields: _Fields) -> Values:
    layers, heads = fields["block_count"], fields["attention.head_count"]
    query = fields["embedding_length"] / heads if layers == 62 else fields["attention.key_length"]
    return _gemma(gguf, fields) | {
        "model_type": "gemma3_text",
        "sliding_window": fields["attention.sliding_window"],
        "query_pre_attn_scalar": query,
        "layer_types": [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)],
        "rope_theta": fields.get("rope.freq_base", 1_000_000.0),
    }


def _phi3(gguf: GgufFile, fields: _Fields) -> Values:
    if "rope_factors_long.weight" in gguf.tensors:
        raise ModelInvalid(f"{gguf.path}: longrope's factors in a tensor are not supported")
    window = fields.get("attention.sliding_window") or None
    rotated = fields.get("rope.dimension_count")
    head_dim = fields["embedding_length"] // fields["attention.head_count"]
    return _rms(fields) | {
        "sliding_window": window,
        "partial_rotary_factor": (rotated or head_dim) / head_dim,
    }


def _starcoder2(_gguf: GgufFile, fields: _Fields) -> Values:
    return {"norm_epsilon": fields["attention.layer_norm_epsilon"], "use_bias": True, "sliding_window": None}


ARCHITECTURES: dict[str, Callable[[GgufFile, _Fields], Values]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "llama": _llama,
    "phi3": _phi3,
    "qwen2": _qwen,
    "qwen3": _qwen,
    "starcoder2": _starcoder2,
}
"""By llama.cpp's names."""
