"""Every model type beside Llama's closest kin says what transformers says: logits and tokens, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.layers.linear import unpacked
from gristmill.engine.lora.adapter import load, survey
from gristmill.engine.models.config import Config
from gristmill.engine.models.families import from_hf
from gristmill.engine.native.build import find_compiler
from gristmill.schemas.errors import AdapterInvalid, ModelInvalid
from safetensors.torch import load_file, save_file

from ..support.adapters import write_adapter
from ..support.feeding import Fed, Piece, Plan, generate
from ..support.model_types import STEPS, VARIANTS, prompts, runner, their_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_type_equals_transformers_batched_and_chunked(variant: str, tmp_path: Path) -> None:
    kind, config = VARIANTS[variant]
    theirs = their_model(kind, config, tmp_path)
    for attention in ("torch", "auto"):
        ours = runner(tmp_path, attention)
        assert ours.attention == ("cpu" if attention == "auto" and find_compiler() else "torch")
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
