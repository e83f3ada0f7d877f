"""`gristmill quantize`: our loader reads it, it is near the plain model, it is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.quantize.run import quantize
from gristmill.engine.quantize.settings import QuantizeSettings
from gristmill.engine.quantize.writer import CheckpointWriter
from gristmill.engine.reference import Reference
from gristmill.engine.weights import Checkpoint
from gristmill.producer.cli import cli
from gristmill.schemas.errors import Misconfigured, ModelInvalid, Unsupported
from safetensors.torch import load_file

from ..support.quantized import PROMPT, SHAPE, reconfigure, spoken

RELATIVE = {"int8": 0.06, "fp8": 0.2}
"""How far logits may move, as a part of their norm."""


def quantized(source: Path, out: Path, method: str = "int8", **settings: Any) -> Path:
    told: list[tuple[str, int, int]] = []
    quantize(
        QuantizeSettings.model_validate({"model": source, "out": out, "method": method, **settings}),
        lambda *each: told.append(each),
    )
    assert told
    return out


@pytest.mark.parametrize("method", RELATIVE)
def test_a_quantized_copy_is_smaller_and_says_nearly_the_same(method: str, tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", "qwen2", tokenizer=True, dtype="float32", **SHAPE)
    out = quantized(plain, tmp_path / "out", method)
    before, after = Reference(plain).logits(PROMPT), Reference(out).logits(PROMPT)
    assert 0 < (after - before).norm() < RELATIVE[method] * before.norm()
    # Packed as the engine runs it; int8 rounds the inputs, too.
    assert (spoken(out)[0] - after[-1]).norm() < 0.1 * after[-1].norm()
    assert (out / "model.safetensors").stat().st_size < 0.6 * (plain / "model.safetensors").stat().st_size
    assert (out / "tokenizer.json").read_bytes() == (plain / "tokenizer.json").read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"]
    assert config == json.loads((plain / "config.json").read_text())


def test_codes_are_rounded_with_the_scales_as_they_are_stored(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", "qwen2", **SHAPE)
    out = quantized(plain, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    weight, stored = load_file(plain / "model.safetensors")[name], load_file(out / "model.safetensors")
    off = (stored[name].float() * stored[f"{name}_scale"] - weight).abs()
    assert bool((off <= stored[f"{name}_scale"] / 2 * 1.001).all())


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", "qwen2", **SHAPE)
    (tmp_path / "taken").mkdir()
    with pytest.raises(Misconfigured, match="taken exists, and nothing is overwritten"):
        quantized(plain, tmp_path / "taken")
    out = quantized(plain, tmp_path / "out")
    with pytest.raises(ModelInvalid, match="quantized as compressed-tensors already"):
        quantized(out, tmp_path / "again")
    with pytest.raises(Misconfigured, match=r"config\.json: .*; make room, give this user the right"):
        quantized(plain, plain / "config.json" / "out")
    (plain / "model.gguf").touch()
    with pytest.raises(ModelInvalid, match=r"model\.gguf: a GGUF file; quantize the safetensors checkpoint"):
        quantized(plain, tmp_path / "again")
    (plain / "model.gguf").unlink()
    reconfigure(plain, num_hidden_layers=3)
    with pytest.raises(ModelInvalid, match=r"lacks 'model\.layers\.2\."):
        quantized(plain, tmp_path / "again")
    reconfigure(plain, model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    with pytest.raises(Unsupported, match=r"quantizing experts \(qwen3_moe\)"):
        quantized(plain, tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain", "taken"]


def test_many_tensors_are_written_as_files_and_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gristmill.engine.quantize.writer.SHARD_BYTES", 1000)
    writer = CheckpointWriter(tmp_path)
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "model.safetensors.index.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
    }
    checkpoint = Checkpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.stored(name, torch.device("cpu")), tensor)


def test_the_command_prints_the_directory_or_one_line_of_why_not(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", "qwen2", tokenizer=True, **SHAPE)
    args = ["quantize", str(plain), str(tmp_path / "out"), "--method", "int8", "--json"]
    done = CliRunner().invoke(cli, args, obj={})
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["path"] == str(tmp_path / "out")
    assert summary["quantized_bytes"] < summary["plain_bytes"]
    refused = CliRunner().invoke(cli, args, obj={})
    assert isinstance(refused.exception, Misconfigured)
    assert "exists, and nothing is overwritten" in refused.exception.message


def test_a_flag_that_the_method_does_not_use_is_refused() -> None:
    args = ["quantize", "smollm2-135m", "out", "--method", "int8", "--group-size", "32", "--no-clip"]
    refused = CliRunner().invoke(cli, args, obj={})
    assert isinstance(refused.exception, Misconfigured)
    assert "--method int8 does not use --group-size, --clip; leave" in refused.exception.message
