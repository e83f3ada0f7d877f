"""int8 and FP8 weights, from compressed-tensors and FP8 checkpoints, mean what their layouts say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.quant.int8 import Int8
from gristmill.engine.reference import Reference
from gristmill.schemas.errors import ModelInvalid
from torch import Tensor

from ..support.quantized import (
    PROMPT,
    Store,
    assert_same_model,
    packed_along,
    reconfigure,
    runner,
    spoken,
    write_quantized,
)

GROUP, BLOCK = 32, 48  # blocks of 48 end within 64 rows and columns: the last ones are cut


def compressed(form: str, weights: dict[str, Any], **group: Any) -> dict[str, Any]:
    described = {"targets": ["Linear"], "weights": weights, "input_activations": None, **group}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": described}}


def generator(module: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(module.encode()))


def pack_quantized(
    bits: int, *, symmetric: bool = True, act_order: bool = False, channel: bool = False
) -> Store:
    """Signed numbers, kept with 2^(bits - 1) added; zeros are packed down the outputs."""

    def store(module: str, weight: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        random = generator(module)
        outputs, inputs = weight.shape
        groups, half = 1 if channel else inputs // GROUP, 2 ** (bits - 1)
        codes = torch.randint(-half, half, weight.shape, generator=random)
        scales = (
            (0.5 + torch.rand(outputs, groups, generator=random)) * float(weight.std()) / half
        ).bfloat16()
        zeros = torch.zeros(outputs, groups, dtype=torch.int64)
        group_of = torch.zeros(inputs, dtype=torch.int64) if channel else torch.arange(inputs) // GROUP
        parts = {
            "weight_packed": packed_along((codes + half).T, bits).T,
            "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        if not symmetric:
            zeros = torch.randint(-half, half, (outputs, groups), generator=random)
            parts["weight_zero_point"] = packed_along(zeros + half, bits)
        if act_order:
            group_of = group_of[torch.randperm(inputs, generator=random)]
            parts["weight_g_idx"] = group_of.to(torch.int32)
        return parts, (codes - zeros[:, group_of]).float() * scales.float()[:, group_of]

    return store


def int8(module: str, weight: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scales).round()
    return {"weight": codes.to(torch.int8), "weight_scale": scales}, codes * scales


def fp8(scale: str, name: str = "weight_scale") -> Store:
    def store(module: str, weight: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        outputs, inputs = weight.shape
        rows, columns = torch.arange(outputs), torch.arange(inputs)
        if scale == "block":
            down, across = rows // BLOCK, columns // BLOCK
        else:
            down, across = (torch.zeros_like(rows) if scale == "tensor" else rows), torch.zeros_like(columns)
        scales = 0.001 + torch.rand(int(down[-1]) + 1, int(across[-1]) + 1, generator=generator(module)) / 100
        wide = scales[down][:, across]
        codes = (weight / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        meant = torch.tensor([e4m3(byte) for byte in codes.view(torch.uint8).flatten().tolist()])
        stored = scales.reshape(()) if scale == "tensor" else scales
        return {"weight": codes, name: stored}, meant.view(outputs, inputs) * wide

    return store


def e4m3(byte: int) -> float:
    """Sign, four bits of exponent with a bias of 7, three of mantissa; exponent 0: no leading one."""
    sign, exponent, mantissa = -1 if byte & 128 else 1, (byte >> 3) & 15, byte & 7
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


INTS = {"type": "int", "symmetric": True}
W4 = {**INTS, "num_bits": 4, "strategy": "group", "group_size": GROUP}
W8 = {**INTS, "num_bits": 8, "strategy": "channel"}
F8 = {"type": "float", "num_bits": 8, "symmetric": True}
TENSOR = compressed("float-quantized", {**F8, "strategy": "tensor"})

CHECKPOINTS: dict[str, tuple[dict[str, Any], Store]] = {
    "w4a16": (compressed("pack-quantized", W4), pack_quantized(4)),
    "w4a16-asymmetric-act-order": (
        compressed("pack-quantized", {**W4, "symmetric": False, "actorder": "group"}),
        pack_quantized(4, symmetric=False, act_order=True),
    ),
    "w8a16-channel": (compressed("pack-quantized", W8), pack_quantized(8, channel=True)),
    "int8-weights": (compressed("int-quantized", W8), int8),
    "fp8-tensor": (TENSOR, fp8("tensor")),
    "fp8-channel": (compressed("float-quantized", {**F8, "strategy": "channel"}), fp8("channel")),
    "fp8-blocks": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]},
        fp8("block", "weight_scale_inv"),
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8"}, fp8("channel")),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_quantized_model_says_what_its_unpacked_twin_says(kind: str, tmp_path: Path) -> None:
    quantization, store = CHECKPOINTS[kind]
    assert_same_model(*write_quantized(tmp_path, quantization, store))


def test_int8_inputs_change_what_is_said_by_their_rounding_only(tmp_path: Path) -> None:
    quantization = compressed("int-quantized", W8, input_activations={"num_bits": 8, "dynamic": True})
    quantized, plain = write_quantized(tmp_path, quantization, int8)
    assert torch.equal(Reference(quantized).logits(PROMPT), Reference(plain).logits(PROMPT))
    exact, rounded = spoken(plain)[0], spoken(quantized)[0]
    assert 0 < (rounded - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_the_int8_layer_multiplies_rounded_inputs_exactly(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    packed = Int8.nearest(torch.randn(48, 96, generator=generator), inputs=True)
    bias, x = torch.randn(48, generator=generator), torch.randn(rows, 96, generator=generator)
    size = x.abs().amax(1, keepdim=True) / 127
    rounded = (x / size).round()
    expected = (rounded @ packed.codes.float().T) * packed.scales * size + bias
    torch.testing.assert_close(packed.linear(torch.float32, bias)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_and_many_rows_meet_the_same_int8_weight(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    packed = Int8.nearest(torch.randn(48, 96, generator=generator))
    bias, x = torch.randn(48).to(dtype), torch.randn(20, 96, generator=generator).to(dtype)
    layer, expected = packed.linear(dtype, bias), x.float() @ packed.dense(torch.float32).T + bias.float()
    for rows in (1, 8, 9, 20):
        off = (layer(x[:rows]).float() - expected[:rows]).abs().max()
        assert off <= 8 * torch.finfo(dtype).eps * expected.abs().max() + 1e-5


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        (compressed("marlin-24", W4), "format 'marlin-24' of int weights is not supported"),
        ({**TENSOR, "config_groups": {}}, "config_groups holds 0 groups; one is supported"),
        (compressed("pack-quantized", {**W4, "num_bits": 3}), "num_bits is 3; 2, 4 and 8 are supported"),
        (compressed("float-quantized", {**F8, "strategy": "group"}), "strategy 'group' is not supported"),
        (compressed("int-quantized", W8), "q_proj.weight' is F8_E4M3; I8 is supported"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt is 'e5m2'; e4m3 is supported"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\], expected two"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "lacks '.*weight_scale_inv'"),
    ],
)
def test_a_layout_that_is_not_supported_is_refused_by_name(
    quantization: Any, words: str, tmp_path: Path
) -> None:
    directory, _ = write_quantized(tmp_path, TENSOR, fp8("tensor"), num_hidden_layers=1, intermediate_size=64)
    reconfigure(directory, quantization_config=quantization)
    with pytest.raises(ModelInvalid, match=words):
        runner(directory)
