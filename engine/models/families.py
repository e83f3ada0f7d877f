"""Which model types we run ourselves, and how each one's config.json becomes a ModelSpec.

A family is what it changes of Llama: knobs of the spec, and names of tensors. A field that its function does
not read is ignored, so what changes the arithmetic and is not done is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .config import Config
from .layout import CODEGEN_SHARDS
from .spec import Activation, ModelSpec, MoeSpec, Names, RopeSpec

Windows = tuple[int | None, ...]

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""By the names that transformers gives them."""
SLIDING, FULL = "sliding_attention", "full_attention"


def llama(config: Config) -> ModelSpec:
    """Llama 1 to 3, SmolLM2, Yi, DeepSeek's dense ones: many are published under this architecture."""
    bias = config.boolean("attention_bias", False)
    return _spec(config, qkv_bias=bias, output_bias=bias, mlp_bias=config.boolean("mlp_bias", False))


def smollm3(config: Config) -> ModelSpec:
    """SmolLM3: every fourth layer without positions."""
    config = config.otherwise(tie_word_embeddings=True, rope_theta=2_000_000.0)
    layers = config.integer("num_hidden_layers")
    interval = config.integer("no_rope_layer_interval", 4)
    turning: list[Any] = config.values.get("no_rope_layers") or [(i + 1) % interval for i in range(layers)]
    if len(turning) != layers:
        raise config.invalid(f"no_rope_layers has {len(turning)} entries for {layers} layers")
    rope = _rope(config)
    return replace(
        llama(config),
        ropes=tuple(rope if turn else None for turn in turning),
        windows=_layer_windows(config) if config.boolean("use_sliding_window", False) else (None,) * layers,
    )


def mistral(config: Config) -> ModelSpec:
    """Mistral: every layer sees the last ``sliding_window`` positions, unless that is null."""
    return _spec(config, windows=_all_windows(config, 4096))


def mixtral(config: Config) -> ModelSpec:
    """Mixtral: Mistral with experts."""
    config = config.otherwise(norm_eps=1e-5, rope_theta=1_000_000.0)
    moe = MoeSpec(
        layers=(True,) * config.integer("num_hidden_layers"),
        experts=config.integer("num_experts", 8),
        chosen=config.integer("num_experts_per_tok", 2),
        intermediate_size=config.integer("intermediate_size"),
        normalised=True,
        block="block_sparse_moe",
        up=("w1", "w3"),
        down="w2",
    )
    return _spec(config, windows=_all_windows(config), moe=moe)


def qwen2(config: Config) -> ModelSpec:
    """Qwen2 and Qwen2.5: biases on q, k and v, none on the output."""
    return _spec(config, qkv_bias=True, windows=_qwen_windows(config))


def qwen3(config: Config) -> ModelSpec:
    """Qwen3: a norm on each query and key head, head_dim independent of hidden_size."""
    bias = config.boolean("attention_bias", False)
    config = config.otherwise(head_dim=128)
    return _spec(config, qkv_bias=bias, output_bias=bias, qk_norm="head", windows=_qwen_windows(config))


def qwen2_moe(config: Config) -> ModelSpec:
    """Qwen1.5 and 2 with experts, and one that every token goes through."""
    if config.boolean("use_sliding_window", False) and config.values.get("layer_types") is None:
        raise config.invalid("use_sliding_window without layer_types is not supported for this model type")
    shared = config.integer("shared_expert_intermediate_size", 5632, least=0)
    return _spec(
        config,
        qkv_bias=config.boolean("qkv_bias", True),
        windows=_qwen_windows(config),
        moe=_qwen_moe(config, shared),
    )


def qwen3_moe(config: Config) -> ModelSpec:
    """Qwen3 with experts."""
    bias = config.boolean("attention_bias", False)
    window = _all_windows(config, 4096) if config.boolean("use_sliding_window", False) else None
    return _spec(
        config,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="head",
        windows=window,
        moe=_qwen_moe(config, shared=0),
    )


def phi3(config: Config) -> ModelSpec:
    """Phi-3 and Phi-4: fused matrices, and for long contexts frequencies found by search (longrope)."""
    names = Names(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",))
    config = config.otherwise(norm_eps=1e-5)
    return _spec(config, names=names, windows=_all_windows(config))


def granite(config: Config) -> ModelSpec:
    """Granite 3: Llama with four multipliers."""
    return replace(
        llama(config),
        embedding_scale=config.number("embedding_multiplier", 1.0),
        attention_scale=config.number("attention_multiplier", 1.0),
        residual_scale=config.number("residual_multiplier", 1.0),
        logit_scale=1 / config.number("logits_scaling", 1.0),
    )


def olmo2(config: Config) -> ModelSpec:
    """OLMo 2: what a half-layer adds is normed, not what it reads; queries and keys over all heads."""
    bias = config.boolean("attention_bias", False)
    names = Names(
        attention_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_post_norm="post_feedforward_layernorm",
    )
    return _spec(config.otherwise(norm_eps=1e-5), names=names, qkv_bias=bias, output_bias=bias, qk_norm="row")


def gemma(config: Config, **knobs: Any) -> ModelSpec:
    """Gemma: norms that store their weight less one, scaled embeddings, GeGLU."""
    config.only("use_bidirectional_attention", False)
    config = config.otherwise(tie_word_embeddings=True, head_dim=256, hidden_act="gelu_pytorch_tanh")
    bias = config.boolean("attention_bias", False)
    return _spec(
        config,
        qkv_bias=bias,
        output_bias=bias,
        norm_plus_one=True,
        embedding_scale=math.sqrt(config.integer("hidden_size")),
        activation=_gemma_activation(config),
        **knobs,
    )


def gemma2(config: Config, **knobs: Any) -> ModelSpec:
    """Gemma 2: norms before and after each half-layer, capped scores and logits, every other one sliding."""
    knobs = {"softcap": _cap(config, "attn", 50.0), "logit_softcap": _cap(config, "final", 30.0)} | knobs
    names = Names(
        attention_post_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    )
    return gemma(
        config,
        names=names,
        attention_scale=config.number("query_pre_attn_scalar", 256) ** -0.5,
        **{"windows": _layer_windows(config, every=2)} | knobs,
    )


def gemma3(config: Config) -> ModelSpec:
    """Gemma 3's text models: norms on each head instead of caps, five of six layers sliding, with a base of
    rotation of their own."""
    windows = _layer_windows(config, every=config.integer("sliding_window_pattern", 6))
    nested = config.part("rope_parameters")
    far = _rope(config.otherwise(rope_theta=1_000_000.0), FULL)
    near = RopeSpec(config.number("rope_local_base_freq", 10_000.0))
    if nested and SLIDING in nested.values:
        near = _rope(config, SLIDING)
    return gemma2(
        config,
        qk_norm="head",
        windows=windows,
        ropes=tuple(near if window else far for window in windows),
        softcap=_cap(config, "attn"),
        logit_softcap=_cap(config, "final"),
    )


def cohere(config: Config, **knobs: Any) -> ModelSpec:
    """Command-R: attention and MLP side by side, layer norms without bias, neighbours rotated."""
    config = config.otherwise(
        tie_word_embeddings=True,
        norm_eps=1e-5,
        rope_theta=500_000.0 if config.values.get("model_type") == "cohere" else 10_000.0,
    )
    bias = config.boolean("attention_bias", False)
    rope = replace(_rope(config), interleaved=True)
    return _spec(
        config,
        names=Names(mlp_norm=None),
        norm="layer",
        parallel=True,
        qkv_bias=bias,
        output_bias=bias,
        qk_norm="heads" if config.boolean("use_qk_norm", False) else None,
        logit_scale=config.number("logit_scale", 0.0625),
        **{"ropes": (rope,) * config.integer("num_hidden_layers")} | knobs,
    )


def cohere2(config: Config) -> ModelSpec:
    """Command-R7B and Command-A: three sliding layers with positions, then a full one without."""
    windows = _layer_windows(config, every=config.integer("sliding_window_pattern", 4))
    rope = replace(_rope(config), interleaved=True)
    return cohere(config, windows=windows, ropes=tuple(rope if window else None for window in windows))


def stablelm(config: Config) -> ModelSpec:
    """StableLM 2: layer norms, a quarter of each head rotated."""
    config = config.otherwise(norm_eps=1e-5, partial_rotary_factor=0.25)
    parallel = config.boolean("use_parallel_residual", False)
    names = Names(q_norm="self_attn.q_layernorm", k_norm="self_attn.k_layernorm")
    return _spec(
        config,
        names=replace(names, mlp_norm=None) if parallel else names,
        parallel=parallel,
        norm="layer",
        norm_bias=True,
        qkv_bias=config.boolean("use_qkv_bias", False),
        qk_norm="listed" if config.boolean("qk_layernorm", False) else None,
    )


def starcoder2(config: Config) -> ModelSpec:
    """StarCoder2: layer norms, biases everywhere, an MLP without gate."""
    config = config.otherwise(norm_eps=1e-5, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True)
    return _plain(
        config,
        Names(up=("mlp.c_fc",), down="mlp.c_proj"),
        config.boolean("use_bias", True),
        windows=_all_windows(config),
    )


def phi(config: Config) -> ModelSpec:
    """Phi-1, 1.5 and 2: attention and MLP side by side, half of each head rotated."""
    config = config.otherwise(norm_eps=1e-5, hidden_act="gelu_new", partial_rotary_factor=0.5)
    names = Names(
        norm="final_layernorm",
        output="self_attn.dense",
        mlp_norm=None,
        up=("mlp.fc1",),
        down="mlp.fc2",
        q_norm="self_attn.q_layernorm",
        k_norm="self_attn.k_layernorm",
    )
    normed = config.boolean("qk_layernorm", False)
    return _plain(
        config,
        names,
        parallel=True,
        head_bias=True,
        qk_norm="head" if normed else None,
        qk_norm_bias=normed,
    )


def gpt_neox(config: Config) -> ModelSpec:
    """GPT-NeoX and Pythia: side by side with a norm each; q, k, v fused head by head; a quarter rotated."""
    config = config.otherwise(norm_eps=1e-5, hidden_act="gelu", partial_rotary_factor=0.25)
    names = Names(
        base="gpt_neox.",
        embedding="embed_in",
        norm="final_layer_norm",
        head="embed_out",
        qkv=("attention.query_key_value",),
        output="attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
    )
    bias = config.boolean("attention_bias", True)
    parallel = config.boolean("use_parallel_residual", True)
    spec = _plain(config, names, qkv_layout="grouped", parallel=parallel)
    return replace(spec, qkv_bias=bias, output_bias=bias)


def gpt2(config: Config) -> ModelSpec:
    """GPT-2: learned positions, weights stored [in, out]."""
    config.only("scale_attn_by_inverse_layer_idx", False)
    config.only("scale_attn_weights", True)
    config.only("add_cross_attention", False)
    names = Names(
        **_GPT,
        positions="wpe",
        mlp_norm="ln_2",
        qkv=("attn.c_attn",),
        output="attn.c_proj",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
        transposed=True,
    )
    return _plain(_gpt(config, tie_word_embeddings=True), names, rotary=False)


def gpt_neo(config: Config) -> ModelSpec:
    """GPT-Neo: GPT-2 with unscaled scores, every other layer seeing the last 256 positions."""
    layers = config.integer("num_hidden_layers")
    types: list[Any] = config.values.get("attention_types") or [[["global", "local"], layers // 2]]
    kinds = [kind for pattern, times in types for _ in range(times) for kind in pattern]
    if len(kinds) != layers or set(kinds) - {"global", "local"}:
        raise config.invalid(f"attention_types says {kinds}, expected {layers} of global and local")
    window = config.integer("window_size", 256)
    names = Names(
        **_GPT,
        positions="wpe",
        mlp_norm="ln_2",
        qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
        output="attn.attention.out_proj",
        up=("mlp.c_fc",),
        down="mlp.c_proj",
    )
    spec = _plain(
        _gpt(config, tie_word_embeddings=True),
        names,
        rotary=False,
        attention_scale=1.0,
        windows=tuple(window if kind == "local" else None for kind in kinds),
    )
    return replace(spec, qkv_bias=False)


def gptj(config: Config) -> ModelSpec:
    """GPT-J: attention and MLP side by side after one norm, neighbours rotated."""
    qkv = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
    return _side_by_side(config, qkv, qkv_layout="joined")


def codegen(config: Config) -> ModelSpec:
    """CodeGen: GPT-J with q, v and k fused in four shards."""
    heads = config.integer("num_attention_heads")
    if heads % CODEGEN_SHARDS:
        raise config.invalid(f"num_attention_heads is {heads}, no multiple of {CODEGEN_SHARDS}")
    return _side_by_side(config, ("attn.qkv_proj",), qkv_layout="codegen")


def opt(config: Config) -> ModelSpec:
    """OPT: learned positions that begin at 2, ReLU."""
    config.only("do_layer_norm_before", True)
    config.only("_remove_final_layer_norm", False)
    config.only("word_embed_proj_dim", config.integer("hidden_size"))
    config.only("layer_norm_elementwise_affine", True)
    config = config.otherwise(norm_eps=1e-5, hidden_act="relu", tie_word_embeddings=True)
    names = Names(
        base="model.decoder.",
        positions="embed_positions",
        norm="final_layer_norm",
        attention_norm="self_attn_layer_norm",
        output="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        up=("fc1",),
        down="fc2",
    )
    return _plain(config, names, config.boolean("enable_bias", True), rotary=False, position_offset=2)


def falcon(config: Config) -> ModelSpec:
    """Falcon: one key head, or several, each fused with its queries; side by side with one norm or two."""
    config = config.otherwise(norm_eps=1e-5, hidden_act="gelu", tie_word_embeddings=True)
    new = config.boolean("new_decoder_architecture", False)
    parallel = new or config.boolean("parallel_attn", True)
    heads, many = config.integer("num_attention_heads"), not config.boolean("multi_query", True)
    kv_heads = config.integer("num_key_value_heads", heads) if new else heads if many else 1
    names = Names(
        **_BLOOM,
        qkv=("self_attention.query_key_value",),
        output="self_attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
        mlp_norm=None if parallel else "post_attention_layernorm",
    )
    if new and config.integer("num_ln_in_parallel_attn", 2) == 2:
        names = replace(names, attention_norm="ln_attn", mlp_norm="ln_mlp")
    alibi = config.boolean("alibi", False)
    spec = _plain(
        config,
        names,
        config.boolean("bias", False),
        rotary=not alibi,
        num_kv_heads=kv_heads,
        qkv_layout="grouped",
        parallel=parallel,
    )
    # Falcon scales its biases together with the scores.
    slopes = tuple(slope * spec.scale for slope in _slopes(heads)) if alibi else ()
    return replace(spec, alibi=slopes)


def bloom(config: Config) -> ModelSpec:
    """BLOOM: ALiBi, a norm after the embedding, q, k, v fused head by head."""
    config.only("apply_residual_connection_post_layernorm", False)
    config = config.otherwise(
        norm_eps=1e-5, hidden_act="gelu_new", tie_word_embeddings=True, max_position_embeddings=2048
    )
    names = Names(
        **_BLOOM,
        embedding_norm="word_embeddings_layernorm",
        qkv=("self_attention.query_key_value",),
        output="self_attention.dense",
        up=("mlp.dense_h_to_4h",),
        down="mlp.dense_4h_to_h",
    )
    slopes = _slopes(config.integer("num_attention_heads"))
    return _plain(config, names, rotary=False, qkv_layout="grouped", alibi=slopes)


def mpt(config: Config) -> ModelSpec:
    """MPT: ALiBi, no bias anywhere."""
    attention = config.part("attn_config") or Config({}, config.source)
    attention.only("attn_type", "multihead_attention")
    attention.only("alibi", True)
    attention.only("qk_ln", False)
    attention.only("prefix_lm", False)
    config.only("no_bias", True)
    config.only("logit_scale", None)
    config = config.otherwise(norm_eps=1e-5, hidden_act="gelu", tie_word_embeddings=True)
    config.only("expansion_ratio", 4)
    names = Names(
        base="transformer.",
        embedding="wte",
        layers="blocks",
        norm="norm_f",
        attention_norm="norm_1",
        mlp_norm="norm_2",
        qkv=("attn.Wqkv",),
        output="attn.out_proj",
        up=("ffn.up_proj",),
        down="ffn.down_proj",
    )
    spec = _plain(config, names, bias=False, rotary=False)
    scale, clip = attention.number("softmax_scale", 0.0), attention.number("clip_qkv", 0.0)
    return replace(
        spec,
        norm_bias=False,
        attention_scale=scale or None,
        qkv_clip=clip or None,
        alibi=_mpt_slopes(spec.num_heads, attention.number("alibi_bias_max", 8)),
    )


FAMILIES: dict[str, Callable[[Config], ModelSpec]] = {
    "bloom": bloom,
    "codegen": codegen,
    "cohere": cohere,
    "cohere2": cohere2,
    "falcon": falcon,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gpt2": gpt2,
    "gpt_neo": gpt_neo,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "granite": granite,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "mpt": mpt,
    "olmo2": olmo2,
    "opt": opt,
    "phi": phi,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "smollm3": smollm3,
    "stablelm": stablelm,
    "starcoder2": starcoder2,
}


def from_hf(config: Config) -> ModelSpec:
    """The spec of any supported config. Raises ModelInvalid naming the field or the model type."""
    kind = config.text("model_type")
    if kind not in FAMILIES:
        raise config.invalid(f"model_type {kind!r} is not supported; {', '.join(sorted(FAMILIES))} are")
    return FAMILIES[kind](config)


# ---- what families share

_GPT: dict[str, Any] = {
    "base": "transformer.",
    "embedding": "wte",
    "layers": "h",
    "norm": "ln_f",
    "attention_norm": "ln_1",
}
_BLOOM: dict[str, Any] = {
    "base": "transformer.",
    "embedding": "word_embeddings",
    "layers": "h",
    "norm": "ln_f",
}


def _spec(config: Config, **knobs: Any) -> ModelSpec:
    """What every config says, and ``knobs`` that override it."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", heads)
    if heads % kv_heads:
        raise config.invalid(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    layers = config.integer("num_hidden_layers")
    said: dict[str, Any] = {
        "family": config.text("model_type"),
        "vocab_size": config.integer("vocab_size"),
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": config.integer("head_dim", hidden // heads),
        "intermediate_size": config.integer("intermediate_size"),
        "norm_eps": config.number("norm_eps", 1e-6),
        "max_positions": config.integer("max_position_embeddings"),
        "tied_embeddings": config.boolean("tie_word_embeddings", False),
        "windows": (None,) * layers,
        "eos_token_ids": config.token_ids("eos_token_id"),
    }
    if "activation" not in knobs:
        said["activation"] = _activation(config)
    if "ropes" not in knobs:
        said["ropes"] = (_rope(config),) * layers
    return ModelSpec(**said | {name: value for name, value in knobs.items() if value is not None})


def _plain(
    config: Config, names: Names, bias: bool = True, *, rotary: bool = True, **knobs: Any
) -> ModelSpec:
    """The older shape: layer norms with bias, biases on every linear or on none, an MLP without a gate."""
    config = config.otherwise(intermediate_size=4 * config.integer("hidden_size"))
    if not rotary:
        knobs["ropes"] = (None,) * config.integer("num_hidden_layers")
    return _spec(
        config,
        names=names,
        norm="layer",
        norm_bias=True,
        gated=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        **knobs,
    )


def _gpt(config: Config, **defaults: Any) -> Config:
    return config.otherwise(norm_eps=1e-5, hidden_act="gelu_new", **defaults)


def _side_by_side(config: Config, qkv: tuple[str, ...], **knobs: Any) -> ModelSpec:
    """GPT-J and CodeGen."""
    layers = config.integer("num_hidden_layers")
    rope = RopeSpec(rotary_dim=config.integer("rotary_dim", 64), interleaved=True)
    names = Names(
        **_GPT, qkv=qkv, output="attn.out_proj", mlp_norm=None, up=("mlp.fc_in",), down="mlp.fc_out"
    )
    spec = _plain(_gpt(config), names, ropes=(rope,) * layers, parallel=True, head_bias=True, **knobs)
    return replace(spec, qkv_bias=False, output_bias=False)


def _rope(config: Config, layers: str | None = None) -> RopeSpec:
    heads = config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", config.integer("hidden_size") // heads)
    return config.rope(head_dim, config.integer("max_position_embeddings"), layers)


def _activation(config: Config) -> Activation:
    name = config.text("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise config.invalid(f"hidden_act {name!r} is not supported; {', '.join(ACTIVATIONS)} are")
    return ACTIVATIONS[name]


def _gemma_activation(config: Config) -> Activation:
    """The first checkpoints say "gelu" and mean the approximation they were trained with."""
    return "gelu_tanh" if _activation(config) == "gelu" else _activation(config)


def _cap(config: Config, which: str, default: float | None = None) -> float | None:
    name = f"{which}_logit_softcapping"
    if name in config.values and config.values[name] is None:
        return None
    cap = config.number(name, default or 0.0)
    return cap or None


def _qwen_moe(config: Config, shared: int) -> MoeSpec:
    layers, step = config.integer("num_hidden_layers"), config.integer("decoder_sparse_step", 1)
    plain: list[Any] = config.values.get("mlp_only_layers") or []
    return MoeSpec(
        layers=tuple(layer not in plain and (layer + 1) % step == 0 for layer in range(layers)),
        experts=config.integer("num_experts"),
        chosen=config.integer("num_experts_per_tok"),
        intermediate_size=config.integer("moe_intermediate_size"),
        normalised=config.boolean("norm_topk_prob", False),
        shared_size=shared,
    )


# ---- windows


def _all_windows(config: Config, default: int | None = None) -> Windows:
    """Every layer the last ``sliding_window`` positions, unless that is null."""
    window = config.optional_integer("sliding_window", default)
    return (window,) * config.integer("num_hidden_layers")


def _layer_windows(config: Config, every: int = 0) -> Windows:
    """As ``layer_types`` says; where it is absent all slide but each ``every``-th layer."""
    layers, window = config.integer("num_hidden_layers"), config.optional_integer("sliding_window", 4096)
    kinds = config.kinds("layer_types", (SLIDING, FULL), layers)
    if kinds is None:
        kinds = [SLIDING if every and (i + 1) % every else FULL for i in range(layers)]
    return tuple(window if kind == SLIDING else None for kind in kinds)


def _qwen_windows(config: Config) -> Windows:
    """``layer_types`` where given, else the layers from ``max_window_layers`` on; none unless switched on."""
    layers = config.integer("num_hidden_layers")
    if not config.boolean("use_sliding_window", False):
        return (None,) * layers
    if config.values.get("layer_types") is not None:
        return _layer_windows(config)
    first = config.integer("max_window_layers", 28, least=0)
    window = config.optional_integer("sliding_window", 4096)
    return tuple(window if layer >= first else None for layer in range(layers))


# ---- ALiBi (Press et al. 2022)


def _slopes(heads: int) -> tuple[float, ...]:
    """Powers of 2^(-8/n) for n heads; for other counts than powers of two the next ones lie between."""
    whole = 2 ** math.floor(math.log2(heads))
    first = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    between = [2 ** (-8 * (i + 1) / (2 * whole)) for i in range(0, 2 * (heads - whole), 2)]
    return tuple(first + between)


def _mpt_slopes(heads: int, steepest: float) -> tuple[float, ...]:
    """MPT takes another order where the count is no power of two."""
    whole = 2 ** math.ceil(math.log2(heads))
    slopes = [2 ** (-steepest * (i + 1) / whole) for i in range(whole)]
    return tuple(slopes if whole == heads else (slopes[1::2] + slopes[::2])[:heads])
