"""Which model types we run ourselves, and how each one's config.json becomes a ModelSpec.

The four families share their tensor names, so that one weight map (``weights.py``) serves them all: what is
absent from a spec (biases, head norms, an untied head) is absent from the list of expected tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from .config import Config
from .spec import ModelSpec


def llama(config: Config) -> ModelSpec:
    """Llama 2 and 3, SmolLM2, and the many models published under their architecture."""
    bias = config.boolean("attention_bias", False)
    return _spec(config, qkv_bias=bias, output_bias=bias, mlp_bias=config.boolean("mlp_bias", False))


def mistral(config: Config) -> ModelSpec:
    """Mistral: every layer sees the last ``sliding_window`` positions, unless that is null."""
    window = config.optional_integer("sliding_window", 4096)
    return _spec(config, windows=(window,) * config.integer("num_hidden_layers"))


def qwen2(config: Config) -> ModelSpec:
    """Qwen2 and Qwen2.5: biases on q, k and v, none on the output."""
    return _spec(config, qkv_bias=True, windows=_qwen_windows(config))


def qwen3(config: Config) -> ModelSpec:
    """Qwen3: a norm on each query and key head, head_dim independent of hidden_size."""
    bias = config.boolean("attention_bias", False)
    return _spec(
        config,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm=True,
        windows=_qwen_windows(config),
        head_dim=config.integer("head_dim", 128),
    )


FAMILIES: dict[str, Callable[[Config], ModelSpec]] = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
}


def from_hf(config: Config) -> ModelSpec:
    """The spec of any supported config. Raises ModelInvalid naming the field or the model type."""
    kind = config.text("model_type")
    if kind not in FAMILIES:
        raise config.invalid(f"model_type {kind!r} is not supported; {', '.join(sorted(FAMILIES))} are")
    return FAMILIES[kind](config)


def _spec(
    config: Config,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    mlp_bias: bool = False,
    qk_norm: bool = False,
    windows: tuple[int | None, ...] | None = None,
    head_dim: int | None = None,
) -> ModelSpec:
    act = config.text("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise config.invalid(f"hidden_act {act!r} is not supported for this model type; silu is")
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.invalid(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    head_dim = head_dim or config.integer("head_dim", hidden // heads)
    layers = config.integer("num_hidden_layers")
    max_positions = config.integer("max_position_embeddings")
    return ModelSpec(
        family=config.text("model_type"),
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size"),
        norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=config.rope(head_dim, max_positions),
        max_positions=max_positions,
        tied_embeddings=config.boolean("tie_word_embeddings", False),
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        mlp_bias=mlp_bias,
        qk_norm=qk_norm,
        windows=windows or (None,) * layers,
        eos_token_ids=config.token_ids("eos_token_id"),
    )


def _qwen_windows(config: Config) -> tuple[int | None, ...]:
    """``layer_types`` where given, else the layers from ``max_window_layers`` on; none unless switched on."""
    layers = config.integer("num_hidden_layers")
    if not config.boolean("use_sliding_window", False):
        return (None,) * layers
    window = config.optional_integer("sliding_window", 4096)
    kinds = config.values.get("layer_types")
    if kinds is None:
        first = config.integer("max_window_layers", 28, least=0)
        return tuple(window if layer >= first else None for layer in range(layers))
    known = {"sliding_attention": window, "full_attention": None}
    if (
        not isinstance(kinds, list)
        or len(cast("list[Any]", kinds)) != layers
        or set(cast("list[Any]", kinds)) - set(known)
    ):
        raise config.invalid(f"layer_types must be {layers} of {', '.join(known)}")
    return tuple(known[kind] for kind in cast("list[str]", kinds))
