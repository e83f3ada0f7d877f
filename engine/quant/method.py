"""What a way of storing quantized weights must be able to say, and which ways there are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import Tensor

from ..models.config import Config
from ..weights import Stored
from .packed import Packed

INT32 = frozenset({"I32"})


@dataclass(frozen=True, slots=True)
class Site:
    """A linear layer of the checkpoint that is quantized; its weight would be [rows, columns]."""

    module: str
    rows: int
    columns: int


class Method(Protocol):
    """How a checkpoint stores the weights of linear layers. Made from ``quantization_config``."""

    @property
    def name(self) -> str: ...

    @property
    def marks(self) -> tuple[str, ...]:
        """Suffixes of tensor names: a module with one of these is quantized, without it is not."""
        ...

    def tensors(self, site: Site) -> Mapping[str, Stored]:
        """What is there instead of the weight, by suffix. Raises ModelInvalid if the shape cannot be."""
        ...

    def read(self, site: Site, found: Mapping[str, Tensor]) -> Packed:
        """``found``: by suffix, checked against ``tensors``. Raises ModelInvalid if values are wrong."""
        ...


Found = Callable[[Config, Config], Method]
"""Makes the method from config.json and from its quantization_config; raises ModelInvalid."""


def quantization(config: Config) -> Config | None:
    """``quantization_config`` of a model, or what older checkpoints call it."""
    for name in ("quantization_config", "compression_config"):
        raw: Any = config.values.get(name)
        if raw:
            if not isinstance(raw, dict):
                raise config.invalid(f"{name} is {raw!r}, expected an object")
            return Config(cast("dict[str, Any]", raw), f"{config.source}: {name}")
    return None


def divided(config: Config, site: Site, *, inputs: int = 1, outputs: int = 1) -> None:
    """Raise ModelInvalid unless the weight is cut into whole pieces of so many inputs and outputs."""
    if site.columns % inputs or site.rows % outputs:
        raise config.invalid(
            f"{site.module} has {site.columns} inputs and {site.rows} outputs, "
            f"and this layout takes multiples of {inputs} and of {outputs}"
        )
