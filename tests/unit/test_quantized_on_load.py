"""Plain checkpoints quantized on load, and those that bitsandbytes quantized before."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.quant.codebook import FP4, NF4, Codebook
from gristmill.engine.quant.onload import ON_LOAD
from gristmill.schemas.errors import Misconfigured, ModelInvalid
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..support.flavours import cpu_flags
from ..support.quantized import SHAPE, Store, assert_same_model, reconfigure, runner, spoken, write_quantized

BLOCK, NESTED = 64, 4
VALUES = {"nf4": NF4, "fp4": FP4}
RELATIVE = {"nf4": 0.12, "fp4": 0.16, "int8": 0.012, "eetq": 0.012, "fp8": 0.035}
"""The error that rounding may leave in normally distributed weights, as a part of their norm."""


def four_bits(kind: str, *, nested: bool) -> tuple[dict[str, Any], Store]:
    """bitsandbytes' own layout: scales of blocks in rows, themselves in 8 bits when nested."""

    def store(module: str, weight: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        random = torch.Generator().manual_seed(sum(module.encode()))
        outputs, inputs = weight.shape
        values, count = torch.tensor(VALUES[kind]), outputs * inputs // BLOCK
        codes = torch.randint(0, 16, (outputs * inputs,), generator=random)
        state: dict[str, Any] = {"quant_type": kind, "blocksize": BLOCK, "shape": [outputs, inputs]}
        parts = {
            "weight": (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
            "weight.quant_map": values,
        }
        if nested:
            state |= {"nested_blocksize": NESTED, "nested_offset": 0.04}
            inner = torch.randint(0, 256, (count,), generator=random)
            outer, table = torch.rand(count // NESTED, generator=random), torch.linspace(0, 0.1, 256)
            scales = table[inner] * outer[torch.arange(count) // NESTED] + 0.04
            parts |= {
                "weight.absmax": inner.to(torch.uint8),
                "weight.nested_absmax": outer,
                "weight.nested_quant_map": table,
            }
        else:
            scales = parts["weight.absmax"] = torch.rand(count, generator=random) / 5
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        )
        return parts, (values[codes] * scales[torch.arange(len(codes)) // BLOCK]).view(outputs, inputs)

    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
    }
    return config, store


def eight_bits(module: str, weight: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
    largest = weight.abs().amax(1)
    codes = (weight / largest[:, None] * 127).round()
    parts = {
        "weight": codes.to(torch.int8),
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    return parts, codes * (largest / 127)[:, None]


CHECKPOINTS: dict[str, tuple[dict[str, Any], Store]] = {
    "nf4": four_bits("nf4", nested=False),
    "fp4-nested": four_bits("fp4", nested=True),
    "int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, eight_bits),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_bitsandbytes_checkpoint_says_what_its_unpacked_twin_says(kind: str, tmp_path: Path) -> None:
    quantization, store = CHECKPOINTS[kind]
    assert_same_model(*write_quantized(tmp_path, quantization, store))


def test_a_bitsandbytes_weight_that_is_not_as_described_is_refused_by_name(tmp_path: Path) -> None:
    directory, _ = write_quantized(tmp_path, *CHECKPOINTS["nf4"], num_hidden_layers=1)
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight.absmax"
    save_file(tensors | {name: tensors[name][1:].clone()}, directory / "model.safetensors")
    with pytest.raises(ModelInvalid, match="absmax holds 63 scales; 64 blocks of 64 need one each"):
        runner(directory)


@pytest.mark.parametrize("kind", ON_LOAD)
def test_rounding_on_load_leaves_an_error_of_the_expected_size(kind: str) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    off = (ON_LOAD[kind](weight).dense(torch.float32) - weight).norm() / weight.norm()
    assert RELATIVE[kind] / 3 < off < RELATIVE[kind]


@pytest.mark.parametrize("kind", VALUES)
def test_four_bits_take_the_nearest_value(kind: str) -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    weight[0, :64] = 0
    packed, values = Codebook.nearest(weight, kind), torch.tensor(VALUES[kind])
    blocks = weight.view(8, 2, 64)
    scales = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    nearest = values[(blocks / scales)[..., None].sub(values).abs().argmin(-1)] * scales
    torch.testing.assert_close(packed.dense(torch.float32), nearest.view(8, 128), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8", "bitsandbytes"])
def test_a_model_quantized_on_load_says_what_its_rounded_weights_say(kind: str, tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "plain", "qwen2", **SHAPE)
    packed = spoken(directory, quantize=kind)[0]
    rounded = spoken(directory, quantize=kind, deterministic=True)[0]
    # int8 rounds the inputs, too, except where deterministic mode unpacks.
    assert (packed - rounded).norm() <= (0.1 if kind == "int8" else 1e-4) * rounded.norm()
    assert (rounded - spoken(directory)[0]).norm() > 1e-3 * rounded.norm()


def test_int8_rounds_the_output_layers_weights_too_unless_told_not_to(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "plain", "qwen2", **SHAPE)
    knobs: dict[str, Any] = {"quantize": "int8", "dtype": "bfloat16"}
    whole, kept = (spoken(directory, **knobs, quantize_head=head)[0] for head in (True, False))
    assert (whole - kept).norm() <= 0.02 * kept.norm()
    assert torch.equal(whole, kept) == cpu_flags().isdisjoint({"amx_int8", "avx512_vnni"})
    assert torch.equal(
        spoken(directory, dtype="bfloat16", quantize_head=False), spoken(directory, dtype="bfloat16")
    )


def test_what_cannot_be_quantized_that_way_is_refused(tmp_path: Path) -> None:
    narrow = write_tiny(tmp_path / "narrow", "llama")
    with pytest.raises(Misconfigured, match=r"nf4 takes multiples of 64 inputs, and a layer .* has 48"):
        runner(narrow, quantize="nf4")
    with pytest.raises(Misconfigured, match="quantize=awq reads checkpoints stored that way"):
        runner(narrow, quantize="awq")
    stored, _ = write_quantized(tmp_path, *CHECKPOINTS["int8"], num_hidden_layers=1)
    runner(stored, quantize="bitsandbytes")
    with pytest.raises(Misconfigured, match="quantize=nf4, and the checkpoint is quantized as bitsandbytes"):
        runner(stored, quantize="nf4")
    reconfigure(stored, quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelInvalid, match="neither load_in_4bit nor load_in_8bit"):
        runner(stored)
