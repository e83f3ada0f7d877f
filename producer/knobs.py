"""Engine knobs as flags of `gristmill run` and `up`, handed on to `gristmill-worker run` unchanged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])
FLAG = "flag"
"""A knob that can only be turned on; ``bool`` is one with a ``--no-`` form."""

QUANTIZE = (
    *("nf4", "fp4", "int8", "eetq", "fp8", "bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4"),
    *("awq", "gptq", "compressed-tensors"),
)
KNOBS: dict[str, tuple[Any, str]] = {
    "revision": (str, "Hub revision of the model."),
    "device": (click.Choice(["auto", "cpu", "cuda"]), "Where the model runs."),
    "dtype": (click.Choice(["auto", "bfloat16", "float16", "float32"]), "Numbers it computes with."),
    "quantize": (
        click.Choice(QUANTIZE),
        (
            "Weights in fewer bits. Made on load: nf4, fp4, int8, eetq, fp8 (bitsandbytes: eetq). awq, gptq "
            "and compressed-tensors only name what a checkpoint is stored as, and need not be said."
        ),
    ),
    "quantize-head": (bool, "CPU, --quantize int8: the output layer, too; default: yes."),
    "attention": (click.Choice(["auto", "cpu", "torch", "triton", "flash"]), "Attention kernel."),
    "max-num-seqs": (click.IntRange(1), "Sequences that run together."),
    "max-batch-prefill-tokens": (click.IntRange(1), "Token budget of one step."),
    "max-input-tokens": (click.IntRange(1), "Prompt of one sequence."),
    "max-total-tokens": (click.IntRange(1), "Prompt and output of one sequence."),
    "max-batch-total-tokens": (click.IntRange(1), "Tokens in the KV cache."),
    "max-concurrent-requests": (click.IntRange(1), "Jobs of a class that a worker takes on at a time."),
    "waiting-served-ratio": (click.FloatRange(0), "Let prompts in once so many wait for each that decodes."),
    "max-waiting-tokens": (click.IntRange(0), "… or once those have decoded for so many steps."),
    "kv-block-size": (click.IntRange(1), "Tokens per KV block."),
    "kv-cache-dtype": (
        click.Choice(["auto", "int8", "fp8", "fp8_e4m3", "fp8_e4m3fn"]),
        "Keys and values in a byte each, so that nearly twice as many fit.",
    ),
    "prefix-cache": (bool, "Keep what was computed for prompts that begin alike; default: yes."),
    "swap-gib": (click.FloatRange(0), "Host memory for KV blocks that had to make way."),
    "overlap": (bool, "Work beside the device, a step ahead of what it is known to have said."),
    "native-products": (bool, "CPU: multiply with our own kernels where the CPU can; default: yes."),
    "shared-attention": (bool, "CPU: who begins alike reads what is shared together; default: yes."),
    "cuda-graphs": (bool, "CUDA: replay the launches of a step that only decodes; default: yes."),
    "speculate": (click.IntRange(0), "Guessed tokens a step may check for a sequence; 0: none."),
    "memory-fraction": (click.FloatRange(0, 1, min_open=True), "CUDA: part of the card's memory to use."),
    "tensor-parallel-size": (click.IntRange(1), "Devices, or CPU processes, that the model is cut for."),
    "lora-adapters": (str, "LoRA adapters that requests may name: NAME=DIR,NAME=DIR."),
    "lora-dir": (click.Path(), "Requests may name every adapter directory in it, too."),
    "lora-memory-mib": (click.IntRange(1), "What loaded adapters may take together."),
    "deterministic": (FLAG, "CPU: a request's numbers are the same bits whatever else runs; slower."),
    "num-threads": (click.IntRange(1), "CPU threads of the engine."),
    "max-stop-sequences": (click.IntRange(1), "Stop strings of one request."),
    "max-top-n-tokens": (click.IntRange(0), "Likely tokens told with each token."),
    "max-best-of": (click.IntRange(1), "Choices of one request."),
    "default-max-tokens": (click.IntRange(1), "Output tokens for a request that names no number."),
}


def engine_knobs(command: F) -> F:
    """The options above; they arrive as keyword arguments."""
    for name, (kind, text) in reversed(KNOBS.items()):
        if kind == FLAG:
            command = click.option(f"--{name}", is_flag=True, default=None, help=text)(command)
        elif kind is bool:
            command = click.option(f"--{name}/--no-{name}", default=None, help=text)(command)
        else:
            command = click.option(f"--{name}", type=kind, help=text)(command)
    return command


def worker_flags(given: Mapping[str, Any]) -> list[str]:
    """The knobs that were given, as the worker's flags."""
    flags: list[str] = []
    for name in KNOBS:
        value = given.get(name.replace("-", "_"))
        if isinstance(value, bool):
            assert value or KNOBS[name][0] != FLAG
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags += [f"--{name}", str(value)]
    return flags
