"""Linear layers: the packed one where its self-test passes, the plain one elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from gristmill.engine.layers import linear as layers
from torch import Tensor


@pytest.fixture(autouse=True)
def tried_anew() -> Iterator[None]:
    layers.packing_works.cache_clear()
    yield
    layers.packing_works.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_both_kinds_of_layer_agree(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 64), torch.randn(96), torch.randn(7, 64)
    layer = layers.linear(weight.to(dtype), bias.to(dtype))
    expected = torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias.to(dtype))
    torch.testing.assert_close(layer(x.to(dtype)), expected, rtol=4 * torch.finfo(dtype).eps, atol=0.05)


@pytest.mark.parametrize(
    "broken",
    [lambda y: y + 0.01, lambda y: y * 1.01, lambda y: y * float("nan"), lambda y: y[:, :-1]],
    ids=["offset", "scale", "nan", "shape"],
)
def test_an_op_that_computes_something_else_is_not_used(
    broken: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = layers._packed_op()
    monkeypatch.setattr(layers, "_packed_op", lambda: lambda *args: broken(real(*args)))
    weight = torch.randn(8, 16)
    assert torch.equal(layers.linear(weight)(torch.eye(16)), weight.T)
    assert "linear.packing_unavailable" in caplog.text
