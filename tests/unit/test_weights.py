"""A bad model directory is refused before anything runs, by the name of the file, the field or the tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.models.config import Config
from gristmill.engine.models.families import from_hf
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.reference import Reference
from gristmill.engine.runner import Runner
from gristmill.engine.settings import EngineSettings
from gristmill.engine.weights import Checkpoint, expected_tensors
from gristmill.schemas.errors import Misconfigured, ModelInvalid, ModelNotFound
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
K_PROJ = "model.layers.1.self_attn.k_proj.weight"


def check(directory: Path) -> None:
    spec = from_hf(Config.load(directory))
    Checkpoint(directory).verify(expected_tensors(spec), tied=spec.tied_embeddings)


def changed(directory: Path, change: Callable[[Tensors], None]) -> Path:
    """The tiny model with its tensors changed on disk."""
    write_tiny(directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def reconfigured(directory: Path, **fields: Any) -> Path:
    write_tiny(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def test_a_whole_model_passes_in_one_file_and_in_shards(tmp_path: Path) -> None:
    whole, parts = write_tiny(tmp_path / "a", seed=3), write_tiny(tmp_path / "b", seed=3, shards=3)
    check(whole)
    check(parts)
    assert torch.equal(Reference(whole).logits([1, 2, 3]), Reference(parts).logits([1, 2, 3]))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    def remove(tensors: Tensors) -> None:
        del tensors[K_PROJ]

    with pytest.raises(ModelInvalid, match=rf"lacks '{K_PROJ}'"):
        check(changed(tmp_path, remove))


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["model.layers.0.self_attn.k_proj.lora_A.weight"] = torch.zeros(2, 2)

    with pytest.raises(ModelInvalid, match=r"unexpected 'model.layers.0.self_attn.k_proj.lora_A.weight'"):
        check(changed(tmp_path, add))


def test_a_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> None:
        tensors[K_PROJ] = tensors[K_PROJ][:-1].clone()

    with pytest.raises(ModelInvalid, match=rf"'{K_PROJ}' is \[15, 48\], the config says \[16, 48\]"):
        check(changed(tmp_path, cut))


def test_an_unsupported_number_format_is_named(tmp_path: Path) -> None:
    def quantise(tensors: Tensors) -> None:
        tensors[K_PROJ] = tensors[K_PROJ].to(torch.int8)

    with pytest.raises(ModelInvalid, match=rf"'{K_PROJ}' is I8"):
        check(changed(tmp_path, quantise))


def test_a_redundant_head_and_stored_frequencies_do_no_harm(tmp_path: Path) -> None:
    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)

    check(changed(tmp_path, add))


def test_a_file_cut_short_is_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelInvalid, match=r"model.safetensors is not a whole safetensors file"):
        check(tmp_path)


def test_a_missing_shard_is_refused_by_name(tmp_path: Path) -> None:
    (write_tiny(tmp_path, shards=2) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelInvalid, match=r"model-00002-of-00002.safetensors is missing"):
        check(tmp_path)


def test_an_index_may_not_point_outside_the_directory(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, shards=2) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][K_PROJ] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ModelInvalid, match=r"elsewhere.safetensors', expected a plain file name"):
        check(tmp_path)


def test_an_index_that_misplaces_a_tensor_is_refused(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, shards=2) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    swap = {"model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors"}
    index["weight_map"][K_PROJ] = swap.get(index["weight_map"][K_PROJ], next(iter(swap)))
    path.write_text(json.dumps(index))
    with pytest.raises(ModelInvalid, match=rf"lacks tensor '{K_PROJ}'"):
        check(tmp_path)


def test_a_directory_without_weights_or_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        check(tmp_path / "nowhere")
    with pytest.raises(ModelInvalid, match=r"config.json is missing"):
        check(tmp_path)
    (write_tiny(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(ModelInvalid, match="holds neither"):
        check(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_key_value_heads": 4}, "6 is no multiple of num_key_value_heads 4"),
        ({"model_type": "mamba"}, "'mamba' is not supported; bloom, codegen, cohere"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; silu, swish, gelu"),
        ({"rope_parameters": {"rope_type": "mrope"}}, "'mrope' is not supported; default, dynamic, linear"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "short_factor is missing"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor has 1 numbers, and 4 pairs are rotated",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ({"head_dim": 7}, "head_dim is 7"),
    ],
)
def test_a_config_that_cannot_run_is_refused_by_field(
    tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(ModelInvalid, match=words):
        check(reconfigured(tmp_path, **fields))


def test_generation_config_decides_the_end_tokens(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert from_hf(Config.load(tmp_path)).eos_token_ids == (7, 9)


def test_a_cache_smaller_than_one_sequence_shortens_the_context(tmp_path: Path) -> None:
    settings = EngineSettings(
        model=str(write_tiny(tmp_path)), device="cpu", dtype="float32", max_batch_total_tokens=100
    )
    runner = Runner(settings)
    assert (runner.num_blocks, runner.max_model_len) == (6, 96)


def test_knobs_that_cannot_work_say_what_to_change(tmp_path: Path) -> None:
    directory = str(write_tiny(tmp_path))
    with pytest.raises(Misconfigured, match=r"max_total_tokens is 513 and the model has 512"):
        Runner(EngineSettings(model=directory, max_total_tokens=513))
    with pytest.raises(Misconfigured, match="kv_block_size a multiple of 16"):
        Runner(EngineSettings(model=directory, device="cpu", attention="cpu", kv_block_size=8))
    for name in ("triton", "flash"):
        with pytest.raises(Misconfigured, match=f"attention={name} .* needs a CUDA device.*attention=auto"):
            Runner(EngineSettings(model=directory, device="cpu", attention=name))
    with pytest.raises(ValueError, match="max_num_seqs"):
        EngineSettings(model=directory, max_num_seqs=65, max_batch_prefill_tokens=64)
