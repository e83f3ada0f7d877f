"""GGUF files run as they are: what they say is what transformers says with the weights they hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gristmill.backends import gguf_model
from gristmill.backends.models import resolve
from gristmill.backends.places import Folder
from gristmill.backends.progress import silent
from gristmill.backends.verification import examine
from gristmill.engine.quant.gguf_blocks import FORMATS, grouped
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.errors import ModelInvalid
from gristmill.schemas.gguf import LAYOUTS
from gristmill.schemas.model_names import served_name
from transformers import AutoConfig, AutoModelForCausalLM

from ..support.feeding import generate
from ..support.model_types import BASE, runner

SIZE: dict[str, Any] = {**BASE, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**SIZE, "attention_bias": False}),
    "qwen2": ("qwen2", SIZE),
    "qwen3": ("qwen3", SIZE),
    "gemma": ("gemma", SIZE),
    "gemma2": ("gemma2", {**SIZE, "query_pre_attn_scalar": 16, "sliding_window": 9}),
    "gemma3": ("gemma3_text", {**SIZE, "query_pre_attn_scalar": 16, "sliding_window": 9}),
    "phi3": ("phi3", SIZE),
    "starcoder2": ("starcoder2", {**SIZE, "sliding_window": None, "use_bias": True}),
}
KIND = gguf.GGMLQuantizationType
PROMPT = [5, 17, 33, 8, 61, 40, 7, 22, 90, 13, 4, 77]


def written(path: Path, architecture: str, kind: str = "F32") -> Any:
    """A random model of transformers', written as a GGUF file too; it has what matrices in ``kind`` mean."""
    family, config = MODELS[architecture]
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **config), attn_implementation="eager"
    ).eval()
    settings = theirs.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_vocab_size(96)
    writer.add_rope_freq_base(settings.rope_parameters.get("rope_theta") or 10_000.0)
    if architecture.startswith("gemma3"):
        writer.add_rope_freq_base(settings.rope_parameters["full_attention"]["rope_theta"])
    if architecture == "starcoder2":
        writer.add_layer_norm_eps(settings.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(settings.rms_norm_eps)
    if architecture in ("gemma2", "gemma3"):
        writer.add_sliding_window(9)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "t5", "ab", *(f"t{i}" for i in range(7, 96))])
    writer.add_token_types([1] * 96)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    _write_tensors(writer, theirs, architecture, kind)
    return theirs


def _write_tensors(writer: Any, theirs: Any, architecture: str, kind: str) -> None:
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                noise = weight + 0.2 * noise
            elif weight.dim() > 1:
                noise = noise * 1.5 / weight.shape[-1] ** 0.5
            weight.copy_(noise)
            where = known.get_name(name, try_suffixes=(".weight", ".bias"))
            if where is None or (where == "output.weight" and theirs.config.tie_word_embeddings):
                continue
            values = noise
            if architecture.startswith("gemma") and "norm" in name:
                values = noise + 1
            if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
                values = noise.view(-1, 2, 8, 64).transpose(1, 2).reshape(noise.shape)
            if weight.dim() < 2 or kind == "F32":
                writer.add_tensor(where, values.contiguous().numpy())
                continue
            raw = gguf.quantize(values.contiguous().numpy(), KIND[kind])
            meant = torch.from_numpy(gguf.dequantize(raw, KIND[kind]))
            if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
                meant = meant.view(-1, 8, 2, 64).transpose(1, 2).reshape(meant.shape)
            weight.copy_(meant)
            writer.add_tensor(where, raw, raw_dtype=KIND[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_says_the_same(directory: Path, theirs: Any) -> None:
    said = generate(runner(directory, "torch"), [PROMPT], 6)[0]
    ids = list(PROMPT)
    for row in said.rows:
        expected = theirs(torch.tensor([ids])).logits[0, -1].detach().float()
        torch.testing.assert_close(row, expected, rtol=2e-3, atol=2e-3)
        ids.append(int(expected.argmax()))


@pytest.mark.parametrize("architecture", MODELS)
def test_a_gguf_model_says_what_transformers_says(architecture: str, tmp_path: Path) -> None:
    theirs = written(tmp_path / "a-model.gguf", architecture)
    directory = resolve(str(tmp_path / "a-model.gguf"), home=tmp_path / "home")
    assert_says_the_same(directory, theirs)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_quantized_linears_say_what_their_unpacked_weights_say(kind: str, tmp_path: Path) -> None:
    """By the directory that holds the file, which is made once and again when the file has changed."""
    (tmp_path / "models").mkdir()
    file = tmp_path / "models" / "quantized.gguf"
    theirs = written(file, "llama", kind)
    directory = resolve(str(tmp_path / "models"), home=tmp_path / "home")
    assert_says_the_same(directory, theirs)
    assert resolve(str(file), home=tmp_path / "home") == directory
    assert served_name(str(file)) == "quantized"
    file.touch()
    assert resolve(str(file), home=tmp_path / "home") != directory


FACTORS = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}
"""Where float16 numbers are in a block; elsewhere they come first, a scale and perhaps a minimum."""


@pytest.mark.parametrize("name", FORMATS)
def test_packed_blocks_mean_what_the_formats_own_package_says(name: str) -> None:
    kind, layout = next((kind, layout) for kind, layout in LAYOUTS.items() if layout.name == name)
    random = np.random.default_rng(kind)
    blocks = random.integers(0, 256, (40, layout.size_bytes), dtype=np.uint8)
    for at in FACTORS.get(name, (0,) if name.endswith("0") else (0, 2)):  # random bytes may be no number
        blocks[:, at : at + 2] = random.normal(size=(40, 1)).astype(np.float16).view(np.uint8)
    if "1" in name or "K" in name:
        blocks[3, :2] = 0  # a scale of zero: all weights are the minimum
    expected = gguf.dequantize(blocks, KIND[name]).reshape(8, -1)
    packed = grouped(name, torch.from_numpy(blocks.reshape(-1)), *expected.shape, layout.size_bytes)
    found = packed.dense(torch.float32).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * float(np.abs(expected).max()))


def test_what_cannot_be_run_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("one", "two"):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "mamba")
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    with pytest.raises(ModelInvalid, match=r"holds 2 GGUF files \(one.gguf, two.gguf\); name one"):
        resolve(str(tmp_path), home=tmp_path / "home")
    with pytest.raises(ModelInvalid, match="architecture 'mamba' is not supported; gemma, "):
        resolve(str(tmp_path / "one.gguf"), home=tmp_path / "home")
    assert not list((tmp_path / "home" / "models" / "gguf").iterdir())
    assert gguf_model.gguf_in(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("general.alignment", "wide", "alignment wide"),
        ("llama.attention.head_count", 0, "not those of a model"),
        ("llama.attention.head_count", [4, 4], "not those of a model"),
        ("llama.block_count", 2**31, "2,147,483,648 layers in 0 tensors"),
    ],
)
def test_metadata_that_make_no_sense_are_refused(field: str, value: Any, words: str, tmp_path: Path) -> None:
    sizes = {"embedding_length": 64, "feed_forward_length": 96, "context_length": 128, "block_count": 0}
    fields = {f"llama.{name}": size for name, size in sizes.items()}
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    for name, number in (fields | {"llama.attention.head_count": 4, field: value}).items():
        if isinstance(number, int):
            writer.add_uint32(name, number)
        else:
            (writer.add_string if isinstance(number, str) else writer.add_array)(name, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelInvalid, match=words):
        resolve(str(tmp_path / "model.gguf"), home=tmp_path / "home")


def test_a_tokenizer_beside_the_file_goes_before_what_it_holds(tmp_path: Path) -> None:
    from gristmill.engine.models.tiny import write_tiny

    beside = write_tiny(tmp_path / "tiny", "llama", tokenizer=True)
    written(tmp_path / "model.gguf", "llama")
    own = resolve(str(tmp_path / "model.gguf"), home=tmp_path / "home")
    assert json.loads((own / "tokenizer.json").read_text())["model"]["vocab"]["t5"] == 5
    (tmp_path / "tokenizer.json").write_bytes((beside / "tokenizer.json").read_bytes())
    found = Tokenizer(resolve(str(tmp_path / "model.gguf"), home=tmp_path / "home"))
    assert found.encode("ab") == [97, 98]
    assert not examine(Folder(own), silent).problems
