"""Every model type beside Llama's closest kin says what transformers says: logits and tokens, in fp32.

Tiny random models, saved by transformers' own save_pretrained: names, biases, fused matrices and tied weights
lie in the checkpoints as they do in published ones.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.layers.linear import unpacked
from gristmill.engine.lora.adapter import load, survey
from gristmill.engine.models.config import Config
from gristmill.engine.models.families import from_hf
from gristmill.engine.runner import Runner
from gristmill.engine.settings import EngineSettings
from gristmill.schemas.errors import AdapterInvalid, Misconfigured, ModelInvalid
from safetensors.torch import load_file, save_file

from ..support.adapters import write_adapter
from ..support.feeding import Fed, Piece, Plan, generate

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


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread; on a busy machine its barriers cost minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_type_equals_transformers_batched_and_chunked(variant: str, tmp_path: Path) -> None:
    kind, config = VARIANTS[variant]
    theirs = their_model(kind, config, tmp_path)
    for attention in ("torch", "auto"):
        ours = runner(tmp_path, attention)
        whole = generate(ours, prompts(), STEPS)
        chunked = generate(ours, prompts(), STEPS, budget=11, seed=3)
        assert [seq.tokens for seq in chunked] == [seq.tokens for seq in whole]
        for seq in whole + chunked:
            with torch.inference_mode():
                expected = theirs(torch.tensor([seq.tokens[:-1]])).logits[0, -STEPS:]
            torch.testing.assert_close(torch.stack(seq.rows), expected, rtol=1e-4, atol=1e-4)
            assert seq.tokens[-STEPS:] == expected.argmax(-1).tolist()


@pytest.mark.parametrize("variant", ["phi3", "gpt_neox", "gptj", "falcon-two-norms"])
def test_an_adapter_of_fused_or_reordered_matrices_equals_merging_it(variant: str, tmp_path: Path) -> None:
    kind, config = VARIANTS[variant]
    theirs = their_model(kind, config, tmp_path / "model")
    directory = write_adapter(tmp_path / "adapter", tmp_path / "model", targets="all-linear")
    tensors = load_file(directory / "adapter_model.safetensors")
    for name in [name for name in tensors if ".lora_A." in name]:
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        change = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        theirs.get_submodule(module).weight.data += 2 * change  # lora_alpha is twice the rank
    ours = runner(tmp_path / "model")
    blueprint = survey(directory, ours.spec, max_rank=64)
    adapter = load(blueprint, torch.float32, torch.device("cpu"), unpacked)
    tokens = prompts()[1]
    logits = ours.forward(Plan([Piece(Fed(tokens, [0, 1], adapter="a"), len(tokens))]), {"a": adapter})
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens])).logits[0, -1:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_experts_is_refused(tmp_path: Path) -> None:
    their_model(*VARIANTS["mixtral"], tmp_path / "model")
    directory = write_adapter(tmp_path / "adapter", tmp_path / "model", targets="all-linear")
    tensors = load_file(directory / "adapter_model.safetensors")
    expert = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1.lora_A.weight"
    save_file({**tensors, expert: torch.zeros(4, 32)}, directory / "adapter_model.safetensors")
    with pytest.raises(AdapterInvalid, match=r"experts.0.w1.lora_A.weight'.* no adapted linear"):
        survey(directory, runner(tmp_path / "model").spec, max_rank=64)


def test_a_checkpoint_saved_without_its_head_is_read(tmp_path: Path) -> None:
    """As GPT-2's and BLOOM's first ones are: h.0 instead of transformer.h.0, and masks among the weights."""
    theirs = their_model(*VARIANTS["gpt2"], tmp_path)
    path = tmp_path / "model.safetensors"
    bare = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, path)
    fed = generate(runner(tmp_path), prompts()[1:2], 1)
    with torch.inference_mode():
        expected = theirs(torch.tensor([fed[0].tokens[:-1]])).logits[0, -1]
    torch.testing.assert_close(fed[0].rows[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "fields", "words"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False, .* true is"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim is 16, .* 32 is"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config: qk_ln is True"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"layer_types": ["sliding_attention", "chunked_attention"]}, "layer_types must be 2 of"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "expected 2 of global and local"),
        ("codegen", {"n_head": 2}, "num_attention_heads is 2, no multiple of 4"),
    ],
)
def test_what_a_family_does_not_do_is_refused_by_field(
    variant: str, fields: dict[str, Any], words: str
) -> None:
    kind, config = VARIANTS[variant]
    with pytest.raises(ModelInvalid, match=words):
        from_hf(Config({**config, "model_type": kind, **fields}, "config.json"))


@pytest.mark.parametrize("variant", ["gemma2", "bloom"])
def test_a_kernel_that_lacks_a_models_scores_is_not_used(variant: str, tmp_path: Path) -> None:
    their_model(*VARIANTS[variant], tmp_path)
    assert runner(tmp_path).attention == "torch"
    with pytest.raises(Misconfigured, match="a model whose attention the kernel has"):
        runner(tmp_path, "cpu")
