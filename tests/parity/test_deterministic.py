"""Deterministic mode: a request's logits and tokens are the same bits, whatever else is in the batch."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.engine import Engine
from gristmill.engine.layers.invariant import COUNTS, RowInvariant, alike, invariant
from gristmill.engine.layers.linear import linear, unpacked
from gristmill.engine.messages import Request
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.native.build import find_compiler
from gristmill.engine.runner import Runner
from gristmill.engine.settings import EngineSettings

from ..support.adapters import write_adapter
from ..support.feeding import Fed, feed, generate

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 8
BROAD: dict[str, Any] = {
    # Wide enough that matrix libraries change kernels between one row and many.
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
}


@pytest.fixture(scope="module")
def broad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("broad"), "llama", attention_bias=True, **BROAD)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("windowed"), "mistral")


def settings(model: Path, attention: str, dtype: str, **knobs: Any) -> EngineSettings:
    if attention == "cpu" and find_compiler() is None:
        pytest.skip("no C++ compiler: the engine runs on torch here")
    usual: dict[str, Any] = {
        "max_num_seqs": 16,
        "max_batch_prefill_tokens": 700,
        "max_batch_total_tokens": 16_384,
    }
    return EngineSettings(
        model=str(model),
        device="cpu",
        attention=attention,
        dtype=dtype,
        **{"deterministic": True} | usual | knobs,
    )


def prompts(seed: int, lengths: tuple[int, ...]) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(256) for _ in range(n)] for n in lengths]


def assert_same_bits(fed: list[Fed], alone: list[Fed]) -> None:
    for number, (one, other) in enumerate(zip(fed, alone, strict=True)):
        assert one.tokens == other.tokens, f"prompt {number}"
        for place, (row, expected) in enumerate(zip(one.rows, other.rows, strict=True)):
            assert torch.equal(row, expected), f"prompt {number}, token {place}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("which", "attention"), [("broad", "cpu"), ("windowed", "cpu"), ("windowed", "torch")]
)
def test_logits_are_the_same_bits_alone_in_any_batch_and_chunked_anyhow(
    request: pytest.FixtureRequest, which: str, attention: str, dtype: str
) -> None:
    runner = Runner(settings(request.getfixturevalue(which), attention, dtype))
    long = 508 if which == "broad" else 130  # in the end longer than what the fast kernel splits
    todo = prompts(1, (1, 15, 16, 33, 49, long))
    alone = [generate(runner, [prompt], STEPS)[0] for prompt in todo]
    for seed, budget in enumerate((700, 97, 16)):
        order = random.Random(seed).sample(range(len(todo)), len(todo))
        fed = generate(runner, [todo[i] for i in order], STEPS, budget=budget, seed=seed)
        assert_same_bits(fed, [alone[i] for i in order])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_decoded_is_the_same_bits_when_it_is_computed_again(broad: Path, dtype: str) -> None:
    """As after a preemption or a crash: tokens that came one by one are fed all at once."""
    runner = Runner(settings(broad, "cpu", dtype))
    first = generate(runner, prompts(2, (5, 40, 510)), STEPS)
    for seq in first:
        for at in (1, STEPS // 2, STEPS - 1):
            again = Fed(seq.tokens[: len(seq.tokens) - STEPS + at], list(reversed(range(40))))
            feed(runner, [again], budget=700)
            assert torch.equal(again.rows[0], seq.rows[at])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_any_cut_of_a_prompt_gives_the_same_bits(windowed: Path, dtype: str) -> None:
    """A row's last bits once depended on whether the compiler had fused a product and a sum in the copy of
    the kernel that its number of neighbours led to: seen from the second tile of 64 keys on."""
    runner = Runner(settings(windowed, "cpu", dtype))
    (prompt,) = prompts(4, (140,))
    for n in (67, 70, 79, 139):
        whole = [Fed(prompt[:n], list(range(20)))]
        feed(runner, whole, budget=n)
        for size in (1, 3, 17, 31):
            cut = [Fed(prompt[:n], list(range(20)))]
            while not cut[0].rows:
                feed(runner, cut, budget=size)
            assert torch.equal(cut[0].rows[0], whole[0].rows[0]), f"{n} tokens by {size}"


# ---- the engine: sampling, preemption, prefix hits, adapters


def requests(seed: int, count: int) -> list[Request]:
    draw = random.Random(seed)
    shared = prompts(seed, (48,))[0]
    return [
        Request(
            id=f"r{i}",
            prompt_ids=shared[: draw.choice((0, 16, 40, 48))] + prompts(i, (draw.randint(1, 60),))[0],
            max_tokens=draw.randint(12, 32),
            temperature=draw.choice((0.0, 0.7, 1.5)),
            top_p=draw.choice((1.0, 0.9)),
            ignore_eos=True,
            seed=i,
            adapter=draw.choice((None, "one", "two")),
            priority=i % 3,
        )
        for i in range(count)
    ]


def run(engine: Engine, todo: list[Request]) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {request.id: list(request.output_ids) for request in todo}
    coming = list(todo)
    while engine.has_work or coming:
        if coming:  # one a step: a higher class then takes the place of a lower one
            engine.add(coming.pop())
        for output in engine.step():
            assert output.error is None, output.error
            said[output.id] += output.token_ids
    engine.check()
    return said


def test_tokens_are_the_same_in_random_batches_with_adapters_preemption_and_prefix_hits(
    tmp_path: Path, broad: Path
) -> None:
    for name in ("one", "two"):
        write_adapter(tmp_path / name, broad, seed=len(name), strength=0.5)
    more: dict[str, Any] = {"lora_dir": tmp_path}
    todo = requests(3, 10)
    plain = Engine(settings(broad, "cpu", "bfloat16", prefix_cache=False, **more))
    alone = {request.id: run(plain, [request])[request.id] for request in todo}
    assert len({tuple(tokens[:4]) for tokens in alone.values()}) > 5, "all say the same: nothing is shown"
    cramped = Engine(
        settings(
            broad,
            "cpu",
            "bfloat16",
            max_batch_total_tokens=256,
            max_total_tokens=160,
            max_num_seqs=3,
            **more,
        )
    )
    chunked = Engine(settings(broad, "cpu", "bfloat16", max_batch_prefill_tokens=16, **more))
    for engine in (cramped, chunked):
        first = [replace(todo[0], id=name, adapter=name, max_tokens=1) for name in ("one", "two")]
        run(engine, first)  # the adapters are here: nobody comes late and spares the others
        urgent_last = sorted(todo, key=lambda request: request.priority)
        assert run(engine, urgent_last) == alone
        assert engine.stats.prefix_hits > 0, "nothing was found in the cache"
    assert cramped.stats.preemptions > 0, "nobody was preempted"
    resumed = [replace(r, output_ids=alone[r.id][: len(alone[r.id]) // 2]) for r in todo]
    assert run(plain, resumed) == alone


# ---- its parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [linear, unpacked])
def test_a_layer_gives_a_row_the_same_bits_at_any_place_among_any_number(
    make: Any, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(576, 1536, generator=generator).to(dtype)
    bias = torch.randn(576, generator=generator).to(dtype)
    layer = invariant(make, weight, bias)
    x = torch.randn(600, 1536, generator=generator).to(dtype)
    whole = layer(x)
    torch.testing.assert_close(
        whole.float(), (x.float() @ weight.float().T + bias.float()), rtol=0.02, atol=0.2
    )
    for first, end in ((0, 1), (3, 4), (5, 22), (100, 133), (0, 48), (7, 520), (88, 600)):
        assert torch.equal(layer(x[first:end]), whole[first:end]), f"rows {first} to {end}"


def test_row_counts_that_add_up_otherwise_are_not_used() -> None:
    def make(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
        def layer(x: torch.Tensor) -> torch.Tensor:
            terms = list((x[:, None, :] * weight).unbind(-1))
            if len(x) in (8, 64):
                terms = terms[1:] + terms[:1]  # the same sum, begun one further on
            total = terms[0]
            for term in terms[1:]:
                total = total + term
            return total

        return layer

    assert alike(make, 8, 64, torch.float32, False) == tuple(c for c in COUNTS if c not in (8, 64))


def test_padding_reaches_nobody() -> None:
    asked: list[int] = []

    def inner(x: torch.Tensor) -> torch.Tensor:
        asked.append(len(x))
        return x * 2

    x = torch.arange(23.0)[:, None]
    assert torch.equal(RowInvariant(inner, 1, (4, 10))(x), x * 2)
    assert asked == [10, 10, 4]
