"""Which kernels an engine computes with: what was asked for, and what there is on this machine."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from ..schemas.errors import Misconfigured
from ..schemas.home import default_home
from .attention.backend import Attention
from .attention.choice import Wanted, gpu_attention
from .attention.native_backend import NativeAttention, unsupported
from .attention.torch_backend import TorchAttention
from .layers.elementwise import Elementwise, RowByRow, TorchElementwise
from .native.library import Library, load
from .native.products import Products, load_products
from .settings import EngineSettings

log = logging.getLogger(__name__)


def native_library(settings: EngineSettings, wanted: Wanted, block_size: int) -> Library | None:
    """The CPU's kernels, built if need be. None: not asked for, or not to be had, which is logged."""
    if wanted.device.type != "cpu" or settings.attention not in ("auto", "cpu"):
        return None
    reason = unsupported(wanted.spec)
    if block_size % 16:
        reason = f"kv_block_size {block_size} is no multiple of 16"
    if reason:
        log.warning("kernel.unavailable", extra={"reason": reason})
        return None
    return load(_cache(settings), wanted.dtype, torch.get_num_threads())


def native_products(settings: EngineSettings, device: torch.device) -> Products | None:
    """Our matrix products, likewise."""
    if device.type != "cpu" or not settings.native_products:
        return None
    return load_products(_cache(settings), torch.get_num_threads())


def attention_backend(
    settings: EngineSettings, wanted: Wanted, block_size: int, library: Library | None, *, uniform: bool
) -> Attention:
    """The backend for ``settings.attention``. ``uniform``: a row's sums are the same in any batch.

    Raises Misconfigured.
    """
    spec, longest, numbers = wanted.spec, wanted.max_len, wanted.numbers
    if library:
        return NativeAttention(
            spec,
            block_size,
            longest,
            library,
            uniform=uniform,
            share=settings.shared_attention,
            numbers=numbers,
        )
    if settings.attention == "cpu":
        raise Misconfigured(
            "attention=cpu needs a CPU, float32 or bfloat16, kv_block_size a multiple of 16, a C++ compiler "
            "or a kernel built earlier, and a model whose attention the kernel has; the log event "
            "kernel.unavailable says what is missing. attention=auto falls back to torch"
        )
    if wanted.device.type == "cuda" or settings.attention in ("triton", "flash"):
        return gpu_attention(settings, wanted)
    return TorchAttention(spec, block_size, longest, wanted.device, uniform=uniform, numbers=numbers)


def elementwise(attention: Attention, library: Library | None, *, uniform: bool) -> Elementwise:
    """What computes norms and gates beside ``attention``."""
    if uniform:
        return RowByRow(library or TorchElementwise())
    if attention.name in ("triton", "flash"):
        from .gpu.elementwise import TritonElementwise

        return TritonElementwise()
    return library or TorchElementwise()


def _cache(settings: EngineSettings) -> Path:
    return settings.kernel_cache or default_home() / "kernels"
