"""Every model type, plain and quantized in each way, beside transformers in float32: a table of verdicts.

Tiny models with random weights, those of tests/parity. A quantized one is compared with transformers running
the weights that its stored numbers mean.
"""

from __future__ import annotations

import argparse
import difflib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gristmill.engine.models.config import Config
from gristmill.engine.models.families import from_hf
from gristmill.engine.quant.onload import ON_LOAD
from gristmill.engine.runner import Runner
from gristmill.engine.weights import expected_tensors
from gristmill.schemas.errors import Misconfigured, ModelInvalid
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from tests.parity.test_fallback import VARIANTS as FALLBACK
from tests.support.feeding import Fed, generate
from tests.support.model_types import KIN, STEPS, VARIANTS, prompts, runner, their_model
from tests.support.quantized import Store, reconfigure
from tests.unit.test_quantized_bytes import CHECKPOINTS as BYTES
from tests.unit.test_quantized_groups import CHECKPOINTS as GROUPS
from tests.unit.test_quantized_on_load import CHECKPOINTS as BITSANDBYTES

PAGE = Path(__file__).resolve().parent.parent / "BENCHMARKS.md"
BEGIN, END = "<!-- parity table -->", "<!-- end of the parity table -->"
EQUAL, CLOSE, NO, WRONG = "=", "≈", "–", "**differs**"
TOLERANCE, ROUNDED_INPUTS = 1e-4, 0.1
STORED: dict[str, tuple[dict[str, Any], Store]] = {
    "AWQ": GROUPS["awq"],
    "GPTQ": GROUPS["gptq"],
    "W4A16": BYTES["w4a16"],
    "W8": BYTES["int8-weights"],
    "FP8": BYTES["fp8-blocks"],
    "NF4": BITSANDBYTES["nf4"],
    "INT8": BITSANDBYTES["int8"],
}
COLUMNS = ("plain", "batched", "chunked", *ON_LOAD, *STORED)
WIDER = ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim")
WIDER_INSIDE = (
    *("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "intermediate_size_mlp"),
)
"""Quantized weights come in groups of 32 and blocks of 64."""


@dataclass(frozen=True, slots=True)
class Row:
    """A model type. ``fallback``: it runs through transformers' code with our attention."""

    kind: str
    configs: list[dict[str, Any]]
    fallback: bool = False


def rows() -> list[Row]:
    """Every model type of the tests, with its variants; the first one is also quantized."""
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, config in (*KIN.values(), *VARIANTS.values()):
        found.setdefault(kind, []).append(config)
    return [
        *(Row(kind, configs) for kind, configs in sorted(found.items())),
        *(Row(kind, [config], fallback=True) for kind, config in sorted(FALLBACK.items())),
    ]


# ---- verdicts


def verdict(fed: Sequence[Fed], theirs: Any, tolerance: float = TOLERANCE) -> str:
    """Logits and tokens of each sequence beside transformers'."""
    for seq in fed:
        with torch.inference_mode():
            expected = theirs(torch.tensor([seq.tokens[:-1]])).logits[0, -STEPS:]
        ours = torch.stack(seq.rows)
        if tolerance == TOLERANCE:
            same = torch.allclose(ours, expected, rtol=TOLERANCE, atol=TOLERANCE)
            if not same or seq.tokens[-STEPS:] != expected.argmax(-1).tolist():
                return WRONG
        elif (ours[0] - expected[0]).norm() > tolerance * expected[0].norm():
            return WRONG
    return EQUAL if tolerance == TOLERANCE else CLOSE


def plain(row: Row, folder: Path) -> dict[str, str]:
    """The first three columns, over all variants."""
    worst = dict.fromkeys(("plain", "batched", "chunked"), EQUAL)
    for number, config in enumerate(row.configs):
        theirs = their_model(row.kind, config, folder / f"plain-{number}")
        ours = runner(folder / f"plain-{number}")
        modes: dict[str, Callable[[], list[Fed]]] = {
            "plain": lambda ours=ours: [generate(ours, [prompt], STEPS)[0] for prompt in prompts()],
            "batched": partial(generate, ours, prompts(), STEPS),
            "chunked": partial(generate, ours, prompts(), STEPS, budget=11, seed=3),
        }
        for mode, run in modes.items():
            if verdict(run(), theirs) != EQUAL:
                worst[mode] = WRONG
    return worst


def quantized(row: Row, folder: Path) -> Iterator[tuple[str, str]]:
    """The other columns. Through transformers' code it is not compared quantized on load, and is refused when
    stored so."""
    if row.fallback:
        yield from dict.fromkeys(ON_LOAD, "").items()
        yield from dict.fromkeys(STORED, NO).items()
        return
    config = wider(row.configs[0])
    their_model(row.kind, config, folder / "dense")
    for name, pack in ON_LOAD.items():
        rounded = partial(as_rounded, pack=pack)
        tolerance = ROUNDED_INPUTS if name == "int8" else TOLERANCE
        yield name, compared(row, folder, rounded, tolerance, quantize=name)
    for name, (described, store) in STORED.items():
        yield name, compared(row, folder, store, TOLERANCE, described)


def compared(
    row: Row,
    folder: Path,
    store: Store,
    tolerance: float,
    described: dict[str, Any] | None = None,
    **settings: Any,
) -> str:
    """``described``: what config.json says of stored numbers; None: they are quantized on load."""
    ours, twin = folder / "ours", folder / "twin"
    for copy in (ours, twin):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder / "dense", copy)
    try:
        write(folder / "dense", ours if described else None, twin, store, routers=described is None)
        if described:
            reconfigure(ours, quantization_config=described)
        engine: Runner = runner(ours, **settings)
    except (ModelInvalid, Misconfigured):
        return NO
    return verdict(generate(engine, prompts(), STEPS), loaded(row, twin), tolerance)


def write(dense: Path, ours: Path | None, twin: Path, store: Store, *, routers: bool) -> None:
    """The linears of ``dense`` as stored, and as what that means. Raises ModelInvalid: none of ours."""
    tensors = load_file(dense / "model.safetensors")
    stored, meant = dict(tensors), dict(tensors)
    values = json.loads((dense / "config.json").read_text())
    turned = from_hf(Config(values, "config.json")).names.transposed
    for name in linears(values, tensors, routers=routers):
        module = name.removesuffix(".weight")
        weight = tensors[name].T if turned else tensors[name]
        parts, means = store(module, weight)
        meant[name] = (means.T if turned else means).contiguous()
        del stored[name]
        stored |= {f"{module}.{suffix}": part.contiguous() for suffix, part in parts.items()}
    save_file(meant, twin / "model.safetensors", metadata={"format": "pt"})
    if ours is not None:
        save_file(stored, ours / "model.safetensors", metadata={"format": "pt"})


def linears(values: dict[str, Any], tensors: Mapping[str, Any], *, routers: bool) -> list[str]:
    """Weights that are quantized: matrices of layers; of published checkpoints without those that route."""
    spec = from_hf(Config(values, "config.json"))
    matrices = [name for name, shape in expected_tensors(spec).items() if len(shape) == 2]
    inside = [name for name in matrices if f"{spec.names.layers}." in name and "norm" not in name]
    kept = [name for name in inside if routers or not name.endswith(("gate.weight", "router.weight"))]
    return [name for name in kept if name in tensors and name.endswith(".weight")]


def as_rounded(
    _module: str, weight: torch.Tensor, *, pack: Callable[..., Any]
) -> tuple[dict[str, Any], torch.Tensor]:
    """Nothing stored: the twin of a model that is quantized on load."""
    return {}, pack(weight.contiguous()).dense(torch.float32)


def loaded(row: Row, directory: Path) -> Any:
    """transformers' model of a directory."""
    attention = "sdpa" if row.kind == "falcon" else "eager"  # Falcon's eager attention adds its biases twice
    return AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation=attention, dtype=torch.float32
    ).eval()


def wider(config: dict[str, Any]) -> dict[str, Any]:
    """The same model with matrices large enough for groups."""
    sizes = {**dict.fromkeys(WIDER, 64), **dict.fromkeys(WIDER_INSIDE, 128), "n_head": 4, "n_heads": 4}
    return {**config, **{name: size for name, size in sizes.items() if name in config}}


# ---- the page


def table(wanted: Sequence[Row]) -> str:
    """As Markdown."""
    lines = [f"| model type | variants | {' | '.join(COLUMNS)} |", f"|---|--:|{':-:|' * len(COLUMNS)}"]
    for row in wanted:
        with tempfile.TemporaryDirectory(prefix="gristmill-parity-") as folder:
            cells = {**plain(row, Path(folder)), **dict(quantized(row, Path(folder)))}
        name = f"`{row.kind}`" + (" (fallback)" if row.fallback else "")
        lines.append(f"| {name} | {len(row.configs)} | {' | '.join(cells[each] for each in COLUMNS)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> int:
    """See ``--help``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help="only these model types; prints, writes nothing")
    parser.add_argument("--check", action="store_true", help="fail if the committed table says otherwise")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if options.kinds:
        made = table([row for row in rows() if row.kind in options.kinds])
        print(made)
        return int(WRONG in made)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    committed, _, after = rest.partition(END)
    made = table(rows())
    if options.check:
        changes = difflib.unified_diff(
            committed.strip().splitlines(), made.splitlines(), "committed", "now", lineterm=""
        )
        found = list(changes)
        print("\n".join(found) or "the table is as committed")
        return int(bool(found))
    PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")
    return int(WRONG in made)


if __name__ == "__main__":
    sys.exit(main())
