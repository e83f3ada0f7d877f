"""Tiny models of every model type, random, saved by transformers' own save_pretrained; our runner of them.

Names, biases, fused matrices and tied weights lie in their checkpoints as they do in published ones.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from gristmill.engine.runner import Runner
from gristmill.engine.settings import EngineSettings

VOCAB, STEPS = 96, 5
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ONE_SIZE: dict[str, Any] = {name: size for name, size in BASE.items() if name != "num_key_value_heads"}
FALCON: dict[str, Any] = {**ONE_SIZE, "ffn_hidden_size": 48}
del FALCON["intermediate_size"]
LONG: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.2, 2.0, 4.0, 8.0],
}
GEMMA3_ROPE: dict[str, Any] = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
ALTERNATING: dict[str, Any] = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"]}
NEO: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_position_embeddings": 128,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 9,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {**BASE, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

KIN: dict[str, tuple[str, dict[str, Any]]] = {
    kind: (kind, BASE) for kind in ("llama", "mistral", "qwen2", "qwen3")
}
"""Llama and its closest; tests/parity/test_families.py has their variants."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-dynamic": (
        "llama",
        {**BASE, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "smollm3": ("smollm3", {**BASE, "no_rope_layer_interval": 2}),
    "smollm3-window": (
        "smollm3",
        {**BASE, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 9},
    ),
    "phi3": ("phi3", {**BASE, "sliding_window": 9}),
    "phi3-short": ("phi3", {**BASE, "rope_parameters": LONG, "original_max_position_embeddings": 128}),
    "phi3-long-partial": (
        "phi3",
        {
            **BASE,
            "head_dim": 8,
            "rope_parameters": {
                **LONG,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.5],
                "long_factor": [2.0, 8.0],
            },
            "original_max_position_embeddings": 2,  # all we compare is longer: they choose as we do
        },
    ),
    "granite": (
        "granite",
        {
            **BASE,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
        },
    ),
    "olmo2": ("olmo2", BASE),
    "gemma": ("gemma", {**BASE, "head_dim": 16}),
    "gemma-gelu-one-kv-head": (
        "gemma",
        {**BASE, "head_dim": 16, "num_key_value_heads": 1, "hidden_act": "gelu"},
    ),
    "gemma2": (
        "gemma2",
        {
            **BASE,
            **ALTERNATING,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {**BASE, **ALTERNATING, "head_dim": 16, "query_pre_attn_scalar": 24, "rope_parameters": GEMMA3_ROPE},
    ),
    "stablelm": ("stablelm", {**BASE, "use_qkv_bias": True}),
    "stablelm-parallel-normed": ("stablelm", {**BASE, "use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", {**BASE, "sliding_window": 9}),
    "cohere": ("cohere", {**BASE, "logit_scale": 0.25}),
    "cohere-normed": ("cohere", {**BASE, "use_qk_norm": True, "attention_bias": True}),
    "cohere2": ("cohere2", {**BASE, **ALTERNATING}),
    "phi": ("phi", {**BASE, "partial_rotary_factor": 0.5}),
    "phi-normed": ("phi", {**BASE, "qk_layernorm": True}),
    "gpt_neox": (
        "gpt_neox",
        {
            **ONE_SIZE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
        },
    ),
    "gpt_neox-in-turn": ("gpt_neox", {**ONE_SIZE, "use_parallel_residual": False, "attention_bias": False}),
    "gpt2": ("gpt2", OLD),
    "gpt2-untied": ("gpt2", {**OLD, "n_inner": 40, "tie_word_embeddings": False}),
    "opt": ("opt", {**ONE_SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "falcon": ("falcon", FALCON),
    "falcon-two-norms": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": (
        "falcon",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-alibi": (
        "falcon",
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "gptj": ("gptj", {**OLD, "rotary_dim": 4}),
    "gpt_neo": ("gpt_neo", NEO),
    "codegen": ("codegen", {**OLD, "rotary_dim": 4}),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 24, "n_layer": 2, "n_head": 3}),
    "mpt": ("mpt", {"vocab_size": VOCAB, "d_model": 24, "n_layers": 2, "n_heads": 3, "max_seq_len": 128}),
    "mpt-clipped": (
        "mpt",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "attn_config": {"clip_qkv": 0.6, "softmax_scale": 0.2},
        },
    ),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen2_moe-some-layers": (
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0], "norm_topk_prob": True},
    ),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 2}),
    "mixtral": ("mixtral", {**BASE, "num_local_experts": 4, "sliding_window": 9}),
}


def their_model(kind: str, config: dict[str, Any], directory: Path) -> Any:
    """transformers' model with random weights, saved to ``directory``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    # Falcon's eager attention adds its biases twice.
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **config), attn_implementation="sdpa" if kind == "falcon" else "eager"
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            # Scores well apart, and no layer that drowns the others: outputs then depend on every weight.
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name or ".ln_" in name:
                noise = weight + 0.2 * noise
            elif weight.dim() > 1:
                noise = noise * 1.5 / weight.shape[-1] ** 0.5
            weight.copy_(noise)
    theirs.eval().save_pretrained(directory)
    return theirs


def runner(directory: Path, attention: str = "auto", **settings: Any) -> Runner:
    return Runner(
        EngineSettings(
            model=str(directory),
            device="cpu",
            dtype="float32",
            attention=attention,
            max_batch_prefill_tokens=256,
            max_num_seqs=8,
            max_batch_total_tokens=1024,
            **settings,
        )
    )


def prompts() -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(3, VOCAB) for _ in range(n)] for n in (1, 17, 48)]
