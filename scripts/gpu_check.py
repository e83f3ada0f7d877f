"""Everything that wants a real GPU: is what it computes right, and how fast is it. One table, and JSON.

Run by ``scripts/gpu_check``. Without a card ``--dry-run`` says what would be run, and ``--device cpu --tiny``
runs it in small, which tries the code.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gpu.report import Context, Outcome, Row, Section, attempt, table
from gpu.source_tree import ROOT, use_source_tree

NEEDED = ("numpy", "pydantic", "safetensors", "torch")
LIMIT_S, LEAST_S = 470.0, 5.0
"""Of all sections together, and what one needs to be begun."""
WHEELS = {"pydantic": ("pydantic", "pydantic_core", "annotated_types", "typing_inspection")}
"""Packages without which a module cannot be imported, where they are more than itself."""


def sections() -> list[Section]:
    """In the order in which they run. The sum of budgets stays below eight minutes."""

    def run(module: str, function: str) -> Any:
        def found(context: Context) -> list[Row]:
            return getattr(importlib.import_module(f"gpu.{module}"), function)(context)

        return found

    return [
        Section(
            "attention",
            "every attention backend against torch in float32 on the CPU",
            60,
            run("parity", "attention"),
        ),
        Section(
            "quant",
            "layers over packed weights against what the weights mean",
            30,
            run("parity", "quantized"),
        ),
        Section(
            "engine",
            "tiny models: the same tokens as on the CPU, with each setting",
            50,
            run("parity", "engines"),
        ),
        Section("machine", "bandwidth and products of this device", 10, run("speed", "machine")),
        Section(
            "llama-bf16",
            "Llama-3.1-8B, random weights: 128/2048, 1000/1000, 2048/128",
            105,
            run("speed", "llama_bf16"),
        ),
        Section("qwen3", "Qwen3-0.6B: 256 requests of 100-1024 in and out", 40, run("speed", "qwen3")),
        Section("qwen2.5", "Qwen2.5-0.5B: the same; mostly the host's speed", 30, run("speed", "qwen25")),
        Section(
            "transformers",
            "transformers' continuous batching and ours, Qwen3-0.6B",
            50,
            run("speed", "transformers_batching"),
            ("transformers",),
        ),
        Section("llama-fp8", "as llama-bf16 with --quantize fp8", 95, run("speed", "llama_fp8")),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 if a section failed, 2 if nothing could be run."""
    args = arguments(argv)
    chosen = [section for section in sections() if not args.only or section.name in args.only]
    unknown = set(args.only) - {section.name for section in sections()}
    if unknown or not chosen:
        say(f"no section {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in sections())}")
        return 2
    if args.dry_run:
        dry_run(chosen, args.device)
        return 0
    if lacking := missing(NEEDED):
        say(f"missing: {', '.join(lacking)}. {how_to_bring(lacking)}")
        return 2
    use_source_tree()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        say("torch sees no CUDA device; --dry-run says what would be run, --device cpu --tiny tries the code")
        return 2
    if args.tiny:
        torch.set_num_threads(1)  # nothing this small is worth a second one
    report = {"check": "gpu", **circumstances(args.device), "tiny": args.tiny, "quick": args.quick}
    print(f"# gpu_check: {report['device']}, {report['date']}, commit {report['commit']}", flush=True)
    outcomes = run_all(chosen, Context(args.device, args.tiny, args.quick), args.json, report)
    wrong = [outcome.name for outcome in outcomes if not outcome.ok]
    verdict = f"not fine: {', '.join(wrong)}" if wrong else "all are fine"
    print(f"\n{len(outcomes)} sections, {verdict}")
    return 1 if wrong else 0


def run_all(
    chosen: list[Section], context: Context, path: Path | None, report: dict[str, Any]
) -> list[Outcome]:
    """Section by section; the JSON file is whole after each, whatever becomes of the next."""
    outcomes: list[Outcome] = []
    started = time.monotonic()
    for section in chosen:
        if lacking := missing(section.needs):
            outcome = Outcome(
                section.name, 0.0, [], f"missing: {', '.join(lacking)}. {how_to_bring(lacking)}"
            )
        elif (left_s := LIMIT_S - (time.monotonic() - started)) < LEAST_S:
            outcome = Outcome(section.name, 0.0, [], f"not run: {left_s:.0f} s are left of {LIMIT_S:.0f}")
        else:
            outcome = attempt(replace(section, budget_s=min(section.budget_s, left_s / 1.5)), context)
        outcomes.append(outcome)
        print(f"\n## {outcome.name}, {outcome.seconds:.0f} s", flush=True)
        print(table(outcome.rows), flush=True)
        if outcome.error:
            print(f"FAILED: {outcome.error}", flush=True)
        if path is not None:
            found = {**report, "seconds": time.monotonic() - started, "facts": context.facts}
            results = [vars(one) | {"ok": one.ok} for one in outcomes]
            path.write_text(json.dumps({**found, "sections": results}, indent=1) + "\n")
    return outcomes


def dry_run(chosen: list[Section], device: str) -> None:
    """What would be run, and what this machine lacks."""
    lacking = missing(NEEDED)
    for section in chosen:
        needs = missing(section.needs)
        lack = f"; missing: {', '.join(needs)}" if needs else ""
        print(f"{section.name:14} {section.budget_s:4.0f} s  {section.what}{lack}")
    print(f"{'in all':14} {sum(section.budget_s for section in chosen):4.0f} s at most")
    if lacking:
        print(f"missing: {', '.join(lacking)}. {how_to_bring(lacking)}")
        return
    import torch

    seen = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    print(f"here: torch {torch.__version__}, triton {version_of('triton')}, {seen}; asked for: {device}")


def missing(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def how_to_bring(names: Sequence[str]) -> str:
    """Wheels travel where a network does not."""
    wheels = [wheel for name in names for wheel in WHEELS.get(name, (name,))]
    return (
        "Where there is a network: pip download --no-deps --only-binary=:all: -d wheels "
        f"--python-version {platform.python_version()[:4]} {' '.join(wheels)}; "
        "then here: pip install --no-index --no-deps --target site wheels/*.whl, and PYTHONPATH=site"
    )


def circumstances(device: str) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "device": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
        "versions": {
            package: version_of(package) for package in ("torch", "triton", "transformers", "flash-attn")
        },
    }


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def say(text: str) -> None:
    print(f"gpu_check: {text}", file=sys.stderr)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything there, section by section"
    )
    parser.add_argument(
        "--only", default=[], type=lambda text: text.split(","), metavar="A,B", help="these sections"
    )
    parser.add_argument("--quick", action="store_true", help="64 requests instead of 256")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, on any machine")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="shapes so small that a CPU has them done in seconds"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
