"""The smallest document of a schema is counted without writing it, and what has no end is seen."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from gristmill.engine.guided.smallest import COUNTED_TO, smallest

from ..support.json_schemas import EVEN_ODD, EXPRESSION, INTEGER, INVOICE, LINKED, STRING, TREE, closed


@pytest.mark.parametrize(
    ("schema", "document"),
    [
        (True, 0),
        ({"type": ["null", "boolean", "integer"]}, 0),
        ({"type": "string", "minLength": 3}, "aaa"),
        ({"const": {"é": [1, None, False, ""]}}, {"é": [1, None, False, ""]}),
        ({"enum": ["abc", {"a": 1}, "ab"]}, "ab"),
        ({"type": "array", "minItems": 3, "items": {"const": "x"}}, ["x", "x", "x"]),
        ({"type": "array", "minItems": 3, "prefixItems": [{"const": "xy"}], "items": INTEGER}, ["xy", 0, 0]),
        ({"type": "object", "required": ["a"], "minProperties": 2}, {"a": 0, "": 0}),
        ({"allOf": [{"const": "abc"}, STRING], "type": "string"}, "abc"),
        ({"anyOf": [closed(a=INTEGER), {"type": "string", "minLength": 4}]}, "aaaa"),
        (TREE, {"v": 0, "kids": []}),
        (LINKED, {"value": ""}),
        (EXPRESSION, 0),
        (EVEN_ODD, None),
        ({"$ref": "#/$defs/a~1b%25/1", "$defs": {"a/b%": [INTEGER, {"const": "here"}]}}, "here"),
    ],
)
def test_it_is_as_long_as_the_smallest_document(schema: Any, document: Any) -> None:
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    assert smallest(schema) == len(text)


def test_references_that_double_are_counted_once_each() -> None:
    names = [f"d{level}" for level in range(2_000)]
    twice = {
        one: closed(a={"$ref": f"#/$defs/{next_one}"}, b={"$ref": f"#/$defs/{next_one}"})
        for one, next_one in pairwise(names)
    }
    for levels, size in ((1, 1), (2, 13), (3, 37), (2_000, COUNTED_TO)):
        start = {"$ref": f"#/$defs/{names[-levels]}"}
        assert smallest({"$defs": {**twice, names[-1]: INTEGER}, **start}) == size
    assert smallest({**INVOICE, "$defs": twice}) == smallest(INVOICE), "only what is referred to counts"


def test_a_circle_without_a_way_out_is_named() -> None:
    to_b = {"$ref": "#/$defs/b"}
    defs = {"a": closed(b=to_b), "b": {"anyOf": [closed(a={"$ref": "#/$defs/a"}), {"allOf": [to_b]}]}}
    assert smallest({"$defs": defs, "type": "array", "minItems": 1, "items": to_b}) in (
        "#/$defs/a",
        "#/$defs/b",
    )
    assert smallest({"$defs": defs, "type": "array", "items": to_b}) == 2
    assert smallest({"$ref": "#"}) == "#"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["object", 3], "required": {"a": 1}, "properties": [1]},
        {"type": "array", "minItems": 1e400, "items": 3},
        {"anyOf": [], "oneOf": 3, "allOf": {}, "enum": []},
        {"$ref": 5},
        {"$ref": "#/anyOf/7/a", "anyOf": [1]},
        {"$ref": "https://example.com/schema"},
    ],
)
def test_what_is_wrong_with_a_schema_is_for_others_to_say(schema: Any) -> None:
    assert isinstance(smallest(schema), int)
