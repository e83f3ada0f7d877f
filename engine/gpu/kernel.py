"""What of Triton the engine needs to know: a kernel is launched as ``kernel[grid](arguments)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

import triton  # pyright: ignore[reportMissingTypeStubs]


class Kernel(Protocol):
    """Compiled when it is first launched with arguments of new types or constants."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]: ...


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Kernel]:
    """``triton.jit``, whose types say less."""
    return cast("Callable[[Callable[..., Any]], Kernel]", triton.jit(**options))  # pyright: ignore[reportUnknownMemberType]
