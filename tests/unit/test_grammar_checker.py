"""A grammar is refused in words and in bounded time, before an engine sees it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from gristmill.engine.guided.checker import GrammarChecker
from gristmill.engine.guided.source import MAX_CHOICES
from gristmill.engine.messages import Grammar
from gristmill.engine.models.tiny import write_tiny
from gristmill.schemas.errors import InvalidSchema

from ..support import hostile_grammars


@pytest.fixture(scope="module")
def checker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GrammarChecker]:
    made = GrammarChecker(str(write_tiny(tmp_path_factory.mktemp("checked"), tokenizer=True)), 288)
    yield made
    made.close()


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def nested(levels: int) -> Any:
    found: Any = {}
    for _ in range(levels):
        found = {"items": found}
    return found


@pytest.mark.parametrize(
    ("grammar", "word"),
    [
        (schema({"type": "foo"}), "Invalid type: foo"),
        (schema({"not": {}}), 'Unimplemented keys: ["not"]'),
        (schema({"$ref": "#/$defs/x"}), "does not exist"),
        (schema({"$ref": "#"}), "'#' leads to itself whatever is chosen, so that no document ends"),
        (hostile_grammars.hostile()["refs: doubled 30 times"], "has 12,884,901,877 characters and 1,000,000"),
        (schema({"type": "array", "minItems": 600_000}), "has 1,200,001 characters"),
        (schema({"type": "integer", "minimum": 5, "maximum": 3}), "minimum (5) is greater than maximum (3)"),
        (schema(False), "not a JSON object"),
        (Grammar("json_schema", "{"), "not JSON"),
        (schema(nested(70)), "nests more than 64 levels at '#/items/items"),
        (schema({"enum": ["x" * 1000] * 200}), "bytes and 131,072 are allowed"),
        (Grammar("choice", "[]"), "at least one string"),
        (Grammar("choice", '["a", 5]'), "choice 1 is not a string"),
        (Grammar("regex", "(a"), "unclosed group"),
        (Grammar("regex", "(?=a)b"), "look-around"),
        (Grammar("regex", ""), "empty"),
        (Grammar("gbnf", 'root ::= "a" other'), "'other' not found"),
        (Grammar("gbnf", "(" * 5000), "gbnf"),
        (Grammar("lark", "start: nothing"), "nothing"),
        (Grammar("choice", json.dumps([f"{i}" for i in range(5000)])), "5,000 choices, and 4,096"),
    ],
)
def test_a_grammar_that_cannot_be_used_is_refused_in_words(
    checker: GrammarChecker, grammar: Grammar, word: str
) -> None:
    with pytest.raises(InvalidSchema) as caught:
        checker.check(grammar, 100_000)
    assert word in caught.value.message
    assert len(caught.value.message) < 600


@pytest.mark.parametrize("text", ["{}", "answer {} of them"])
def test_as_many_choices_as_are_promised_can_be_used(checker: GrammarChecker, text: str) -> None:
    choices = [text.format(number) for number in range(MAX_CHOICES)]
    checker.check(Grammar("choice", json.dumps(choices)), 100)


def hostile() -> dict[str, Grammar]:
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=8)) for _ in range(3000)]
    rules = [f"r{number}" for number in range(1000)]  # one walk of four ends before the limit is met
    return {
        "repeated": Grammar("regex", "(x{1000}){1000}"),
        "options": Grammar("lark", f"start: {' '.join(rules)}\n" + "".join(f'{r}: "x"?\n' for r in rules)),
        "branches": schema({"anyOf": [{"properties": {word: {"type": "integer"}}} for word in words[:500]]}),
    }


@pytest.mark.parametrize("name", hostile())
def test_a_hostile_grammar_costs_seconds_and_only_itself(checker: GrammarChecker, name: str) -> None:
    with pytest.raises(InvalidSchema):
        checker.check(hostile()[name], 100_000)
    checker.check(schema({"type": "integer"}), 1)


def test_a_budget_too_small_for_any_text_is_refused_with_the_number(checker: GrammarChecker) -> None:
    grammar = schema({"const": "abcdef"})
    with pytest.raises(InvalidSchema, match=r"takes 8 tokens and max_tokens is 7; raise max_tokens"):
        checker.check(grammar, 7)
    checker.check(grammar, 8)
    checker.check(Grammar(grammar.kind, grammar.text, close=False), 7)
