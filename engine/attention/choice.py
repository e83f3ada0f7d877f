"""Which attention a GPU gets: ours in Triton, or flash-attn's where it is installed and faster.

Neither Triton nor flash-attn is imported before somebody asks for a backend of theirs.
"""

from __future__ import annotations

import importlib
import logging
import subprocess
import time
from dataclasses import dataclass
from typing import cast

import torch

from ...schemas.errors import Misconfigured
from ..kv_numbers import Numbers
from ..models.spec import ModelSpec
from ..settings import EngineSettings
from .backend import Attention
from .torch_backend import TorchAttention
from .trial import Pieces, Trial, difference

log = logging.getLogger(__name__)

BLOCK_TOKENS, FLASH_BLOCK_TOKENS = 16, 256
MAX_HEAD_DIM, MAX_GROUP = 256, 128
"""What our kernels were made for."""
NO_NUMBERS = "it does not keep keys and values as {} (kv_cache_dtype)"
TRIED_TOKENS = 600
"""Keys in the longest sequence of the self-test: more than one run of them."""
ALLOWED = 0.05
"""Difference to torch's attention in the self-test, relative to numbers above 1."""
ALLOWED_IN_A_BYTE = 0.2
"""The same where keys and values have a byte each: one on an edge may be rounded to either side."""
ADVANTAGE = 0.9
"""flash-attn is taken below this part of our time: in its larger blocks fewer beginnings are shared."""
RACED, LAYERS, ROUNDS = 32, 8, 5
"""Sequences that decode in the race, layers of a step, and how often it is run."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a backend is made for."""

    spec: ModelSpec
    max_len: int
    device: torch.device
    dtype: torch.dtype
    numbers: Numbers | None = None
    """Keys and values in fewer bits."""


def block_tokens(settings: EngineSettings) -> int:
    """Tokens of a KV block: as told, or flash-attn's where that is asked for by name, or few."""
    usual = FLASH_BLOCK_TOKENS if settings.attention == "flash" else BLOCK_TOKENS
    return settings.kv_block_size or usual


def gpu_attention(settings: EngineSettings, wanted: Wanted) -> Attention:
    """The backend for ``settings.attention`` on a GPU, or on a CPU under Triton's interpreter.

    Raises Misconfigured where one was asked for by name and cannot be had.
    """
    named, block = settings.attention, block_tokens(settings)
    if named == "torch":
        return _torch(wanted, block)
    if named == "flash":
        theirs = flash_attention(wanted, block)
        return _refused(named, theirs) if isinstance(theirs, str) else theirs
    ours = triton_attention(wanted, block)
    if named == "triton":
        return _refused(named, ours) if isinstance(ours, str) else ours
    if isinstance(ours, str):
        log.warning("attention.triton_unavailable", extra={"reason": ours})
        return _torch(wanted, block)
    theirs = flash_attention(wanted, settings.kv_block_size or FLASH_BLOCK_TOKENS)
    if isinstance(theirs, str):
        log.info("attention.flash_unavailable", extra={"reason": theirs})
        return ours
    return faster(ours, theirs, wanted)


def _torch(wanted: Wanted, block: int) -> Attention:
    return TorchAttention(wanted.spec, block, wanted.max_len, wanted.device, numbers=wanted.numbers)


def triton_attention(wanted: Wanted, block: int) -> Attention | str:
    """Our kernels, tried once on this device, or why not."""
    spec = wanted.spec
    if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 2:
        return f"head_dim {spec.head_dim} is above {MAX_HEAD_DIM} or odd"
    if spec.group > MAX_GROUP:
        return f"{spec.group} query heads share a key head; at most {MAX_GROUP} can"
    try:
        from triton import knobs  # pyright: ignore[reportMissingTypeStubs]
    except ImportError as exc:
        return f"Triton cannot be imported ({exc}); pip install 'gristmill[cuda]'"
    interpreted = bool(knobs.runtime.interpret)
    if wanted.device.type != "cuda" and not interpreted:
        return "it needs a CUDA device"
    from .triton_backend import TritonAttention

    backend = TritonAttention(
        spec, block, wanted.max_len, wanted.device, numbers=wanted.numbers, dtype=wanted.dtype
    )
    return (None if interpreted else self_test(backend, wanted)) or backend


def flash_attention(wanted: Wanted, block: int) -> Attention | str:
    """flash-attn 2, tried once on this device, or why not."""
    spec = wanted.spec
    if wanted.numbers:
        return NO_NUMBERS.format(wanted.numbers.name)
    if wanted.device.type != "cuda":
        return "it needs a CUDA device"
    if wanted.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16, not in {str(wanted.dtype).removeprefix('torch.')}"
    if spec.head_dim > MAX_HEAD_DIM or spec.head_dim % 8:
        return f"head_dim {spec.head_dim} is above {MAX_HEAD_DIM} or no multiple of 8"
    if block % FLASH_BLOCK_TOKENS:
        return f"kv_block_size {block} is no multiple of {FLASH_BLOCK_TOKENS}"
    try:
        module = importlib.import_module("flash_attn")
        from .flash_backend import FlashAttention, Functions
    except (ImportError, OSError) as exc:  # OSError: built for another torch
        return f"flash-attn or Triton cannot be imported ({exc}); pip install 'gristmill[cuda]'"
    functions = cast("Functions", module)
    backend = FlashAttention(wanted.spec, block, wanted.max_len, wanted.device, functions)
    return self_test(backend, wanted) or backend


def _refused(named: str, reason: str) -> Attention:
    raise Misconfigured(
        f"attention={named} cannot be used here: {reason}. attention=auto takes what works on this machine"
    )


# ---- trying a backend


@torch.inference_mode()
def self_test(backend: Attention, wanted: Wanted) -> str | None:
    """Why this backend cannot be used, if it fails on this device or says otherwise than torch's.

    Compiles all that a model needs, too: no step afterwards waits for a compiler.
    """
    from triton.errors import TritonError  # pyright: ignore[reportMissingTypeStubs]

    spec, longest = wanted.spec, min(wanted.max_len, TRIED_TOKENS)
    pieces = [(0, min(longest, 200)), (longest - 1, 1)]
    kinds = {(spec.windows[i], spec.ropes[i]): i for i in range(spec.num_layers)}
    block, numbers = backend.block_size, wanted.numbers
    reference = _torch(wanted, block)
    trial = Trial.draw(spec, pieces, block, wanted.device, wanted.dtype, numbers)
    allowed = ALLOWED if numbers is None else ALLOWED_IN_A_BYTE
    try:
        for layer in kinds.values():
            both = zip(trial.run(backend, layer), trial.run(reference, layer), strict=True)
            off = max(difference(ours, theirs) for ours, theirs in both)
            if not off <= allowed:
                return f"its self-test is off by {off:g} in layer {layer}"
    # What compilers, a driver and a kernel's launch raise.
    except (TritonError, RuntimeError, OSError, ValueError, TypeError, subprocess.SubprocessError) as exc:
        return f"its self-test failed: {str(exc)[:300]}"
    return None


@torch.inference_mode()
def faster(ours: Attention, theirs: Attention, wanted: Wanted) -> Attention:
    """The one of two that runs a step of decode and one of a prompt in less time, ours if it is close."""
    longest = min(wanted.max_len, 2048)
    steps = ([(longest * (i + 1) // RACED - 1, 1) for i in range(RACED)], [(0, longest)])
    first, second = (sum(_time_s(one, wanted, step) for step in steps) for one in (ours, theirs))
    chosen = theirs if second < ADVANTAGE * first else ours
    log.info("attention.raced", extra={ours.name: first, theirs.name: second, "chosen": chosen.name})
    return chosen


def _time_s(backend: Attention, wanted: Wanted, pieces: Pieces) -> float:
    """Of one layer, the best of a few runs."""
    trial = Trial.draw(wanted.spec, pieces, backend.block_size, wanted.device, wanted.dtype)
    trial.run(backend)
    best = float("inf")
    for _ in range(ROUNDS):
        torch.cuda.synchronize(wanted.device)
        started = time.monotonic()
        for _ in range(LAYERS):
            backend.attend(0, trial.qkv, trial.norm, trial.norm)
        torch.cuda.synchronize(wanted.device)
        best = min(best, time.monotonic() - started)
    return best
