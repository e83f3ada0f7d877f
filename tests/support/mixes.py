"""Requests that ask for anything at once, and engines in which anything may happen to them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

import torch
from gristmill.engine.detokenizer import Detokenizer
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Dry, Grammar, Output, Processors, Request, Watermark
from gristmill.engine.models.tiny import VOCAB
from gristmill.engine.scheduler import SMALLEST_STEP
from gristmill.engine.speculation import StepTimes
from gristmill.engine.stopping import StopMatcher
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.logprobs import TokenLogprobs
from hypothesis import strategies as st

ADAPTERS = ("one", "two", "three")
LONGEST = 128
"""Prompt and output of a request never exceed it."""
STEPS = 60
"""Until when things may happen."""
GRAMMARS = (
    Grammar("json_schema", '{"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 4}'),
    Grammar("json_schema", '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}}}'),
    Grammar("json_object"),
    Grammar("regex", r"[a-z]{3,12}@[a-z]{2,9}\.(com|org)"),
    Grammar("choice", '["strongly agree", "agree", "disagree", "strongly disagree"]'),
    Grammar("regex", "[0-9]+", close=False),
    Grammar("gbnf", 'root ::= "let " [a-z]+ " = " [0-9]+ ("; " root)?'),
)
BASES = ([5, 6, 7, 8, 9, 10] * 16, list(b"the mill grinds slowly, yet it grinds exceedingly fine; " * 2))


@dataclass(frozen=True, slots=True)
class Wish:
    """A request, and what its consumer looks for in the text."""

    request: Request
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    comes: int = 0
    """Before which step."""
    leaves: int | None = None
    """Before which step its consumer takes it back."""
    cut: int | None = None
    """After so many tokens (modulo those there are) an earlier attempt ended."""


@dataclass(frozen=True, slots=True)
class World:
    """An engine, and what happens to it."""

    attention: str = "torch"
    deterministic: bool = False
    dtype: str = "float32"
    family: str = "llama"
    prefix_cache: bool = True
    swap: bool = False
    """Every block that has to make way and is wanted is kept on the host."""
    speculate: int = 8
    """Every guess is checked."""
    fast_forward: bool = True
    overlap: bool = False
    """A step is launched before the tokens of the one before are known."""
    block_size: int = 16
    blocks: int = 12
    seqs: int = 6
    step_tokens: int = 32
    lora_memory_mib: int = 1
    fails: frozenset[int] = frozenset()
    """Steps whose first try runs out of memory."""
    grows: frozenset[int] = frozenset()
    """Steps before which it is as if memory had been enough for long."""
    patience: int = 0
    """Steps between a stop string and the consumer's word that it was met."""

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "prefix_cache": self.prefix_cache or self.swap,
            "swap_gib": 0.001 if self.swap else 0.0,
            "speculate": self.speculate,
            "overlap": self.overlap,
            "kv_block_size": self.block_size,
            "max_batch_total_tokens": max(LONGEST, self.blocks * self.block_size),
            "max_num_seqs": min(self.seqs, self.step_tokens),
            "max_batch_prefill_tokens": self.step_tokens,
            "lora_memory_mib": self.lora_memory_mib,
        }


# ---- what is drawn


def perhaps(draw: st.DrawFn, strategy: st.SearchStrategy[Any], otherwise: Any) -> Any:
    return draw(strategy) if draw(st.integers(0, 2)) == 2 else otherwise


TOKEN = st.integers(0, VOCAB - 1)
WORDS = st.lists(st.lists(TOKEN, min_size=1, max_size=3), min_size=1, max_size=4)


@st.composite
def processors(draw: st.DrawFn) -> Processors:
    dry = st.builds(
        Dry, multiplier=st.floats(0.1, 3), allowed_length=st.integers(1, 3), range=st.sampled_from([0, 20])
    )
    return Processors(
        watermark=perhaps(draw, st.builds(Watermark, gamma=st.floats(0.1, 0.9)), None),
        logit_bias=perhaps(draw, st.dictionaries(TOKEN, st.floats(-9, 9), max_size=5), {}),
        repetition_penalty=perhaps(draw, st.floats(0.5, 3), 1.0),
        frequency_penalty=perhaps(draw, st.floats(-2, 2), 0.0),
        presence_penalty=perhaps(draw, st.floats(-2, 2), 0.0),
        dry=perhaps(draw, dry, None),
        bad_words=perhaps(draw, WORDS, []),
        allowed_token_ids=perhaps(draw, st.lists(TOKEN, min_size=1, max_size=150), None),
        typical_p=perhaps(draw, st.floats(0.1, 0.99), 1.0),
    )


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Many begin alike, at and around the borders of blocks; some repeat themselves."""
    shared = draw(st.sampled_from(BASES))[: draw(st.sampled_from([0, 16, 31, 48, 64, 70]))]
    return [*shared, *draw(st.lists(st.integers(0, 40), max_size=20))] or [7]


@st.composite
def requests(draw: st.DrawFn, name: str) -> Request:
    max_tokens = draw(st.sampled_from([36, 30, 20, 9, 3, 1]))
    much = draw(st.booleans())  # who asks for little is guessed for
    return Request(
        id=name,
        prompt_ids=draw(prompts()),
        max_tokens=max_tokens,
        min_tokens=perhaps(draw, st.integers(0, max_tokens), 0),
        temperature=draw(st.sampled_from([0.0, 0.05, 0.7, 1.0, 1.5])),
        top_p=perhaps(draw, st.floats(0.1, 0.99), 1.0),
        top_k=perhaps(draw, st.integers(1, 60), 0),
        min_p=perhaps(draw, st.floats(0.001, 0.3), 0.0),
        seed=draw(st.integers(0, 3)),
        choice=draw(st.integers(0, 2)),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=perhaps(draw, st.lists(TOKEN, max_size=20), []),
        adapter=perhaps(draw, st.sampled_from(ADAPTERS), None),
        priority=draw(st.integers(0, 2)),
        arrival=float(draw(st.integers(0, 3))),
        group=draw(st.sampled_from(["", "run", "run"])),
        cache_salt=draw(st.sampled_from(["ann", "ann", "bob"])),
        processors=perhaps(draw, processors(), None) if much else None,
        logprobs=perhaps(draw, st.integers(0, 5), None) if much else None,
        prompt_logprobs=perhaps(draw, st.integers(0, 5), None) if much else None,
        grammar=perhaps(draw, st.sampled_from(GRAMMARS), None) if much else None,
    )


@st.composite
def wishes(draw: st.DrawFn) -> list[Wish]:
    """Up to eight, now and then the same one twice."""
    drawn = [
        Wish(
            draw(requests(f"r{number}")),
            stop=perhaps(
                draw, st.lists(st.text("aeinst rP,.", min_size=1, max_size=2), max_size=5).map(tuple), ()
            ),
            include_stop=draw(st.booleans()),
            comes=draw(st.sampled_from([0, 0, 0, 1, 2, 5, 11, 24])),
            leaves=perhaps(draw, st.integers(1, STEPS), None) if number else None,
            cut=perhaps(draw, st.integers(0, 36), None),
        )
        for number in range(draw(st.sampled_from([7, 5, 3, 1])))
    ]
    if draw(st.booleans()):
        twin = drawn[0]
        drawn.append(replace(twin, request=replace(twin.request, id="twin"), comes=twin.comes + 9))
    return drawn


@st.composite
def worlds(draw: st.DrawFn, attentions: tuple[str, ...]) -> World:
    attention = draw(st.sampled_from(attentions))
    deterministic = draw(st.booleans())
    some_steps = st.frozensets(st.integers(0, STEPS), max_size=3)
    block_size = draw(st.sampled_from([16, 32] if attention == "cpu" else [16, 4]))
    return World(
        attention=attention,
        deterministic=deterministic,
        dtype=draw(st.sampled_from(["float32", "bfloat16"])) if deterministic else "float32",
        family=draw(st.sampled_from(["llama", "mistral"])),
        prefix_cache=draw(st.booleans()),
        swap=draw(st.booleans()),
        speculate=draw(st.sampled_from([8, 3, 0])),
        fast_forward=draw(st.booleans()),
        overlap=draw(st.booleans()),
        block_size=block_size,
        blocks=-(-LONGEST // block_size) + draw(st.sampled_from([0, 0, 2, 30])),
        seqs=draw(st.sampled_from([8, 8, 3])),
        step_tokens=draw(st.sampled_from([16, 24, 64, 512])),
        lora_memory_mib=draw(st.sampled_from([1, 64])),
        fails=draw(some_steps),
        grows=draw(some_steps),
        patience=draw(st.integers(0, 2)),
    )


# ---- what comes out


@dataclass
class Said:
    """What the consumer has of one request."""

    wish: Wish
    tokenizer: Tokenizer
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt: list[TokenLogprobs] = field(default_factory=list)
    end: tuple[Any, ...] | None = None
    """Why it ended."""
    whole: int = 0
    """So many of the tokens came before the last output did."""

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.tokenizer)
        self._matcher = StopMatcher(self.wish.stop, self.wish.include_stop)
        for token in self.wish.request.output_ids:
            self._push(token)
        assert self.end is None, "a stop string in what an earlier attempt said"

    def take(self, output: Output) -> bool:
        """True: a stop string was met, and the engine is to be told."""
        if self.end is not None:
            return False
        if output.prompt_logprobs:
            assert output.prompt_from == len(self.prompt) + 1, "a piece twice, or one is missing"
            self.prompt += output.prompt_logprobs
        assert len(output.logprobs) in (0, len(output.token_ids))
        self.whole = len(self.tokens)
        for index, token in enumerate(output.token_ids):
            self.logprobs += output.logprobs[index : index + 1]
            self._push(token)
            if self.end is not None:
                return output.finish is None
        if output.finish:
            text, matched = self._matcher.push(self._detokenizer.finish())
            self.text += text if matched else text + self._matcher.finish()
            self.end = (output.finish, output.stop_token_id, output.closed, output.error_code)
        return False

    def _push(self, token: int) -> None:
        self.tokens.append(token)
        text, matched = self._detokenizer.push([token]), None
        if len(self.tokens) <= self.wish.request.min_tokens:
            text = self._matcher.pass_over(text)
        else:
            text, matched = self._matcher.push(text)
        self.text += text
        if matched is not None:
            self.end = ("stop", matched)


class AlwaysWorthIt(StepTimes):
    """Any step takes a second, so that every guess is checked."""

    def expect(self, tokens: int) -> float | None:
        return 1.0


def run(engine: Engine, asked: list[Wish], tokenizer: Tokenizer, world: World | None = None) -> list[Said]:
    """Everybody's answer. Raises if the engine's books do not balance after any step."""
    world = world or World()
    said = {wish.request.id: Said(wish, tokenizer) for wish in asked}
    last = max(wish.comes for wish in asked)
    gone: list[tuple[int, str]] = [(w.leaves, w.request.id) for w in asked if w.leaves is not None]
    for step in count():
        _admit(engine, [wish.request for wish in asked if wish.comes == step])
        for _, name in [one for one in gone if one[0] <= step and said[one[1]].wish.comes <= step]:
            engine.abort(name)
        if step >= last and not engine.has_work:
            break
        if step in world.grows:
            engine._scheduler.grow()
        engine._desk.wait(60.0)
        with _memory_runs_out(engine) if step in world.fails else _nothing_happens():
            outputs = engine.step()
        gone += [(step + 1 + world.patience, one.id) for one in outputs if said[one.id].take(one)]
        engine.check()
    assert engine.stats.free_blocks == engine.stats.total_blocks
    return list(said.values())


def _admit(engine: Engine, requests: list[Request]) -> None:
    """They have left the thread that compiles grammars: the same example always takes the same steps."""
    for request in requests:
        engine.add(request)
    wait(engine._guide._waiting.values())


@contextmanager
def _memory_runs_out(engine: Engine) -> Iterator[None]:
    """Once, unless the step is as small as can be: that would be the end of somebody."""
    forward, tries = engine._runner.forward, count()

    def fails(*args: Any) -> torch.Tensor:
        logits = forward(*args)
        if next(tries) == 0 and engine._scheduler.step_tokens > max(SMALLEST_STEP, engine.info.block_size):
            raise torch.OutOfMemoryError("a test takes it away")
        return logits

    engine._runner.forward = fails  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine._runner.forward = forward  # type: ignore[method-assign]


@contextmanager
def _nothing_happens() -> Iterator[None]:
    yield
