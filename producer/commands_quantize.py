"""`gristmill quantize`: a plain model directory in, a quantized one out.

The work needs torch, so it is another program's (`python -m gristmill.engine.quantize`); nothing of it is
imported here.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..backends.supervisor import die_with_parent
from ..schemas.errors import (
    GristmillError,
    InvalidRequest,
    Misconfigured,
    ModelInvalid,
    ModelNotFound,
    Unsupported,
)
from ..schemas.settings import load_settings
from .console import common, put, put_json, say
from .progress import duration

HELP = """Write a quantized copy of a model that this engine, vLLM and transformers can read.

\b
Examples:
  gristmill quantize smollm2-135m ./smollm2-awq --method awq
  gristmill quantize smollm2-135m ./smollm2-int8 --method int8
  gristmill quantize Qwen/Qwen3-0.6B ./qwen3-fp8 --method fp8
  gristmill run prompts.jsonl -o answers.jsonl --model ./smollm2-awq

\b
Methods:
  awq   weights in 4 bits, scaled by how large their inputs are in a text (AutoAWQ's gemm layout)
  int8  weights and inputs in 8 bits (compressed-tensors, int-quantized): the fastest on CPUs
  fp8   the same in e4m3 (compressed-tensors, float-quantized): for cards with FP8

MODEL is what `gristmill models path` takes. OUT must not exist; it appears whole or not at all.
"""

NEEDED = ("torch", "safetensors", "tokenizers")
LINE_EVERY_S = 10.0
CODES: dict[str, type[GristmillError]] = {
    c.code: c for c in (InvalidRequest, Misconfigured, ModelInvalid, ModelNotFound, Unsupported)
}
AWQ_ONLY = ("group_size", "calibration", "calibration_tokens", "clip")
Update = Callable[[str, int, int], None]


@click.command(help=HELP)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--method", type=click.Choice(["awq", "int8", "fp8"]), required=True)
@click.option("--group-size", type=click.IntRange(8), help="awq: inputs a scale; default: 128, 64 or 32.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="awq: text that is like your prompts, .txt or .jsonl (text, prompt, messages); default: ours.",
)
@click.option("--calibration-tokens", type=click.IntRange(1), help="awq: at most so many; default 16384.")
@click.option("--clip/--no-clip", default=None, help="awq: also search for narrower ranges; default: yes.")
@click.option("--revision", help="Branch, tag or commit of a Hub model.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--num-threads", type=click.IntRange(1), help="CPU threads; default: as torch chooses.")
@common
def quantize(
    model: str, out: Path, revision: str | None, calibration: Path | None, as_json: bool, **options: Any
) -> None:
    """Resolve the model, then let the other program work."""
    from ..backends.models import resolve

    _refuse_idle_flags(calibration=calibration, **options)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise Misconfigured(f"quantizing needs {', '.join(missing)}; run: pip install 'gristmill[worker]'")
    out = out.expanduser().absolute()
    started = time.monotonic()
    path = resolve(model, revision, home=load_settings().home)
    with _progress() as update:
        text = None if calibration is None else str(calibration.expanduser().absolute())
        summary = _run({"model": str(path), "out": str(out), "calibration": text, **options}, update)
    if as_json:
        put_json(summary | {"took_s": round(time.monotonic() - started, 1)})
        return
    before, after = summary["plain_bytes"], summary["quantized_bytes"]
    took = duration(time.monotonic() - started)
    if summary["group_size"]:
        say(f"group size {summary['group_size']}")
    say(f"{before / 2**20:,.0f} MiB → {after / 2**20:,.0f} MiB in {took}")
    put(summary["path"])


def _refuse_idle_flags(method: str, **options: Any) -> None:
    """Raises Misconfigured for a flag that this method would pass over in silence."""
    idle = [f"--{name.replace('_', '-')}" for name in AWQ_ONLY if options[name] is not None]
    if idle and method != "awq":
        raise Misconfigured(
            f"--method {method} does not use {', '.join(idle)}; leave that out, or use --method awq"
        )


def _run(settings: dict[str, Any], update: Update) -> dict[str, Any]:
    """What the program says in the end. Raises what it failed with."""
    given = {name: value for name, value in settings.items() if value is not None}
    command = [sys.executable, "-m", "gristmill.engine.quantize"]
    last: dict[str, Any] = {}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        preexec_fn=die_with_parent(signal.SIGINT),  # it makes two system calls, nothing else
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with process.stdin:
                process.stdin.write(json.dumps(given).encode())
            for line in process.stdout:
                last = json.loads(line)
                if "stage" in last:
                    update(last["stage"], last["done"], last["total"])
        except BaseException:
            process.send_signal(signal.SIGINT)  # it takes away what it has begun; twice does no harm
            process.wait()
            raise
    if "summary" in last:
        return last["summary"]
    failed = last.get("failed")
    if failed is None:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        raise GristmillError(f"the quantizing process ended with {how} and said nothing of why")
    raise CODES.get(failed["code"], GristmillError)(failed["message"])


@contextmanager
def _progress() -> Generator[Update]:
    """A bar with what is left on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines().update
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda stage, done, total: bar.update(
            task, description=stage, completed=done, total=total or None
        )


class _Lines:
    """One line every ten seconds, with what is left at this pace."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._due = self._started + LINE_EVERY_S

    def update(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._due and done:
            left = duration((now - self._started) / done * (total - done))
            say(f"{stage}: {done}/{total}, ETA {left}")
            self._due = now + LINE_EVERY_S
