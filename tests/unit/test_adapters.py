"""Adapter directories: what is read, what is refused and in which words; which names lead where."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.layers.linear import unpacked
from gristmill.engine.lora.adapter import load, survey
from gristmill.engine.lora.catalogue import Catalogue
from gristmill.engine.models.config import Config
from gristmill.engine.models.families import from_hf
from gristmill.engine.models.spec import ModelSpec
from gristmill.engine.models.tiny import write_tiny
from gristmill.schemas.errors import AdapterInvalid, AdapterNotFound
from safetensors.torch import load_file, save_file

from ..support.adapters import write_adapter


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def spec(model: Path) -> ModelSpec:
    return from_hf(Config.load(model))


def edit(directory: Path, **config: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA is supported"),
        ({"use_dora": True}, "use_dora is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported (it is \"['lm_head']\")"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is not supported"),
        ({"bias": "all"}, "bias is 'all': trained biases are not supported"),
        ({"lora_bias": True}, "lora_bias is not supported"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is not supported"),
        ({"from_the_future": {"x": 1}}, "from_the_future is not supported"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "'pissa_niter_4' changes the base model; convert the adapter",
        ),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": "(q_proj"}, "target_modules is not a regular expression"),
        ({"target_modules": ["c_attn"]}, "match no linear of this model's layers"),
        ({"r": 0}, "r is 0, expected a number of at least 1"),
        ({"r": 5}, "config and model say [5, 48]"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', expected a number"),
        (
            {"rank_pattern": {"q_proj": 900}},
            "rank 900 of model.layers.0.self_attn.q_proj is above lora_max_rank (64)",
        ),
        ({"target_modules": ["q_proj"]}, "which is no adapted linear of this model's layers"),
        ({"layers_pattern": "h"}, "layers_pattern is 'h'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, model: Path, spec: ModelSpec, config: dict[str, Any], words: str
) -> None:
    adapter = write_adapter(tmp_path / "a", model)
    edit(adapter, **config)
    with pytest.raises(AdapterInvalid, match=re.escape(words)):
        survey(adapter, spec, max_rank=64)


def test_switched_off_features_are_no_reason_to_refuse(tmp_path: Path, model: Path, spec: ModelSpec) -> None:
    adapter = write_adapter(tmp_path / "a", model, use_dora=False, modules_to_save=None, some_new_thing=None)
    assert survey(adapter, spec, max_rank=64).elements > 0


def test_an_adapter_for_another_model_is_refused(tmp_path: Path, spec: ModelSpec) -> None:
    wider = write_tiny(tmp_path / "wider", hidden_size=96)
    with pytest.raises(AdapterInvalid, match=re.escape("is [4, 96], config and model say [4, 48]")):
        survey(write_adapter(tmp_path / "a", wider), spec, max_rank=64)
    deeper = write_tiny(tmp_path / "deeper", num_hidden_layers=4)
    with pytest.raises(AdapterInvalid, match=r"layers\.3\..*made for another model"):
        survey(write_adapter(tmp_path / "b", deeper), spec, max_rank=64)


def test_a_broken_directory_says_which_file_is_at_fault(tmp_path: Path, model: Path, spec: ModelSpec) -> None:
    adapter = write_adapter(tmp_path / "a", model)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.safetensors is not a whole safetensors file"):
        survey(adapter, spec, max_rank=64)
    weights.unlink()
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.safetensors is missing"):
        survey(adapter, spec, max_rank=64)
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterInvalid, match=r"adapter_model\.bin is a pickle"):
        survey(adapter, spec, max_rank=64)
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(AdapterInvalid, match="is not a JSON object"):
        survey(adapter, spec, max_rank=64)


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, model: Path, spec: ModelSpec) -> None:
    """They would be added to rows of others as well, were rows ever padded."""
    adapter = write_adapter(tmp_path / "a", model)
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"][3, 1] = float("nan")
    save_file(tensors, adapter / "adapter_model.safetensors")
    blueprint = survey(adapter, spec, max_rank=64)
    with pytest.raises(AdapterInvalid, match=r"layers\.1\.mlp.* no numbers"):
        load(blueprint, torch.float32, torch.device("cpu"), unpacked)


def test_the_bytes_that_are_counted_are_the_bytes_that_are_held(
    tmp_path: Path, model: Path, spec: ModelSpec
) -> None:
    held = 0

    def counting(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        nonlocal held
        held += weight.numel()
        return unpacked(weight)

    adapter = write_adapter(tmp_path / "a", model, rank_pattern={"q_proj": 3, "down_proj": 9})
    blueprint = survey(adapter, spec, max_rank=64)
    load(blueprint, torch.bfloat16, torch.device("cpu"), counting)
    assert held == blueprint.elements


def test_names_lead_nowhere_but_below_the_root(tmp_path: Path, model: Path) -> None:
    root = tmp_path / "root"
    inside, outside = write_adapter(root / "inside", model), write_adapter(tmp_path / "outside", model)
    catalogue = Catalogue({"by-name": outside}, root)
    assert catalogue.find("inside") == inside
    assert catalogue.find("by-name") == outside
    for name in (
        "../outside",
        "..",
        ".",
        "",
        "a/../../outside",
        str(outside),
        "inside/",
        "inside\0",
        ".hidden",
    ):
        with pytest.raises(AdapterNotFound, match=r"it serves by-name, inside$"):
            catalogue.find(name)


def test_an_adapter_may_be_added_below_the_root_later(tmp_path: Path, model: Path) -> None:
    catalogue = Catalogue({}, tmp_path)
    with pytest.raises(AdapterNotFound, match="it serves none yet"):
        catalogue.find("late")
    write_adapter(tmp_path / "late", model)
    assert catalogue.find("late") == tmp_path / "late"


def test_a_worker_without_adapters_says_how_to_get_some() -> None:
    with pytest.raises(AdapterNotFound, match="--lora-adapters NAME=DIR or --lora-dir DIR"):
        Catalogue({}, None).find("any")
