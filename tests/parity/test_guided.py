"""Guided output fits its grammar, whatever the budget, and depends on the request alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import jsonschema
import pytest
from gristmill.engine.engine import Engine
from gristmill.engine.guided.compiler import Compiler
from gristmill.engine.guided.masks import Masks
from gristmill.engine.guided.smallest import smallest
from gristmill.engine.guided.state import GuidedState
from gristmill.engine.messages import Grammar, Processors, Request
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.sequence import Sequence
from gristmill.engine.settings import EngineSettings
from gristmill.engine.tokenizer import Tokenizer

from ..support.adapters import write_adapter
from ..support.hostile_grammars import hostile
from ..support.json_schemas import STRING, TREE, WRITTEN, closed, drawn

SCHEMAS = WRITTEN + drawn(140)
ROOMY = {"max_num_seqs": 64, "max_batch_prefill_tokens": 512, "max_batch_total_tokens": 24_576}
REPORT = Grammar(
    "json_schema",
    json.dumps(
        {
            **closed(
                title={**STRING, "maxLength": 12},
                tags={"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
                tree={"$ref": "#/$defs/node"},
            ),
            "$defs": TREE["$defs"],
        }
    ),
)
KINDS = {
    "report": REPORT,
    "any": Grammar("json_object"),
    "mail": Grammar("regex", r"[a-z]{3,12}@[a-z]{2,9}\.(com|org)"),
    "choice": Grammar("choice", '["strongly agree", "agree", "disagree", "strongly disagree"]'),
    "lark": Grammar("lark", 'start: "<" /[0-9]{1,30}/ ">" start?\n'),
    "gbnf": Grammar("gbnf", 'root ::= "let " [a-z]+ " = " [0-9]+ ("; " root)?'),
}


@dataclass
class Said:
    """What came out for one request, output by output."""

    pieces: list[list[int]] = field(default_factory=list[list[int]])
    finish: str | None = None
    closed: bool | None = None
    error: str | None = None
    logprobs: list[float] = field(default_factory=list[float])
    prompt: list[float] = field(default_factory=list[float])
    """Log probabilities, too."""

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("guided")
    made = write_tiny(directory / "model", tokenizer=True, max_position_embeddings=2048)
    write_adapter(directory / "adapters" / "ada", made)
    return made


def start(model: Path, **settings: Any) -> Engine:
    given = {**ROOMY, "lora_dir": model.parent / "adapters", **settings}
    return Engine(EngineSettings(model=str(model), dtype="float32", num_threads=1, **given))


@pytest.fixture(scope="module")
def engine(model: Path) -> Engine:
    return start(model)


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model)


@pytest.fixture(scope="module")
def compiler(model: Path) -> Compiler:
    return Compiler(model, 288)


def run(engine: Engine, requests: Iterable[Request], late: Iterable[Request] = ()) -> dict[str, Said]:
    """``late``: come after the eighth step."""
    said = defaultdict[str, Said](Said)

    def add(some: Iterable[Request]) -> None:
        for request in some:
            engine.add(request)
            said[request.id] = Said()
        wait(engine._guide._waiting.values())  # so that they all begin in the same step

    add(requests)
    for step in count(1):
        if not engine.has_work:
            break
        if step == 9:
            add(late)
        for output in engine.step():
            one = said[output.id]
            one.pieces.append(output.token_ids)
            one.logprobs += [told.logprob for told in output.logprobs]
            one.prompt += [told.logprob for told in output.prompt_logprobs]
            one.finish, one.closed, one.error = output.finish, output.closed, output.error
        engine.check()
    return said


def ask(name: str, grammar: Grammar | None, max_tokens: int = 200, **more: Any) -> Request:
    seed = sum(name.encode())
    return Request(
        id=name, prompt_ids=[seed % 250, 7, 9], max_tokens=max_tokens, seed=seed, grammar=grammar,
        temperature=more.pop("temperature", 1.5), **more,
    )  # fmt: skip


def schema_of(schema: dict[str, Any]) -> Grammar:
    return Grammar("json_schema", json.dumps(schema))


@pytest.mark.parametrize("spare", [0, 3, 30, 120])
def test_every_document_is_valid_at_temperature_1_5_with_any_budget_that_holds_one(
    engine: Engine, tokenizer: Tokenizer, compiler: Compiler, spare: int
) -> None:
    """``spare``: tokens beyond the shortest document."""
    least = [compiler.shortest(schema_of(schema)) for schema in SCHEMAS]
    assert len(SCHEMAS) >= 200
    assert None not in least
    requests = [
        ask(f"{number}", schema_of(schema), max(1, (least[number] or 0) + spare))
        for number, schema in enumerate(SCHEMAS)
    ]
    said = run(engine, requests)
    bad: list[str] = []
    for request, schema in zip(requests, SCHEMAS, strict=True):
        one = said[request.id]
        text = tokenizer.decode(one.tokens)
        try:
            jsonschema.validate(json.loads(text), schema)
            assert one.finish == "stop" or (one.finish == "length" and one.closed)
            assert len(one.tokens) <= request.max_tokens
            assert len(text) >= int(smallest(schema))
        except (ValueError, AssertionError, jsonschema.ValidationError) as exc:
            bad.append(f"{json.dumps(schema)[:200]} {one.finish} {one.error} {text!r} {str(exc)[:100]}")
    assert not bad, "\n".join(bad)


# ---- a request's output is its own


def mixed() -> list[Request]:
    """Guided rows of every kind between rows without a grammar, every third with an adapter; some have too
    small a budget to end alone."""
    asked: list[Request] = []
    for number in range(3):
        for kind, grammar in KINDS.items():
            budget = (110, 70, 58)[number]
            knobs = ({}, {"top_k": 40}, {"top_p": 0.9, "temperature": 0.8})[number]
            adapter = None if len(asked) % 3 else "ada"
            asked.append(ask(f"{kind}{number}", grammar, budget, priority=number, adapter=adapter, **knobs))
        asked.append(ask(f"free{number}", None, 40, ignore_eos=True))
    asked.append(ask("greedy", REPORT, 70, temperature=0.0))
    asked.append(ask("on", Grammar("regex", "[0-9]+"), 30, ignore_eos=True))
    asked.append(ask("long", Grammar("choice", '["ab"]'), 30, min_tokens=9))
    asked.append(ask("open", replace(REPORT, close=False), 40))
    return asked


@pytest.fixture(scope="module")
def together(engine: Engine) -> dict[str, Said]:
    return run(engine, mixed())


def tokens(said: dict[str, Said]) -> dict[str, tuple[list[int], str | None, bool | None]]:
    return {name: (one.tokens, one.finish, one.closed) for name, one in said.items()}


def test_the_mix_ends_in_every_way(together: dict[str, Said], tokenizer: Tokenizer) -> None:
    assert {(one.finish, one.closed) for one in together.values()} == {
        ("stop", None),
        ("length", None),
        ("length", True),
        ("length", False),
    }
    assert tokenizer.decode(together["long"].tokens) == "ab", "a complete text goes before min_tokens"
    assert tokenizer.decode(together["on"].tokens).isdecimal()
    assert len(together["on"].tokens) == 30


def test_alone_equals_batched(engine: Engine, together: dict[str, Said]) -> None:
    alone: dict[str, Said] = {}
    for request in mixed()[:8]:
        alone |= run(engine, [request])
    assert tokens(alone) == {name: one for name, one in tokens(together).items() if name in alone}


def test_guided_rows_leave_their_neighbours_alone(engine: Engine, together: dict[str, Said]) -> None:
    free = run(engine, [request for request in mixed() if request.grammar is None])
    assert tokens(free) == {name: one for name, one in tokens(together).items() if name in free}


def test_preempted_and_chunked_equals_batched(model: Path, together: dict[str, Said]) -> None:
    cramped = start(model, max_num_seqs=8, max_batch_prefill_tokens=16, max_batch_total_tokens=256)
    urgent = [replace(request, priority=0) for request in mixed()[::2]]
    assert tokens(run(cramped, mixed()[1::2], urgent)) == tokens(together)
    assert cramped.stats.preemptions > 0, "nobody was preempted: the test shows nothing"


def test_a_token_a_step_equals_skipping_over_forced_tokens(model: Path, together: dict[str, Said]) -> None:
    slow = start(model)
    slow.fast_forward = False
    said = run(slow, mixed())
    assert tokens(said) == tokens(together)
    assert max(len(piece) for piece in said["report0"].pieces) == 1
    assert max(len(piece) for piece in together["report0"].pieces) > 1, "nothing was forced"


def test_log_probabilities_change_nothing_and_are_there_for_forced_tokens(
    engine: Engine, together: dict[str, Said]
) -> None:
    asked = [replace(request, logprobs=2) for request in mixed()[:9]]
    said = run(engine, asked)
    assert tokens(said) == {name: one for name, one in tokens(together).items() if name in said}
    assert all(len(one.logprobs) == len(one.tokens) > 0 for one in said.values())


@pytest.mark.parametrize("max_tokens", [3, 2])
def test_the_prompt_is_told_of_where_every_token_is_forced(engine: Engine, max_tokens: int) -> None:
    request = ask("forced", Grammar("choice", '["yes"]'), max_tokens, prompt_logprobs=0)
    said = run(engine, [request])["forced"]
    assert (said.tokens, len(said.prompt)) == ([*b"yes"][:max_tokens], len(request.prompt_ids) - 1)


def cut(request: Request, whole: Said, last: int = 1_000) -> list[Request]:
    """The request as an attempt behind each of its last tokens; the very last, if no end token follows."""
    ends = range(max(1, len(whole.tokens) - last), len(whole.tokens) + (whole.finish == "length"))
    return [replace(request, id=f"{request.id}/{n}", output_ids=whole.tokens[:n]) for n in ends]


def test_resumed_behind_any_token_equals_uninterrupted(engine: Engine, together: dict[str, Said]) -> None:
    """Within the closing of a text that ran out of budget, and behind its last token, too."""
    asked = {request.id: request for request in mixed()}
    parts = [part for name in ("mail1", "on", "open", "report2") for part in cut(asked[name], together[name])]
    parts += [part for name in ("report0", "gbnf1") for part in cut(asked[name], together[name], last=12)]
    resumed = run(engine, parts)
    for part in parts:
        one, whole = resumed[part.id], together[part.id.partition("/")[0]]
        said = part.output_ids + one.tokens, one.finish, one.closed
        assert said == (whole.tokens, whole.finish, whole.closed), part.id
    assert together["report2"].closed
    assert len(together["report2"].pieces[-1]) > 1, "the text was not closed by a plan"
    assert asked["gbnf1"].adapter


def test_resumed_where_closing_comes_a_token_a_step_equals_uninterrupted(engine: Engine) -> None:
    """As it does for rows that want log probabilities, which are told of the new tokens only."""
    asked = next(replace(request, logprobs=1) for request in mixed() if request.id == "report2")
    whole = run(engine, [asked])["report2"]
    parts = cut(asked, whole, last=50)
    for part, one in zip(parts, run(engine, parts).values(), strict=True):
        assert (part.output_ids + one.tokens, one.finish, one.closed) == (whole.tokens, "length", True)
        assert one.logprobs == pytest.approx(whole.logprobs[len(part.output_ids) :], abs=1e-4)


def test_a_bad_grammar_is_its_own_rows_error(engine: Engine) -> None:
    said = run(
        engine,
        [
            ask("bad", schema_of({"type": "nothing"})),
            ask("good", schema_of({"const": 1})),
            ask("strayed", schema_of({"const": 1}), output_ids=[65, 66]),
        ],
    )
    assert said["bad"].finish == said["strayed"].finish == "error"
    assert "Invalid type: nothing" in (said["bad"].error or "")
    assert "do not fit the grammar" in (said["strayed"].error or "")
    assert said["good"].tokens == [49]


def test_a_stop_token_ends_a_text_also_where_the_grammar_forces_it(model: Path) -> None:
    """It did not when forced tokens were skipped over, so asking for log probabilities changed the text."""
    grammar = Grammar("regex", "abc[de]fgh[ij]")
    asked = [ask("plain", grammar), ask("told", grammar, logprobs=0)]
    for stop, expected in ((b"f", 4), (b"b", 1), (b"a", 0)):
        stopping = [replace(request, stop_token_ids=list(stop)) for request in asked]
        said = run(start(model), stopping)
        assert [len(one.tokens) for one in said.values()] == [expected, expected]
        assert [one.finish for one in said.values()] == ["stop", "stop"]
    late = run(start(model), [replace(request, stop_token_ids=list(b"f"), min_tokens=9) for request in asked])
    assert [len(one.tokens) for one in late.values()] == [8, 8]


def test_what_is_forced_is_said_whatever_else_the_request_rules_out(model: Path) -> None:
    barred = Processors(bad_words=[list(b"b"), list(b"g")])
    asked = [ask("plain", Grammar("regex", "abc[de]fgh[ij]"), processors=barred)]
    asked.append(replace(asked[0], id="told", logprobs=0))
    assert [len(one.tokens) for one in run(start(model), asked).values()] == [8, 8]


def test_tokens_forced_from_the_start_are_said_also_by_a_row_that_then_ends(model: Path) -> None:
    """They were to come out with the first sampled token, and were lost when that was an end."""
    asked = ask("short", Grammar("regex", "abc(d)?"), processors=Processors(bad_words=[list(b"d")]))
    (said,) = run(start(model), [asked]).values()
    assert (said.tokens, said.finish) == (list(b"abc"), "stop")


# ---- what a guided row costs the others


def test_forced_tokens_need_no_forward_pass_of_their_own(model: Path) -> None:
    """Ten fields with long names: the model chooses digits, and the names between them come with those."""
    names = [f"the name of field {number}" for number in range(10)]
    grammar = schema_of(closed(**{name: {"enum": [1, 2]} for name in names}))
    passes: list[int] = []
    for fast in (True, False):
        engine = start(model)
        engine.fast_forward = fast
        engine.add(ask("forced", grammar, 400))
        said: list[int] = []
        passes.append(0)
        while engine.has_work:
            said += [token for output in engine.step() for token in output.token_ids]
            passes[-1] += engine.stats.tokens > 0
    assert len(said) > 250
    assert passes == [10, len(said)]


def test_masks_are_computed_while_the_model_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that ends only when the masks are there would never end, were they begun behind it."""
    begun: list[Masks | None] = []
    masks, forward = engine._guide.start, engine._runner.forward

    def begin(seqs: list[Sequence]) -> Masks | None:
        begun.append(masks(seqs))
        return begun[-1]

    def last(*args: Any) -> Any:
        if begun[-1] and begun[-1].future:
            begun[-1].future.result(120)
        return forward(*args)

    monkeypatch.setattr(engine._guide, "start", begin)
    monkeypatch.setattr(engine._runner, "forward", last)
    said = run(engine, [ask("mail", KINDS["mail"])])
    assert said["mail"].finish == "stop"
    assert any(one and one.future for one in begun)


def test_others_go_on_while_a_grammar_is_compiled(model: Path) -> None:
    engine, compiled = start(model), Event()
    run(engine, [ask("first", KINDS["choice"])])
    assert engine._guide._thread
    engine._guide._thread.submit(compiled.wait)  # a grammar that takes for ever
    engine.add(ask("free", None, 30, ignore_eos=True))
    engine.add(ask("guided", KINDS["mail"]))
    ended = [output for _ in range(31) for output in engine.step() if output.finish]
    assert [output.id for output in ended] == ["free"]
    compiled.set()
    assert run(engine, [])["guided"].finish == "stop"


def test_an_adapter_that_is_not_there_ends_its_own_request_once_the_grammar_is_ready(engine: Engine) -> None:
    """Looked up behind the grammar, it ended the engine's step, and with it everybody."""
    lost = [ask(f"lost{number}", KINDS["mail"], 40, adapter="nobody") for number in range(2)]
    free = ask("free", None, 20, ignore_eos=True)
    said = run(engine, [free, *lost])
    assert len(said["free"].tokens) == 20
    assert {said[request.id].finish for request in lost} == {"error"}
    assert "there is no adapter 'nobody' here" in str(said["lost0"].error)
    engine.check()


def test_what_hostile_grammars_ask_for_is_bounded(engine: Engine) -> None:
    """Each ends within its tokens, and whoever runs beside them says what it says alone."""
    kinds = ("refs", "repeats", "ambiguity: e")
    asked = [ask(name, grammar, 30) for name, grammar in hostile().items() if name.startswith(kinds)]
    free = ask("free", None, 40, ignore_eos=True)
    said = run(engine, [free, *asked])
    assert said["free"].tokens == run(engine, [free])["free"].tokens
    for request in asked:
        assert said[request.id].finish in ("stop", "length", "error")
        assert len(said[request.id].tokens) <= 30


def test_a_way_to_an_end_that_is_not_there_is_not_looked_for_at_each_token(
    compiler: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    find = compiler.closer.find

    def count_and_find(matcher: Any, room: int) -> list[int] | None:
        looked.append(room)
        return find(matcher, room)

    monkeypatch.setattr(compiler.closer, "find", count_and_find)
    state = GuidedState(compiler.matcher(Grammar("regex", "[ab]{5000}")), compiler.closer, close=True)
    assert state.start(500, []) == (0, [])
    for spent in range(400):
        state.take(97, 500 - spent)
    assert 1 < len(looked) < 12
