"""Guided output fits its grammar, whatever the budget, and depends on the request alone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import wait
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from gristmill.engine.engine import Engine
from gristmill.engine.guided.compiler import Compiler
from gristmill.engine.messages import Grammar, Processors, Request
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.settings import EngineSettings
from gristmill.engine.tokenizer import Tokenizer

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

    @property
    def tokens(self) -> list[int]:
        return [token for piece in self.pieces for token in piece]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("guided"), tokenizer=True, max_position_embeddings=2048)


def start(model: Path, **settings: Any) -> Engine:
    return Engine(EngineSettings(model=str(model), dtype="float32", num_threads=1, **{**ROOMY, **settings}))


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
    said: dict[str, Said] = {}

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
        except (ValueError, AssertionError, jsonschema.ValidationError) as exc:
            bad.append(f"{json.dumps(schema)[:200]} {one.finish} {one.error} {text!r} {str(exc)[:100]}")
    assert not bad, "\n".join(bad)


# ---- a request's output is its own


def mixed() -> list[Request]:
    """Guided rows of every kind between rows without a grammar; some have too small a budget to end alone."""
    asked: list[Request] = []
    for number in range(3):
        for kind, grammar in KINDS.items():
            budget = (110, 70, 58)[number]
            knobs = ({}, {"top_k": 40}, {"top_p": 0.9, "temperature": 0.8})[number]
            asked.append(ask(f"{kind}{number}", grammar, budget, priority=number, **knobs))
        asked.append(ask(f"free{number}", None, 40, ignore_eos=True))
    asked.append(ask("greedy", REPORT, 70, temperature=0.0))
    asked.append(ask("on", Grammar("regex", "[0-9]+"), 30, ignore_eos=True))
    asked.append(ask("long", Grammar("choice", '["ab"]'), 30, min_tokens=9))
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
    told: dict[str, int] = dict.fromkeys((request.id for request in asked), 0)
    for request in asked:
        engine.add(request)
    said = {request.id: Said() for request in asked}
    while engine.has_work:
        for output in engine.step():
            assert len(output.logprobs) == len(output.token_ids)
            told[output.id] += len(output.logprobs)
            said[output.id].pieces.append(output.token_ids)
            said[output.id].finish, said[output.id].closed = output.finish, output.closed
    assert tokens(said) == {name: one for name, one in tokens(together).items() if name in said}
    assert min(told.values()) > 0


def test_resumed_at_any_token_equals_uninterrupted(engine: Engine, together: dict[str, Said]) -> None:
    """But within the closing of a text that ran out of budget, which is given out whole, with its end."""
    for request in mixed():
        whole = together[request.id]
        if request.id not in ("report0", "report2", "gbnf1", "mail1", "any1"):
            continue
        last = len(whole.tokens) - len(whole.pieces[-1])
        cuts = range(1, last + 1 if whole.closed else len(whole.tokens))
        parts = [replace(request, id=f"{request.id}/{cut}", output_ids=whole.tokens[:cut]) for cut in cuts]
        for part, one in zip(parts, run(engine, parts).values(), strict=True):
            assert (part.output_ids + one.tokens, one.finish, one.closed) == tokens(together)[request.id]


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
