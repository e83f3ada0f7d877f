"""The built matrix products, for linear layers made while they are ``used``.

A context instead of an argument: layers are made in many places (dense, quantized, stored or on load), and
which kernels a machine has is no business of theirs.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from .build import BuildFailed, build

log = logging.getLogger(__name__)

PANEL = 32
"""Outputs that are worked on together, two tiles: arrays of outputs are filled up to a multiple."""
TILE, TILE_BYTES = 16, 1024
AMX, DOTS = 1, 2
"""Ways to multiply: the matrix unit, the faster one, and dot products of vectors. Their sum: both."""
PLAIN, HALVES, GATED = 0, 1, 2
TOLERANCE = 2**-7
"""Of the largest result: a rounding to bf16."""
_p, _i, _q, _f = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "gm_product_ways": (_i, (_i,)),
    "gm_packed_bytes": (_q, (_i, _i)),
    "gm_pack": (None, (_p, _p, _i, _i, _i)),
    "gm_product": (None, (_p, _p, _p, _q, _i, _i, _p, _p, _f)),
    "gm_chain": (None, (_p, _i, _p, _p, _q, _i, _p, _p, _q)),
}


class _Layer(ctypes.Structure):
    """What a call needs to know of a weight, laid out once: products.cpp reads it."""

    _fields_ = (
        *((name, _p) for name in ("packed", "bias", "scales", "ones")),
        *((name, _i) for name in ("outputs", "inputs", "parts", "way", "threads")),
    )


class _Link(ctypes.Structure):
    """A product in a chain, likewise."""

    _fields_ = (("layer", _p), ("norm", _p), ("eps", _f), ("form", _i))


class Products:
    """What this machine's kernels multiply. A product's row is the same bits whatever the other rows are."""

    def __init__(self, path: Path, threads: int) -> None:
        self.library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, result
        self.threads = threads
        self.bf16_ways: int = self.library.gm_product_ways(0)
        self.int8_ways: int = self.library.gm_product_ways(1)

    def pack(self, weight: Tensor) -> Tensor:
        """``weight`` [out, in], bfloat16 or int8, as the kernels read it: bytes."""
        weight = weight.contiguous()
        outputs, row_bytes = len(weight), weight.shape[1] * weight.element_size()
        packed = torch.empty(self.library.gm_packed_bytes(outputs, row_bytes), dtype=torch.uint8)
        self.library.gm_pack(packed.data_ptr(), weight.data_ptr(), outputs, row_bytes, self.threads)
        return packed


NormOf = tuple[Tensor, float]
"""Of a row before it is multiplied: an RMS norm's weight, in the dtype of x, and its eps."""


class Product:
    """x [rows, in] times a weight [out, in], packed."""

    def __init__(
        self,
        products: Products,
        ways: int,
        weight: Tensor,
        bias: Tensor | None,
        arrays: tuple[Tensor, ...] = (),
        parts: int = 0,
    ) -> None:
        """``ways``: of which the faster is taken. ``weight``: what is packed. ``arrays``: numbers for each
        output beside the bias. ``parts`` of int8 that a number of x is in; 0: bfloat16."""
        assert ways, "this CPU has none of the instructions asked for"
        self.products, self._threads = products, products.threads
        self._multiplied = products.library.gm_product
        self._way, self._parts = AMX if ways & AMX else ways, parts
        self._outputs, self.inputs = weight.shape
        self._weight = products.pack(weight)
        self._arrays = [_filled(each) for each in arrays]
        self._bias = None if bias is None else _filled(bias.float())
        self._form = PLAIN
        self._lay_out()

    @property
    def takes_float(self) -> bool:
        """x may be float32, too."""
        return self._parts > 0

    @property
    def width(self) -> int:
        """Of what comes out: of a ``halved`` one, gated."""
        return self._outputs // 2 if self._form == HALVES else self._outputs

    def link(self, norm: NormOf | None) -> _Link:
        """Its part of a chain."""
        weight, eps = (None, 0.0) if norm is None else (norm[0].data_ptr(), norm[1])
        return _Link(self._address, weight, eps, GATED if self._form == HALVES else PLAIN)

    def _lay_out(self) -> None:
        places = (self._weight, self._bias, *(self._arrays or (None, None)))
        sizes = (self._outputs, self.inputs, self._parts, self._way, self._threads)
        self._layer = _Layer(*(None if each is None else each.data_ptr() for each in places), *sizes)
        self._address = ctypes.addressof(self._layer)

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, out], in the dtype of ``x``."""
        return self._multiply(x, self._form, self._outputs)

    def normed(self, x: Tensor, norm: NormOf, residual: Tensor | None = None) -> Tensor:
        """Of the RMS norm of ``x``, or of ``residual + x`` with the sum left in ``residual``."""
        return self._multiply(x, self._form, self._outputs, norm, residual)

    def gated(self, x: Tensor, norm: NormOf | None = None, residual: Tensor | None = None) -> Tensor:
        """silu(first) * second for the halves [rows, out / 2] of what a call says: of a ``halved`` one.

        With a norm: as ``normed``.
        """
        assert self._form == HALVES
        return self._multiply(x, GATED, self._outputs // 2, norm, residual)

    def halved(self) -> Self | None:
        """The same, its halves worked on side by side: for ``gated``. None: they are no whole tiles."""
        if self._outputs % PANEL:
            return None
        found = copy(self)
        found._form = HALVES
        tiles = self._weight.view(self._outputs // PANEL, -1, 2, TILE_BYTES).transpose(1, 2)
        found._weight = _paired(tiles.flatten(0, 1)).transpose(1, 2).contiguous().flatten()
        found._arrays = [_paired(each.view(-1, TILE)).flatten() for each in self._arrays]
        found._bias = None if self._bias is None else _paired(self._bias.view(-1, TILE)).flatten()
        found._lay_out()
        return found

    def _multiply(
        self, x: Tensor, form: int, width: int, norm: NormOf | None = None, residual: Tensor | None = None
    ) -> Tensor:
        rows, inputs = x.shape
        wide = x.dtype == torch.float32
        assert inputs == self.inputs, (x.shape, self.inputs)
        assert x.dtype == torch.bfloat16 or (wide and self.takes_float), x.dtype
        x = x.contiguous()
        out = x.new_empty(rows, width)
        weight, left, eps = None, None, 0.0
        if norm is not None:
            assert residual is None or residual.is_contiguous()
            weight, left, eps = norm[0].data_ptr(), None if residual is None else residual.data_ptr(), norm[1]
        self._multiplied(self._address, out.data_ptr(), x.data_ptr(), rows, form, wide, weight, left, eps)
        return out


Link = tuple["Product", NormOf | None]
"""A product, and the norm of what it is given."""


class Chain:
    """Products one behind another in one call: what one says, a ``halved`` one gated, is the next one's x.

    A step of few rows spends as long between two calls as in one of them. The bits are those of single calls.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        products = [product for product, _ in links]
        assert len(links) > 1, "a chain of one"
        assert all(a.width == b.inputs for a, b in pairwise(products)), [p.width for p in products]
        self._inputs = products[0].inputs
        self._takes_float = all(product.takes_float for product in products)
        self._kept = tuple(links)  # what the addresses below are of
        self._links = (_Link * len(links))(*(product.link(norm) for product, norm in links))
        self._call = links[0][0].products.library.gm_chain
        *inner, self._width = (product.width for product, _ in links)
        self._widest = max(inner)

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """[rows, out of the last]. Each norm adds what it is given to ``residual`` and norms the sum."""
        rows, wide, size = len(x), x.dtype == torch.float32, x.element_size()
        assert x.shape[1] == self._inputs, (x.shape, self._inputs)
        assert x.dtype == torch.bfloat16 or (wide and self._takes_float), x.dtype
        assert residual.is_contiguous(), residual.stride()
        assert residual.dtype == x.dtype, residual.dtype
        x, between = x.contiguous(), x.new_empty(2, rows, self._widest)
        out = x.new_empty(rows, self._width)
        places = (out.data_ptr(), x.data_ptr(), rows, wide, residual.data_ptr(), between.data_ptr())
        self._call(self._links, len(self._links), *places, rows * self._widest * size)
        return out


class Dense(Product):
    """A weight in bfloat16; so is x."""

    def __init__(
        self, products: Products, weight: Tensor, bias: Tensor | None, ways: int = AMX | DOTS
    ) -> None:
        super().__init__(products, ways & products.bf16_ways, weight, bias)


class Int8(Product):
    """int8 codes [out, in], a scale for each output; x is bfloat16 or float32.

    ``parts`` 1: each row of x is rounded to int8 by its largest number (W8A8). 2: to int8, and what is left
    again: off by 1/64516 of the largest at most, for twice the work.
    """

    def __init__(
        self,
        products: Products,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        ways: int = AMX | DOTS,
        parts: int = 1,
    ) -> None:
        arrays = (scales.float(), codes.sum(1, dtype=torch.int32))
        super().__init__(products, ways & products.int8_ways, codes, bias, arrays, parts)


_USED: ContextVar[Products | None] = ContextVar("products", default=None)


def in_use() -> Products | None:
    """What layers are to be made with; None: without."""
    return _USED.get()


@contextmanager
def used(products: Products | None) -> Generator[None]:
    """Layers that are made within use these."""
    token = _USED.set(products)
    try:
        yield
    finally:
        _USED.reset(token)


def load_products(cache: Path, threads: int) -> Products | None:
    """The kernels, built if need be, and tried; or None with a logged reason: then oneDNN does the work."""
    try:
        products = Products(build(cache, "products"), threads)
        if not (products.bf16_ways or products.int8_ways):
            return None  # this CPU has no instructions for them
        _try_out(products)
    # OSError: dlopen refused it; AttributeError: not our library
    except (BuildFailed, OSError, AttributeError, _Wrong) as exc:
        log.warning("kernel.unavailable", extra={"kernel": "products", "reason": str(exc)})
        return None
    return products


class _Wrong(Exception):
    """The kernels compute something else."""


def _try_out(products: Products) -> None:
    """On known numbers, without torch's generators, which a quick start does not load. Raises _Wrong."""
    weight, bias = _numbers(40, 96), _numbers(1, 40)[0]
    for rows in (1, 19, 33):
        x = _numbers(rows, 96)
        exact = x.float() @ weight.float().T + bias.float()
        scales, codes = torch.full((40,), 1 / 8), (weight.float() * 8).to(torch.int8)
        for way in (AMX, DOTS):
            if products.bf16_ways & way:
                _compare(Dense(products, weight, bias, way)(x), exact)
            if products.int8_ways & way:
                _compare(Int8(products, codes, scales, bias, way)(x.float()), exact, 0.03)
                _compare(Int8(products, codes, scales, bias, way, parts=2)(x.float()), exact, 2**-13)


def _numbers(rows: int, columns: int) -> Tensor:
    """Eighths from -2 to 2, in no simple order."""
    return ((torch.arange(rows * columns).view(rows, columns) * 7919 % 33 - 16) / 8).to(torch.bfloat16)


def _compare(said: Tensor, exact: Tensor, tolerance: float = TOLERANCE) -> None:
    off = (said.float() - exact).abs().max().item()
    if not off <= tolerance * exact.abs().max().item():
        raise _Wrong(f"{len(exact)} rows: off by {off:g} where {exact.abs().max().item():g} is the largest")


def _filled(values: Tensor) -> Tensor:
    """Zeros up to a multiple of PANEL."""
    return torch.nn.functional.pad(values, (0, -len(values) % PANEL)).contiguous()


def _paired(tiles: Tensor) -> Tensor:
    """[2n, …], the halves' tiles one after another, to [n, 2, …]."""
    return tiles.view(2, len(tiles) // 2, *tiles.shape[1:]).transpose(0, 1)
