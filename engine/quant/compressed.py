"""compressed-tensors checkpoints, as llm-compressor writes them: W8A8 and W4A16, in int8, packed, or FP8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..models.config import Config
from ..weights import Stored
from .fp8 import FP8, Fp8, block_scales, checked_block, per_tensor_or_row
from .grouped import Grouped, column_order, unpack_bits
from .int8 import Int8
from .method import INT32, Method, Site, divided
from .packed import Packed

INT8 = frozenset({"I8"})
INTEGERS = frozenset({"I8", "I32", "I64"})
UNREAD = {
    name: Stored(None, INTEGERS | FP8 | {"BF16", "F16", "F32"}, optional=True)
    for name in ("input_scale", "input_zero_point", "weight_shape")
}
"""Scales of inputs that were fixed in advance: ours come from the inputs themselves, or are not needed."""
MARKS = ("weight_scale", "weight_packed")


def compressed_tensors(_model: Config, config: Config) -> Method:
    """The method of the one group of settings. Raises ModelInvalid where there are several, or others."""
    groups: Any = config.values.get("config_groups")
    if not isinstance(groups, dict) or len(cast("dict[str, Any]", groups)) != 1:
        count = len(cast("dict[str, Any]", groups)) if isinstance(groups, dict) else 0
        raise config.invalid(f"config_groups holds {count} groups; one is supported")
    sparsity: Any = config.values.get("sparsity_config") or {}
    if sparsity.get("format", "dense") != "dense":
        raise config.invalid(f"sparsity format {sparsity['format']!r} is not supported; dense is")
    (name, group), *_ = cast("dict[str, dict[str, Any]]", groups).items()
    weights = Config(group.get("weights") or {}, f"{config.source}: config_groups.{name}.weights")
    form = group.get("format") or config.text("format", "")
    key = (form, weights.text("type", "int"))
    if key == ("pack-quantized", "int"):
        return PackedInts(weights)
    if key in (("int-quantized", "int"), ("naive-quantized", "int")):
        return PlainInts(weights, inputs=bool(group.get("input_activations")))
    if key in (("float-quantized", "float"), ("naive-quantized", "float")):
        return Floats8(weights)
    raise config.invalid(
        f"format {form!r} of {key[1]} weights is not supported; pack-quantized, int-quantized and "
        "float-quantized are"
    )


class PackedInts:
    """``pack-quantized``: offset codes of 4 or 8 bits along the inputs, low bits first."""

    name = "compressed-tensors"
    marks = MARKS

    def __init__(self, weights: Config) -> None:
        self._config = weights
        self._bits = weights.integer("num_bits")
        if self._bits not in (2, 4, 8):
            raise weights.invalid(f"num_bits is {self._bits}; 2, 4 and 8 are supported")
        strategy = weights.text("strategy", "group")
        if strategy not in ("group", "channel"):
            raise weights.invalid(f"strategy {strategy!r} is not supported here; group and channel are")
        self._group = weights.integer("group_size") if strategy == "group" else 0
        self._symmetric = weights.boolean("symmetric", True)

    def tensors(self, site: Site) -> Mapping[str, Stored]:
        group, whole = self._group or site.columns, 32 // self._bits
        divided(self._config, site, inputs=group)
        divided(self._config, site, inputs=whole, outputs=1 if self._symmetric else whole)
        groups = site.columns // group
        zeros = Stored((site.rows * self._bits // 32, groups), INT32)
        return UNREAD | {
            "weight_packed": Stored((site.rows, site.columns // whole), INT32),
            "weight_scale": Stored((site.rows, groups)),
            "weight_g_idx": Stored((site.columns,), INT32, optional=True),
            **({} if self._symmetric else {"weight_zero_point": zeros}),
        }

    def read(self, site: Site, found: Mapping[str, Tensor]) -> Packed:
        codes = unpack_bits(found["weight_packed"], self._bits, site.columns)
        scales = found["weight_scale"]
        if self._symmetric:
            zeros = torch.full_like(scales, 2 ** (self._bits - 1))
        else:
            zeros = unpack_bits(found["weight_zero_point"].T, self._bits, site.rows).T
        order = None
        if "weight_g_idx" in found:
            g_idx = found["weight_g_idx"]
            order = column_order(self._config, f"{site.module}.weight_g_idx", g_idx, scales.shape[1])
        return Grouped.of(self._bits, codes if order is None else codes[:, order], scales, zeros, order)


class PlainInts:
    """``int-quantized``: int8, a scale for each output or one for all."""

    name = "compressed-tensors"
    marks = MARKS

    def __init__(self, weights: Config, *, inputs: bool) -> None:
        if weights.integer("num_bits") != 8 or not weights.boolean("symmetric", True):
            raise weights.invalid("symmetric weights of 8 bits are supported in this format")
        strategy = weights.text("strategy", "channel")
        if strategy not in ("tensor", "channel"):
            raise weights.invalid(f"strategy {strategy!r} is not supported here; tensor and channel are")
        self._inputs = inputs

    def tensors(self, site: Site) -> Mapping[str, Stored]:
        weight = Stored((site.rows, site.columns), INT8)
        return UNREAD | {"weight": weight, "weight_scale": per_tensor_or_row(site)}

    def read(self, site: Site, found: Mapping[str, Tensor]) -> Int8:
        scales = found["weight_scale"].float().reshape(-1).expand(site.rows).contiguous()
        return Int8(found["weight"], scales, self._inputs)


class Floats8:
    """``float-quantized``: FP8, a scale for each output, for each block, or one for all."""

    name = "compressed-tensors"
    marks = MARKS

    def __init__(self, weights: Config) -> None:
        if weights.integer("num_bits") != 8:
            raise weights.invalid(f"floats of {weights.integer('num_bits')} bits are not supported; 8 are")
        strategy = weights.text("strategy", "tensor")
        if strategy not in ("tensor", "channel", "block"):
            raise weights.invalid(f"strategy {strategy!r} is not supported; tensor, channel and block are")
        block = weights.values.get("block_structure")
        self._block = checked_block(weights, "block_structure", block) if strategy == "block" else None

    def tensors(self, site: Site) -> Mapping[str, Stored]:
        scale = per_tensor_or_row(site) if self._block is None else block_scales(site, self._block)
        return UNREAD | {"weight": Stored((site.rows, site.columns), FP8), "weight_scale": scale}

    def read(self, site: Site, found: Mapping[str, Tensor]) -> Fp8:
        assert found["weight"].shape == (site.rows, site.columns)
        return Fp8.of(found["weight"], found["weight_scale"], *(self._block or ()))
