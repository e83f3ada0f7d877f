"""``quantize``: linears of a plain checkpoint quantized while they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ...schemas.errors import Misconfigured
from ..layers.invariant import Make
from ..layers.linear import Linear
from .codebook import BLOCK, Codebook
from .fp8 import Fp8
from .int8 import Int8
from .packed import Packed

Pack = Callable[[Tensor], Packed]
"""A weight [rows, columns] → nearly the same, packed."""


def _four_bits(kind: str, weight: Tensor) -> Codebook:
    if weight.shape[1] % BLOCK:
        raise Misconfigured(
            f"quantize={kind} takes multiples of {BLOCK} inputs, and a layer of this model has "
            f"{weight.shape[1]}; quantize=eetq and int8 take any"
        )
    return Codebook.nearest(weight, kind)


ON_LOAD: dict[str, Pack] = {
    "nf4": partial(_four_bits, "nf4"),
    "fp4": partial(_four_bits, "fp4"),
    "int8": partial(Int8.nearest, inputs=True),
    "eetq": Int8.nearest,
    "fp8": Fp8.nearest,
}
ALIASES = {"bitsandbytes": "eetq", "bitsandbytes-nf4": "nf4", "bitsandbytes-fp4": "fp4"}
"""TGI's names. Its bitsandbytes keeps outliers of the inputs apart to multiply the rest in int8; with inputs
as they are there is nothing to keep apart."""


def quantizing(quantize: str | None, stored: str | None, make: Make, *, unpack: bool) -> Make:
    """What makes the layers: ``make`` if nothing is to be done, else layers over packed weights.

    ``stored`` names how the checkpoint is quantized already: it may be asked for again, but not otherwise.
    ``unpack``: packed, and unpacked again for ``make``. Raises Misconfigured.
    """
    name = ALIASES.get(quantize or "", quantize)
    if name is None or stored in (name, quantize):
        return make
    if stored is not None:
        raise Misconfigured(f"quantize={quantize}, and the checkpoint is quantized as {stored}; leave it out")
    if name not in ON_LOAD:
        raise Misconfigured(
            f"quantize={quantize} reads checkpoints stored that way, and this one is not quantized; "
            f"on load {', '.join(ON_LOAD)} can be made of it"
        )
    pack = ON_LOAD[name]

    def packed(weight: Tensor, bias: Tensor | None) -> Linear:
        return pack(weight).linear(weight.dtype, bias)

    def unpacked(weight: Tensor, bias: Tensor | None) -> Linear:
        return make(pack(weight).dense(weight.dtype), bias)

    return unpacked if unpack else packed
