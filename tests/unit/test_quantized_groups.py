"""AWQ and GPTQ checkpoints mean what their layouts say, and what they cannot mean is refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.quant.grouped import Grouped
from gristmill.schemas.errors import ModelInvalid
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..support.quantized import (
    Store,
    assert_same_model,
    packed_along,
    reconfigure,
    runner,
    spoken,
    write_quantized,
)

GROUP = 32
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": False}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def random_codes(module: str, weight: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """codes [inputs, outputs], scales and zeros [groups, outputs] around the size of ``weight`` [out, in]."""
    generator = torch.Generator().manual_seed(sum(module.encode()))
    outputs, inputs = weight.shape
    groups, top = inputs // GROUP, 2**bits
    codes = torch.randint(0, top, (inputs, outputs), generator=generator)
    size = float(weight.std()) * 4 / top
    scales = ((0.5 + torch.rand(groups, outputs, generator=generator)) * size).half()
    zeros = torch.randint(1, top, (groups, outputs), generator=generator)
    return codes, scales, torch.full_like(zeros, top // 2) if symmetric else zeros


def meant(codes: Tensor, scales: Tensor, zeros: Tensor, group_of: Tensor) -> Tensor:
    """[outputs, inputs]: (code - zero) * scale, each with those of its input's group."""
    return ((codes - zeros[group_of]).float() * scales.float()[group_of]).T


def awq(module: str, weight: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
    codes, scales, zeros = random_codes(module, weight, 4, symmetric=False)
    # Nibble i of a word holds output 0, 2, 4, 6, 1, 3, 5, 7 of its eight.
    order = [8 * word + i for word in range(len(weight) // 8) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    parts = {
        "qweight": packed_along(codes[:, order].T, 4).T,
        "qzeros": packed_along(zeros[:, order].T, 4).T,
        "scales": scales,
    }
    return parts, meant(codes, scales, zeros, torch.arange(weight.shape[1]) // GROUP)


def gptq(bits: int = 4, *, version: int = 1, symmetric: bool = False, act_order: str = "no") -> Store:
    def store(module: str, weight: Tensor) -> tuple[Mapping[str, Tensor], Tensor]:
        codes, scales, zeros = random_codes(module, weight, bits, symmetric)
        inputs = weight.shape[1]
        group_of = torch.arange(inputs) // GROUP
        if act_order != "no":  # "own": every module has an order of its own; "shared": they agree
            seed = inputs if act_order == "shared" else sum(module.encode())
            group_of = group_of[torch.randperm(inputs, generator=torch.Generator().manual_seed(seed))]
        stored = zeros - 1 if version == 1 else zeros
        parts = {
            "qweight": packed_along(codes, bits),
            "qzeros": packed_along(stored.T, bits).T,
            "scales": scales,
            "g_idx": group_of.to(torch.int32),
        }
        return parts, meant(codes, scales, zeros, group_of)

    return store


CHECKPOINTS: dict[str, tuple[dict[str, Any], Store]] = {
    "awq": (AWQ, awq),
    "gptq": (GPTQ, gptq()),
    "gptq-symmetric": ({**GPTQ, "sym": True}, gptq(symmetric=True)),
    "gptq-v2": ({**GPTQ, "checkpoint_format": "gptq_v2"}, gptq(version=2)),
    "gptq-act-order": ({**GPTQ, "desc_act": True}, gptq(act_order="shared")),
    "gptq-act-orders-that-differ": ({**GPTQ, "desc_act": True}, gptq(act_order="own")),
    "gptq-2": ({**GPTQ, "bits": 2}, gptq(2)),
    "gptq-3": ({**GPTQ, "bits": 3}, gptq(3)),
    "gptq-8": ({**GPTQ, "bits": 8}, gptq(8)),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_quantized_model_says_what_its_unpacked_twin_says(kind: str, tmp_path: Path) -> None:
    quantization, store = CHECKPOINTS[kind]
    assert_same_model(*write_quantized(tmp_path, quantization, store))


@pytest.mark.parametrize("kind", ["awq", "gptq-act-order"])
def test_in_bfloat16_it_says_the_same_within_rounding(kind: str, tmp_path: Path) -> None:
    quantized, plain = write_quantized(tmp_path, *CHECKPOINTS[kind])
    exact, packed = spoken(plain)[0], spoken(quantized, dtype="bfloat16")[0]
    dense = spoken(plain, dtype="bfloat16")[0]
    # Scales are rounded to bfloat16 in the packed layer, weights are in the dense one: errors of one size.
    assert (packed - exact).norm() < 2 * (dense - exact).norm() + 0.01 * exact.norm()


def test_deterministic_mode_unpacks_on_load(tmp_path: Path) -> None:
    quantized, plain = write_quantized(tmp_path, AWQ, awq)
    assert torch.equal(spoken(quantized, deterministic=True), spoken(plain, deterministic=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_the_int4_layer_multiplies_what_dense_unpacks(dtype: torch.dtype, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 16, (48, 128), generator=generator)
    scales = torch.rand(48, 2, generator=generator).to(dtype)
    zeros = torch.randint(0, 16, (48, 2), generator=generator)
    packed, bias = Grouped.of(4, codes, scales, zeros), torch.randn(48, generator=generator).to(dtype)
    x = torch.randn(rows, 128, generator=generator).to(dtype)
    expected = x.float() @ packed.dense(torch.float32).T + bias.float()
    off = (packed.linear(dtype, bias)(x).float() - expected).abs()
    assert off.max() <= 4 * torch.finfo(dtype).eps * expected.abs().max() + 1e-4


def damaged(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_a_quantized_tensor_that_is_missing_or_wrong_is_named_with_the_numbers(tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.qweight"] = tensors[f"{Q_PROJ}.qweight"][:, :7].clone()

    def half(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.qzeros"] = tensors[f"{Q_PROJ}.qzeros"].half()

    def lose(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{Q_PROJ}.scales"]

    for number, (change, words) in enumerate(
        [
            (cut, rf"'{Q_PROJ}.qweight' is \[64, 7\], the config says \[64, 8\]"),
            (half, rf"'{Q_PROJ}.qzeros' is F16; I32 is supported"),
            (lose, rf"lacks '{Q_PROJ}.scales'"),
        ]
    ):
        directory, _ = write_quantized(tmp_path / str(number), AWQ, awq, num_hidden_layers=1)
        with pytest.raises(ModelInvalid, match=words):
            runner(damaged(directory, change))


def test_an_input_group_of_another_size_is_refused_by_name(tmp_path: Path) -> None:
    def move(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q_PROJ}.g_idx"][0] = 1

    directory, _ = write_quantized(tmp_path, {**GPTQ, "desc_act": True}, gptq(), num_hidden_layers=1)
    with pytest.raises(ModelInvalid, match=rf"{Q_PROJ}.g_idx puts 31 to 33 inputs into a group.*32 in each"):
        runner(damaged(directory, move))


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({**AWQ, "version": "gemv"}, "version is 'gemv'; gemm is supported"),
        ({**AWQ, "bits": 8}, "bits is 8; 4 is supported"),
        ({**AWQ, "group_size": 48}, r"q_proj has 64 inputs and 64 outputs.*multiples of 48"),
        ({**AWQ, "quant_method": "quip"}, "quant_method 'quip' is not supported; awq, "),
        ({**GPTQ, "bits": 5}, "bits is 5; 2, 3, 4, 8 are supported"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        ({**GPTQ, "dynamic": {"-:.*": {}}}, "dynamic"),
        ("awq", "quantization_config is 'awq', expected an object"),
    ],
)
def test_a_layout_that_is_not_supported_is_refused_by_field(
    quantization: Any, words: str, tmp_path: Path
) -> None:
    directory, _ = write_quantized(tmp_path, AWQ, awq, num_hidden_layers=1)
    reconfigure(directory, quantization_config=quantization)
    with pytest.raises(ModelInvalid, match=words):
        runner(directory)


def test_a_checkpoint_that_is_not_what_its_config_says_is_refused(tmp_path: Path) -> None:
    _, plain = write_quantized(tmp_path, AWQ, awq, num_hidden_layers=1)
    reconfigure(plain, quantization_config=AWQ)
    with pytest.raises(ModelInvalid, match="says awq, and no tensor of the checkpoint is stored that way"):
        runner(plain)
