"""What a request generates depends on the request alone: any mix of wishes, in any engine, whatever happens.

Alone means: by itself in an engine without a prefix cache, speculation or skipped tokens, whose steps hold
the longest prompt. There the other tests compare with transformers.

A quick look by default, the same one always. ``MIXES=20000 pytest tests/property/test_mixes.py`` hunts.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Request
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.native.build import find_compiler
from gristmill.engine.settings import EngineSettings
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.logprobs import TokenLogprobs
from hypothesis import HealthCheck, Phase, example, given, settings

from ..support.adapters import ATTENTION, write_adapter
from ..support.mixes import ADAPTERS, LONGEST, AlwaysWorthIt, Said, Wish, World, run, wishes, worlds

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.timeout(0 if "MIXES" in os.environ else 400)]

TOLERANCE = 1e-4
ATTENTIONS = ("torch", "cpu") if find_compiler() else ("torch",)
HUNTED = int(os.environ.get("MIXES", "0"))
PROFILE = settings(
    max_examples=HUNTED or 8,
    derandomize=not HUNTED,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)


class Mill:
    """Models with adapters, and engines for them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.seen: Counter[str] = Counter()
        """What has happened to engines so far."""
        for family in ("llama", "mistral"):
            model = write_tiny(directory / family, family, tokenizer=True)
            for seed, name in enumerate(ADAPTERS):  # two of them are more than a MiB
                write_adapter(
                    directory / "adapters" / family / name, model, seed=seed, targets=ATTENTION, rank=100
                )
        self.tokenizer = Tokenizer(directory / "llama")
        self.plain = cache(self._plain)

    def engine(self, world: World) -> Engine:
        made = self._start(world, **world.settings)
        made.fast_forward = world.fast_forward
        if made._speculation:
            made._speculation.times = AlwaysWorthIt()
        return made

    def _plain(self, attention: str, deterministic: bool, dtype: str, family: str) -> Engine:
        world = World(attention=attention, deterministic=deterministic, dtype=dtype, family=family)
        made = self._start(
            world, prefix_cache=False, speculate=0, max_num_seqs=1, max_batch_total_tokens=LONGEST
        )
        made.fast_forward = False
        return made

    def _start(self, world: World, **knobs: Any) -> Engine:
        return Engine(
            EngineSettings(
                model=str(self._directory / world.family),
                device="cpu",
                attention=world.attention,
                deterministic=world.deterministic,
                dtype=world.dtype,
                lora_dir=self._directory / "adapters" / world.family,
                max_total_tokens=LONGEST,
                num_threads=1,
                **knobs,
            )
        )

    def note(self, engine: Engine, asked: list[Wish]) -> None:
        stats = engine.stats
        self.seen.update(
            preempted=stats.preemptions,
            found=stats.prefix_hits,
            swapped=stats.blocks_loaded,
            guessed=stats.accepted,
            adapters=stats.adapter_loads,
            shrunk=stats.step_tokens < engine.info.step_tokens,
            resumed=sum(bool(wish.request.output_ids) for wish in asked),
        )


@pytest.fixture(scope="module")
def mill(tmp_path_factory: pytest.TempPathFactory) -> Mill:
    return Mill(tmp_path_factory.mktemp("mixes"))


def crowd() -> list[Wish]:
    """More than a small engine holds, and the urgent come last."""
    return [
        Wish(
            Request(
                id=f"c{number}",
                prompt_ids=[*range(number, number + 40)],
                max_tokens=36,
                seed=number,
                ignore_eos=True,
                priority=2 - number // 3,
                adapter=None if number % 3 else ADAPTERS[number // 3],
                logprobs=1 if number % 2 else None,
                prompt_logprobs=1 if number == 4 else None,
            ),
            comes=3 * number,
            cut=7 if number % 4 == 3 else None,
        )
        for number in range(9)
    ]


SMALL = World(blocks=8, swap=True, step_tokens=24, seqs=8, fails=frozenset({4}))


@PROFILE
@example(world=SMALL, asked=crowd())
@given(world=worlds(ATTENTIONS), asked=wishes())
def test_what_a_request_generates_is_what_it_generates_alone(
    mill: Mill, world: World, asked: list[Wish]
) -> None:
    plain = mill.plain(world.attention, world.deterministic, world.dtype, world.family)
    expected = [run(plain, [replace(wish, comes=0, leaves=None)], mill.tokenizer)[0] for wish in asked]
    begun = [interrupted(wish, said) for wish, said in zip(asked, expected, strict=True)]
    engine = mill.engine(world)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gristmill.engine.engine.swap_pays", lambda **_: True)
        found = run(engine, begun, mill.tokenizer, world)
    mill.note(engine, begun)
    for one, other in zip(found, expected, strict=True):
        check_alike(one, other, exactly=world.deterministic)


def interrupted(wish: Wish, said: Said) -> Wish:
    """The wish as it is after an attempt that has said some of this. What closes a text comes whole.

    Whoever has said a token has told of the prompt, and is not asked again.
    """
    if wish.cut is None:
        return wish
    whole = said.whole if said.end == ("length", None, True, None) else len(said.tokens)
    most = whole - (len(said.end or ()) == 2)  # a stop string would have ended it
    done = said.tokens[: wish.cut % (max(0, most) + 1)]
    again = None if done else wish.request.prompt_logprobs
    return replace(wish, request=replace(wish.request, output_ids=done, prompt_logprobs=again))


def check_alike(found: Said, expected: Said, *, exactly: bool) -> None:
    name, begun, so_far = found.wish.request.id, len(found.wish.request.output_ids), len(found.tokens)
    if found.end is None:
        assert found.wish.leaves is not None, f"{name} never ended"
        assert found.tokens == expected.tokens[:so_far], name
        assert expected.text.startswith(found.text), name
    else:
        assert (found.tokens, found.end) == (expected.tokens, expected.end), name
        assert found.text == expected.text, name
        asked = found.wish.request.prompt_logprobs is not None
        assert len(found.prompt) == (len(expected.prompt) if asked else 0), name
    check_close(found.logprobs, expected.logprobs[begun:so_far], exactly)
    check_close(found.prompt, expected.prompt[: len(found.prompt)], exactly)


def check_close(found: list[TokenLogprobs], expected: list[TokenLogprobs], exactly: bool) -> None:
    assert len(found) == len(expected)
    if exactly:
        assert found == expected
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE)
        assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=TOLERANCE)


def test_and_everything_has_happened(mill: Mill) -> None:
    """Else the examples show nothing."""
    missing = [what for what, times in mill.seen.items() if not times]
    assert mill.seen
    assert not missing, mill.seen
