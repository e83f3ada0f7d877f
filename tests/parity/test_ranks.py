"""Several ranks say what one says: the same tokens, and logits within what another order of sums changes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Request
from gristmill.engine.models.config import Config
from gristmill.engine.models.families import from_hf
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.parallel.shard import Cut, Shard, shard
from gristmill.engine.parallel.weights import NarrowWeights, columns, rows
from gristmill.engine.quant.codebook import Codebook
from gristmill.engine.quant.fp8 import Fp8
from gristmill.engine.quant.grouped import Grouped
from gristmill.engine.quant.int8 import Int8
from gristmill.engine.quant.packed import Packed
from gristmill.engine.quant.weights import ModelWeights
from gristmill.engine.runner import Runner
from gristmill.engine.settings import EngineSettings
from gristmill.engine.weights import expected_tensors
from gristmill.schemas.errors import Misconfigured
from safetensors.torch import save_file

from ..support.adapters import write_adapter
from ..support.feeding import generate
from ..support.model_types import BASE, OLD, VARIANTS
from ..support.quantized import write_quantized
from ..support.ranks import followed
from ..unit.test_quantized_groups import AWQ, awq

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
    given: dict[str, Any] = {
        "attention": "torch",
        "max_num_seqs": 8,
        "max_batch_prefill_tokens": 64,
        "max_batch_total_tokens": 1024,
        "num_threads": 1,
    }
    return EngineSettings(
        model=str(directory), device="cpu", dtype="float32", tensor_parallel_size=ranks, **given | more
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


def test_what_the_scheduler_thinks_of_works_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters that come and go, blocks swapped out and in, shared prefixes, preemption, guesses, noise."""
    monkeypatch.setattr("gristmill.engine.engine.swap_pays", lambda **_: True)
    model = write_tiny(tmp_path / "model", num_attention_heads=9, num_key_value_heads=3, hidden_size=36)
    adapters = {name: write_adapter(tmp_path / name, model, seed=n, rank=36) for n, name in enumerate("abc")}
    draw = random.Random(5)
    shared = [draw.randrange(256) for _ in range(40)]
    requests = [
        Request(
            id=f"r{n}",
            prompt_ids=shared[: 40 - 3 * n] + [n] * 3,
            max_tokens=50,
            temperature=0.0 if n % 2 else 0.8,
            seed=n,
            ignore_eos=True,
            adapter=(None, None, "a", "b", "c")[n % 5],
            logprobs=2 if n == 3 else None,
            prompt_logprobs=1 if n == 5 else None,
        )
        for n in range(10)
    ]

    def said(engine: Engine) -> dict[str, list[int]]:
        told: dict[str, list[int]] = {request.id: [] for request in requests}
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for output in engine.step():
                assert output.error is None, output
                told[output.id] += output.token_ids
        engine.check()
        return told

    knobs: dict[str, Any] = {"max_batch_total_tokens": 256, "swap_gib": 0.001, "max_total_tokens": 96}
    knobs |= {"lora_adapters": adapters, "lora_memory_mib": 1}
    expected = said(Engine(settings(model, 1, **knobs)))
    with followed(settings(model, 2, **knobs)) as ranks:
        engine = Engine(settings(model, 2, **knobs), ranks=ranks)
        assert said(engine) == expected
    assert engine.stats.blocks_loaded
    assert engine.stats.adapter_loads >= 3
    assert engine.stats.prefix_hits


def test_smollm2_says_the_same_with_its_three_groups_on_two_ranks(smollm2: Path) -> None:
    """In fp32; a difference counts where the best two logits of one rank are further apart than 1e-4."""
    prompts = [[504, 3575, 282, 4649, 314], [6403, 2815, 253, 655, 28, 281, 253, 6132], [1604, 3177]]
    alone = generate(Runner(settings(smollm2, 1, attention="auto")), prompts, 24)
    with followed(settings(smollm2, 2, attention="auto")) as ranks:
        parted = generate(Runner(settings(smollm2, 2, attention="auto"), ranks=ranks), prompts, 24)
    for one, two in zip(alone, parted, strict=True):
        for row, mine, theirs in zip(one.rows, one.tokens[-24:], two.tokens[-24:], strict=True):
            if mine != theirs:
                best = row.topk(2).values
                assert float(best[0] - best[1]) < 1e-4, "another token, and no near tie"
                break


PACKINGS: dict[str, Callable[[torch.Tensor], Packed]] = {
    "int8": Int8.nearest,
    "fp8": Fp8.nearest,
    "fp8 in blocks": lambda weight: Fp8.of(
        weight.to(torch.float8_e4m3fn), torch.rand(3, 4, generator=torch.Generator().manual_seed(1)), 16, 32
    ),
    "nf4": lambda weight: Codebook.nearest(weight, "nf4"),
    "4 bits in groups": lambda weight: Grouped.of(
        4, (weight * 4).round().clamp(-8, 7) + 8, torch.rand(48, 4) + 0.5, torch.full((48, 4), 7.0)
    ),
    "8 bits in groups": lambda weight: Grouped.of(
        8, (weight * 40).round().clamp(-128, 127) + 128, torch.rand(48, 2) + 0.5, torch.full((48, 2), 127.0)
    ),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_part_of_a_packed_weight_is_that_part_of_what_it_means(packing: str) -> None:
    packed = PACKINGS[packing](torch.randn(48, 128, generator=torch.Generator().manual_seed(0)))
    dense = packed.dense(torch.float32)
    run = range(64, 128)
    part = columns(packed, run)
    assert part is not None
    assert torch.equal(part.dense(torch.float32), dense[:, 64:])
    some = rows(packed, Cut("rows", (range(8, 16), range(40, 48))))
    assert some is not None
    assert torch.equal(some.dense(torch.float32), dense[[*range(8, 16), *range(40, 48)]])


@pytest.mark.parametrize("quantize", ["nf4", None])
def test_a_quantized_model_is_cut(quantize: str | None, tmp_path: Path) -> None:
    """Made on load, in blocks of 64 inputs, and stored as AWQ does, in groups of 32."""
    sizes = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 192}
    stored, plain = write_quantized(tmp_path, AWQ, awq, **sizes)
    model = plain if quantize else stored
    alone = generate(Runner(settings(model, 1, quantize=quantize)), prompts(), STEPS)
    with followed(settings(model, 3, quantize=quantize)) as ranks:
        parted = generate(Runner(settings(model, 3, quantize=quantize), ranks=ranks), prompts(), STEPS)
    for one, two in zip(alone, parted, strict=True):
        torch.testing.assert_close(torch.stack(two.rows), torch.stack(one.rows), rtol=1e-4, atol=1e-4)


def test_quantized_weights_whose_groups_would_be_cut_are_refused_by_name(tmp_path: Path) -> None:
    """Heads of 16 do not keep groups of 32 inputs whole."""
    stored, _ = write_quantized(tmp_path, AWQ, awq)
    whole = from_hf(Config.load(stored))
    weights = NarrowWeights(ModelWeights(stored, Config.load(stored), whole), shard(whole, 0, 4))
    module = "model.layers.0.self_attn.o_proj"
    with pytest.raises(Misconfigured, match=f"size=4 cuts {module} at its columns 0 to 16, .* Grouped"):
        weights.layer([module], None, torch.float32, torch.device("cpu"))


def test_deterministic_mode_has_one_rank() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size \(2\).*the same bits"):
        EngineSettings(model="m", deterministic=True, tensor_parallel_size=2)
