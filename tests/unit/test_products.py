"""Matrix products of linear layers: beside exact sums, beside oneDNN's, a row alone beside one in company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.engine import Engine
from gristmill.engine.layers.invariant import RowInvariant, invariant
from gristmill.engine.layers.linear import linear
from gristmill.engine.messages import Request
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.native import products
from gristmill.engine.native.build import build
from gristmill.engine.native.library import load
from gristmill.engine.native.products import (
    AMX,
    DOTS,
    Chain,
    Product,
    Products,
    in_use,
    load_products,
    used,
)
from gristmill.engine.quant.int8 import W8A8, Int8
from torch import Tensor

from ..support.engines import tiny_settings
from ..support.flavours import is_arm, kernel_target

SHAPES = [
    (1, 576, 96),
    (5, 70, 50),
    (33, 130, 33),
    (64, 64, 32),
    (700, 96, 70),
    (17, 64, 640),
    (70, 20000, 96),
]
"""Rows, inputs, outputs. Of the last, rows are cut: 70 are more than stay in the cache."""


@pytest.fixture(scope="module")
def ours(kernels: Path) -> Products:
    if is_arm():
        pytest.skip("on ARM linear layers are oneDNN's")
    return Products(build(kernels, "products", kernel_target()), 2)


@pytest.fixture(params=[AMX, DOTS], ids=["amx", "dots"])
def int8_way(ours: Products, request: pytest.FixtureRequest) -> int:
    if not ours.int8_ways & request.param:
        pytest.skip("this CPU has no such instructions")
    return request.param


@pytest.fixture(params=[AMX, DOTS], ids=["amx", "dots"])
def bf16_way(ours: Products, request: pytest.FixtureRequest) -> int:
    if not ours.bf16_ways & request.param:
        pytest.skip("this CPU has no such instructions")
    return request.param


def case(rows: int, inputs: int, outputs: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, inputs, generator=draw) for n in (rows, outputs))
    return x.bfloat16(), weight.bfloat16(), torch.randn(outputs, generator=draw).bfloat16()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_in_bf16_is_the_exact_one_rounded(
    ours: Products, bf16_way: int, shape: tuple[int, int, int]
) -> None:
    x, weight, bias = case(*shape)
    exact = x.double() @ weight.double().T + bias.double()
    said = products.Dense(ours, weight, bias, bf16_way)(x)
    torch.testing.assert_close(said.double(), exact, rtol=2**-8, atol=1e-6 * max(100, shape[1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_in_int8_is_exact_but_for_the_rounding_of_inputs(
    ours: Products, int8_way: int, shape: tuple[int, int, int]
) -> None:
    x, weight, bias = case(*shape)
    packed = Int8.nearest(weight, inputs=True)
    wide = x.float()
    most = wide.abs().amax(1, keepdim=True)
    sums = (wide * (torch.tensor(127.0) / most)).round().double() @ packed.codes.double().T
    exact = sums * (most / 127).double() * packed.scales.double() + bias.double()
    layer = products.Int8(ours, packed.codes, packed.scales, bias, int8_way)
    torch.testing.assert_close(layer(wide).double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x).double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inputs_in_two_parts_are_next_to_exact(
    ours: Products, int8_way: int, shape: tuple[int, int, int]
) -> None:
    x, weight, bias = case(*shape)
    packed = Int8.nearest(weight)
    wide, codes = x.double(), packed.codes.double()
    exact = wide @ codes.T * packed.scales.double() + bias.double()
    said = products.Int8(ours, packed.codes, packed.scales, bias, int8_way, parts=2)(x.float())
    off, bound = (said.double() - exact).abs(), wide.abs().amax(1, keepdim=True) / 64516 * codes.abs().sum(1)
    bound *= packed.scales.double()
    assert bool((off <= bound + 1e-5 + 1e-6 * exact.abs()).all())
    assert off.mean() <= bound.mean() / 8


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("size", [0.0, 1e-35])
def test_a_row_of_next_to_nothing_is_the_bias(ours: Products, int8_way: int, size: float, parts: int) -> None:
    _, weight, bias = case(1, 96, 40)
    packed = Int8.nearest(weight, inputs=True)
    layer = products.Int8(ours, packed.codes, packed.scales, bias, int8_way, parts)
    assert torch.equal(layer(torch.full((3, 96), size).bfloat16()), bias.expand(3, -1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_not_lost(ours: Products, bad: float) -> None:
    """Wherever in a row it stands; and other rows are what they are without it."""
    x, weight, bias = case(9, 200, 40)
    for layer in all_layers(ours, weight, bias):
        clean = layer(x)
        for at in (0, 17, 199):
            spoilt = x.clone()
            spoilt[4, at] = bad
            said = layer(spoilt)
            assert not said[4].isfinite().any()
            said[4] = clean[4]
            assert torch.equal(said, clean)


def test_int8_says_what_onednn_says(ours: Products, int8_way: int) -> None:
    """On and off: the same codes and scales, so the same sums."""
    x, weight, bias = case(37, 192, 80)
    packed = Int8.nearest(weight, inputs=True)
    said = products.Int8(ours, packed.codes, packed.scales, bias, int8_way)(x.float())
    torch.testing.assert_close(said, W8A8(packed, bias)(x.float()), rtol=1e-4, atol=1e-4)


def test_a_row_does_not_see_its_neighbours(ours: Products) -> None:
    x, weight, bias = case(530, 200, 72)
    for layer in all_layers(ours, weight, bias):
        together = layer(x)
        for at, count in ((0, 1), (16, 1), (7, 9), (500, 30), (100, 33)):
            assert torch.equal(layer(x[at : at + count]), together[at : at + count])


@pytest.mark.parametrize(("rows", "inputs"), [(37, 70), (40, 20000)])
@pytest.mark.parametrize("biased", [False, True])
def test_gated_is_what_the_activation_makes_of_both_halves(
    ours: Products, kernels: Path, rows: int, inputs: int, *, biased: bool
) -> None:
    """On and off, to the last bit."""
    x, weight, bias = case(rows, inputs, 96)
    layers = all_layers(ours, weight, bias if biased else None)
    library = load(kernels, torch.bfloat16, 2)
    assert library is not None
    for layer in layers:
        halved = layer.halved()
        assert halved is not None
        assert torch.equal(halved(x), layer(x))
        assert torch.equal(halved.gated(x), library.silu_mul(layer(x)))


@pytest.mark.parametrize(("rows", "inputs"), [(37, 70), (40, 20000)])
@pytest.mark.parametrize("added", [False, True])
def test_normed_is_the_product_of_the_norm(
    ours: Products, kernels: Path, rows: int, inputs: int, *, added: bool
) -> None:
    """On and off, to the last bit, and the residual with it."""
    x, weight, bias = case(rows, inputs, 96)
    norm = torch.rand(inputs).bfloat16()
    library = load(kernels, torch.bfloat16, 2)
    assert library is not None
    for layer in all_layers(ours, weight, bias):
        held = case(rows, inputs, 1, seed=1)[0] if added else None
        also = None if held is None else held.clone()
        expected = layer(library.rms_norm(x, norm, 1e-5, held))
        assert torch.equal(layer.normed(x, (norm, 1e-5), also), expected)
        assert held is None or torch.equal(held, also)


@pytest.mark.parametrize("rows", [0, 1, 5, 40, 530])
@pytest.mark.parametrize("wide", [False, True])
def test_a_chain_says_what_its_products_say_one_by_one(ours: Products, rows: int, *, wide: bool) -> None:
    """On and off, to the last bit, and the residual with it."""
    x, first, bias = case(rows, 96, 64)
    _, up, _ = case(1, 64, 192, seed=1)
    _, down, _ = case(1, 96, 64, seed=2)
    norms = [(torch.rand(64, dtype=torch.float32 if wide else torch.bfloat16), 1e-5) for _ in range(2)]
    x = x.float() if wide else x
    held = torch.randn(rows, 64, dtype=x.dtype)
    for output, gate_up, lower, following in zip(
        *(
            all_layers(ours, *args)
            for args in ((first, bias), (up, None), (down, None), (first[:, :64], None))
        ),
        strict=True,
    ):
        if wide and isinstance(output, products.Dense):
            continue
        halved = gate_up.halved()
        assert halved is not None
        singly, together = held.clone(), held.clone()
        expected = lower(halved.gated(output(x), norms[0], singly))
        expected = following.normed(expected, norms[1], singly)
        chain = Chain([(output, None), (halved, norms[0]), (lower, None), (following, norms[1])])
        assert torch.equal(chain(x, together), expected)
        assert torch.equal(together, singly)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_model_says_the_same_with_chains_and_without(
    ours: Products, kernels: Path, tmp_path: Path, quantize: str | None
) -> None:
    """Prompts and single tokens, to the last bit of their log probabilities."""
    if not (ours.bf16_ways and ours.int8_ways):
        pytest.skip("this CPU has no instructions for them")
    settings = tiny_settings(
        write_tiny(tmp_path),
        attention="cpu",
        dtype="bfloat16",
        quantize=quantize,
        kernel_cache=kernels,
        speculate=0,
    )
    said: list[list[object]] = []
    for chained in (True, False):
        engine = Engine(settings)
        decoder: Any = engine._runner._decoder
        assert [each is not None for each in decoder._onward] == [True, True, False]
        if not chained:
            decoder._onward = [None] * 3
        for n in range(5):
            prompt = [7 * i % 250 + n for i in range(3 + 9 * n)]
            engine.add(Request(id=str(n), prompt_ids=prompt, max_tokens=9, logprobs=4, seed=n))
        said.append([])
        while engine.has_work:
            said[-1] += [(o.id, o.token_ids, o.logprobs) for o in engine.step()]
    assert said[0] == said[1]


GRANITE = {
    "model_type": "granite",
    "architectures": ["GraniteForCausalLM"],
    "residual_multiplier": 0.5,
    "embedding_multiplier": 1.0,
    "attention_multiplier": 0.3,
    "logits_scaling": 1.0,
}


@pytest.mark.parametrize(
    ("config", "knobs", "chained"),
    [
        ({}, {"deterministic": True}, True),
        ({}, {"native_products": False}, False),
        (GRANITE, {}, False),
        ({"num_hidden_layers": 1}, {}, False),
    ],
    ids=["deterministic", "no products", "scaled residual", "one layer"],
)
def test_what_stands_between_two_products_keeps_them_out_of_a_chain(
    ours: Products,
    kernels: Path,
    tmp_path: Path,
    config: dict[str, Any],
    knobs: dict[str, Any],
    *,
    chained: bool,
) -> None:
    """In deterministic mode there is nothing more between them: sums have one order anyway."""
    if not (ours.bf16_ways and ours.int8_ways):
        pytest.skip("this CPU has no instructions for them")
    settings = tiny_settings(
        write_tiny(tmp_path, **config), attention="cpu", dtype="bfloat16", kernel_cache=kernels, **knobs
    )
    decoder: Any = Engine(settings)._runner._decoder
    assert any(each is not None for each in decoder._onward) is chained


def test_halves_that_are_no_whole_tiles_stay_together(ours: Products, int8_way: int) -> None:
    _, weight, _ = case(1, 64, 48)
    packed = Int8.nearest(weight, inputs=True)
    assert products.Int8(ours, packed.codes, packed.scales, None, int8_way).halved() is None


def test_no_rows_are_no_work(ours: Products) -> None:
    _, weight, bias = case(1, 64, 40)
    for layer in all_layers(ours, weight, bias):
        assert layer(torch.zeros(0, 64).bfloat16()).shape == (0, 40)


def test_threads_that_are_too_many_have_nothing_to_do(ours: Products) -> None:
    x, weight, bias = case(9, 64, 70)
    many = Products(Path(ours.library._name), 8)
    for few, alike in zip(all_layers(ours, weight, bias), all_layers(many, weight, bias), strict=True):
        assert torch.equal(few(x), alike(x))


def test_a_way_that_is_not_there_is_not_taken(ours: Products) -> None:
    _, weight, _ = case(1, 64, 40)
    with pytest.raises(AssertionError, match="none of the instructions"):
        products.Dense(ours, weight, None, 0)


def test_layers_use_them_only_where_they_are_told_to(ours: Products) -> None:
    if not (ours.bf16_ways and ours.int8_ways):
        pytest.skip("this CPU has no instructions for them")
    _, weight, bias = case(1, 64, 40)
    packed = Int8.nearest(weight, inputs=True)
    with used(ours):
        assert isinstance(linear(weight, bias), products.Dense)
        assert isinstance(packed.linear(torch.bfloat16, None), products.Int8)
        assert isinstance(invariant(linear, weight), products.Dense)
        assert not isinstance(linear(weight.float()), products.Dense)
        assert not isinstance(packed.linear(torch.float16, None), products.Int8)
        assert isinstance(Int8.nearest(weight).linear(torch.bfloat16, None), products.Int8)
    assert in_use() is None
    assert not isinstance(linear(weight, bias), products.Dense)
    assert isinstance(packed.linear(torch.bfloat16, None), W8A8)
    assert isinstance(invariant(linear, weight), RowInvariant)


def test_kernels_that_compute_something_else_are_not_used(
    ours: Products, kernels: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not ours.int8_ways:
        pytest.skip("this CPU has no instructions for them")
    assert load_products(kernels, 2) is not None
    monkeypatch.setattr(products, "_filled", lambda values: torch.ones(64, dtype=values.dtype))
    assert load_products(kernels, 2) is None
    assert "kernel.unavailable" in caplog.text


def all_layers(ours: Products, weight: Tensor, bias: Tensor | None) -> list[Product]:
    packed = Int8.nearest(weight)
    codes, scales = packed.codes, packed.scales
    layers: list[Product] = []
    for way in (AMX, DOTS):
        if ours.int8_ways & way:
            layers += [products.Int8(ours, codes, scales, bias, way, parts) for parts in (1, 2)]
        if ours.bf16_ways & way:
            layers.append(products.Dense(ours, weight, bias, way))
    return layers
