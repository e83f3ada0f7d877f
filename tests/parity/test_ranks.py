"""Several ranks say what one says: the same tokens, and logits within what another order of sums changes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.models.config import Config
from gristmill.engine.models.families import from_hf
from gristmill.engine.parallel.shard import Shard, shard
from gristmill.engine.runner import Runner
from gristmill.engine.settings import EngineSettings
from gristmill.engine.weights import expected_tensors
from gristmill.schemas.errors import Misconfigured
from safetensors.torch import save_file

from ..support.feeding import generate
from ..support.model_types import BASE, OLD, VARIANTS
from ..support.ranks import followed

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 6
TELLING = {
    "llama-uneven": (
        "llama",
        {**BASE, "hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "gpt2-odd-width": ("gpt2", {**OLD, "n_inner": 41}),
    **{
        name: VARIANTS[name]
        for name in (
            "phi3",  # query, key and value in one matrix, gate and up in another
            "olmo2",  # a norm over all heads
            "gemma2",  # capped logits
            "stablelm-parallel-normed",
            "cohere-normed",
            "phi-normed",  # biases everywhere
            "gpt_neox",
            "falcon",  # one key head
            "codegen",
            "bloom",
            "qwen2_moe-some-layers",
            "mixtral",
        )
    },
}


def spec_of(kind: str, config: dict[str, Any]) -> Any:
    return from_hf(Config({"max_seq_len": 128, **config, "model_type": kind}, "config.json"))


def write_model(directory: Path, kind: str, config: dict[str, Any]) -> Path:
    """Random weights under the family's own names."""
    (directory / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in expected_tensors(spec_of(kind, config)).items():
        noise = torch.randn(shape, generator=generator)
        norm = "norm" in name or ".ln_" in name
        tensors[name] = (
            1 + 0.2 * noise if norm else noise * (2.0 if len(shape) == 1 else 1.5) / shape[-1] ** 0.5
        )
    save_file(tensors, directory / "model.safetensors")
    return directory


def settings(directory: Path, ranks: int, **more: Any) -> EngineSettings:
    return EngineSettings(
        model=str(directory),
        device="cpu",
        dtype="float32",
        max_num_seqs=8,
        max_batch_prefill_tokens=64,
        max_batch_total_tokens=1024,
        num_threads=1,
        tensor_parallel_size=ranks,
        **{"attention": "torch", **more},
    )


def prompts() -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(3, 96) for _ in range(n)] for n in (1, 17, 40)]


@pytest.mark.parametrize("variant", TELLING)
def test_two_ranks_say_what_one_says(variant: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path, *TELLING[variant])
    alone = generate(Runner(settings(directory, 1)), prompts(), STEPS, budget=23)
    with followed(settings(directory, 2)) as ranks:
        parted = generate(Runner(settings(directory, 2), ranks=ranks), prompts(), STEPS, budget=23)
    for one, two in zip(alone, parted, strict=True):
        torch.testing.assert_close(torch.stack(two.rows), torch.stack(one.rows), rtol=1e-4, atol=1e-4)
        assert two.tokens == one.tokens


@pytest.mark.parametrize(
    ("variant", "ranks"),
    [
        (name, ranks)
        for name in (*VARIANTS, "llama-uneven")
        for ranks in (2, 3)
        if (name, ranks) != ("olmo2", 3)
    ],
)
def test_the_parts_of_all_ranks_make_up_each_tensor_once(variant: str, ranks: int) -> None:
    """And each looks like a tensor of the narrower model that its rank believes in."""
    whole = spec_of(*(VARIANTS | TELLING)[variant])
    stored = expected_tensors(whole)
    covered: dict[str, list[int]] = {}
    for each in (shard(whole, rank, ranks) for rank in range(ranks)):
        for name, shape in expected_tensors(each.spec).items():
            assert shape_of(each, name, stored) == shape, name
            piece = each.piece(name)
            if piece.runs is not None:
                covered.setdefault(piece.name, []).extend(i for run in piece.runs for i in run)
    shared = whole.num_kv_heads < ranks  # a key head that several ranks need
    for name, found in covered.items():
        dim = shard(whole, 0, ranks).piece(name).dim
        rows = range(stored[name][dim])
        assert sorted(set(found) if shared else found) == list(rows), name


def shape_of(part: Shard, name: str, stored: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
    piece = part.piece(name)
    shape = list(stored[piece.name])
    if piece.runs is not None:
        shape[piece.dim] = sum(len(run) for run in piece.runs)
    return tuple(shape)


def test_heads_are_cut_in_whole_groups_and_widths_in_whole_grains() -> None:
    """SmolLM2-135M: 9 heads in 3 groups, 1,536 wide."""
    smollm2 = {**BASE, "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    spec = spec_of("llama", {**smollm2, "intermediate_size": 1536, "vocab_size": 49_152})
    parts = [shard(spec, rank, 2).spec for rank in range(2)]
    assert [(part.num_heads, part.num_kv_heads) for part in parts] == [(6, 2), (3, 1)]
    assert [part.intermediate_size for part in parts] == [768, 768]
    assert [shard(spec, rank, 5).spec.num_heads for rank in range(5)] == [2, 1, 2, 1, 3]
    assert [shard(spec, rank, 5).spec.intermediate_size for rank in range(5)] == [384, 384, 256, 256, 256]


@pytest.mark.parametrize(
    ("variant", "ranks", "words"),
    [
        ("llama-uneven", 10, "tensor_parallel_size is 10, .* 9 attention heads in 3 groups: at most 9"),
        ("olmo2", 3, "no multiple of the model's 2 key heads, which it norms together"),
        ("bloom", 4, "3 attention heads in 3 groups"),
    ],
)
def test_a_model_that_cannot_be_cut_is_refused_with_its_numbers(variant: str, ranks: int, words: str) -> None:
    with pytest.raises(Misconfigured, match=words):
        shard(spec_of(*(VARIANTS | TELLING)[variant]), 0, ranks)


def test_deterministic_mode_has_one_rank() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size \(2\).*the same bits"):
        EngineSettings(model="m", deterministic=True, tensor_parallel_size=2)
