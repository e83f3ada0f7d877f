"""What users import: `from gristmill.producer import Client`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aclient import AsyncClient, AsyncJobHandle
    from .client import Client, JobHandle

__all__ = ["AsyncClient", "AsyncJobHandle", "Client", "JobHandle"]


def __getattr__(name: str) -> Any:
    """Loaded when first named: the command line's `--help` needs neither client."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".aclient" if name.startswith("Async") else ".client", __name__), name)
