"""Keys and values that somebody else computed change nothing in what a request generates.

What is equal: the tokens, in fp32. Not every bit of the logits: a matrix multiplication of 3 rows may add up
in another order than one of 300, so a prompt that is fed in other pieces has other last bits, with a cache or
without.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Request
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.native.build import find_compiler
from gristmill.engine.settings import EngineSettings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module", params=["torch", "cpu"])
def attention(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and find_compiler() is None:
        pytest.skip("no C++ compiler: the engine runs on torch here")
    return request.param


def engine(model: Path, attention: str = "torch", **knobs: Any) -> Engine:
    given: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_batch_prefill_tokens": 64,
        "max_batch_total_tokens": 1024,
        "max_total_tokens": 256,
    }
    return Engine(
        EngineSettings(model=str(model), device="cpu", dtype="float32", attention=attention, **given | knobs)
    )


def run(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    """Everybody's tokens. Half of the requests come while the others run."""
    said: dict[str, list[int]] = {}
    for request in requests[::2]:
        engine.add(request)
    late = iter(requests[1::2])
    while engine.has_work or len(said) < len(requests):
        for output in engine.step():
            said.setdefault(output.id, []).extend(output.token_ids)
        if (request := next(late, None)) is not None:
            engine.add(request)
        engine.check()
    assert engine.stats.free_blocks == engine.stats.total_blocks
    return said


def family(seed: int, count: int = 24) -> list[Request]:
    """Prompts that begin alike in many ways, greedy or sampled, of three classes, some resumed."""
    draw = random.Random(seed)
    trunk = [draw.randrange(256) for _ in range(120)]
    requests: list[Request] = []
    for number in range(count):
        own = [draw.randrange(256) for _ in range(draw.randrange(20))]
        requests.append(
            Request(
                id=f"r{number}",
                prompt_ids=(trunk[: draw.choice((0, 15, 16, 17, 64, 100, 120))] + own) or [7],
                output_ids=[draw.randrange(256) for _ in range(draw.choice((0, 0, 5)))],
                max_tokens=draw.choice((6, 24)),
                temperature=draw.choice((0.0, 1.0)),
                seed=draw.randrange(2**64),
                ignore_eos=True,
                priority=draw.randrange(3),
                arrival=float(number),
            )
        )
    return requests


def test_with_and_without_the_cache_everybody_says_the_same(model: Path, attention: str) -> None:
    requests = family(1)
    plain = run(engine(model, attention, prefix_cache=False), requests)
    cached = engine(model, attention)
    assert run(cached, requests) == plain
    assert cached.stats.prefix_hits > cached.stats.prefix_queries // 4
    again = [replace(request, id=request.id + "again") for request in requests]
    assert run(cached, again) == {f"{name}again": ids for name, ids in plain.items()}


def test_preempted_in_a_cache_too_small_everybody_says_the_same(model: Path) -> None:
    requests = [replace(request, max_tokens=50) for request in family(2, count=10)]
    plain = run(engine(model, prefix_cache=False), requests)
    cramped = engine(model, max_batch_total_tokens=256)
    assert run(cramped, requests) == plain
    assert cramped.stats.preemptions
    assert cramped.stats.prefix_hits


def test_swapped_to_the_host_and_back_everybody_says_the_same(
    model: Path, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiny models compute a token faster than Python copies a block: what was measured is overruled."""
    monkeypatch.setattr("gristmill.engine.engine.swap_pays", lambda **_: True)
    requests = [replace(request, max_tokens=50) for request in family(4, count=10)]
    plain = run(engine(model, attention, prefix_cache=False), requests)
    swapping = engine(model, attention, max_batch_total_tokens=256, swap_gib=0.001)
    assert run(swapping, requests) == plain
    assert swapping.stats.blocks_loaded


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_the_first_output_says_how_much_of_the_prompt_was_there(model: Path) -> None:
    it = engine(model)
    prompt = list(range(100))
    cached: list[int | None] = []
    for name in ("a", "b"):
        it.add(Request(id=name, prompt_ids=prompt, max_tokens=3, ignore_eos=True))
        while it.has_work:
            cached += [output.cached_tokens for output in it.step()]
    assert cached == [0, None, None, 96, None, None]
    assert (it.stats.prefix_queries, it.stats.prefix_hits) == (200, 96)


@pytest.mark.parametrize("model", ["llama"], indirect=True)
def test_tenants_share_nothing(model: Path) -> None:
    it = engine(model)
    for name in ("ann", "bob"):
        it.add(Request(id=name, prompt_ids=list(range(100)), max_tokens=3, cache_salt=name))
        while it.has_work:
            it.step()
    assert it.stats.prefix_hits == 0


def test_choices_of_one_prompt_share_it_and_each_says_what_it_says_alone(model: Path) -> None:
    """The prompt goes through the model once, and its last, partial block once more for each other choice."""
    prompt = [random.Random(3).randrange(256) for _ in range(90)]
    choices = [
        Request(id=f"c{n}", prompt_ids=prompt, max_tokens=20, seed=1, choice=n, ignore_eos=True)
        for n in range(6)
    ]
    alone = engine(model, prefix_cache=False)
    expected = [run(alone, [choice])[choice.id] for choice in choices]
    assert len({tuple(ids) for ids in expected}) == len(choices), "the choices do not differ"
    together = engine(model, speculate=0)
    for choice in choices:
        together.add(choice)
    said: dict[str, list[int]] = {}
    fed = 0
    while together.has_work:
        for output in together.step():
            said.setdefault(output.id, []).extend(output.token_ids)
        fed += together.stats.tokens
    assert [said[choice.id] for choice in choices] == expected
    assert fed == 90 + 5 * 10 + 6 * 19
