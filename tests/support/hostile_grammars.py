"""Grammars that mean harm: each asks for far more time, memory or tokens than its own size."""

from __future__ import annotations

import json
import random
from typing import Any

from gristmill.engine.messages import Grammar

from .json_schemas import INTEGER, Schema, closed

_draw = random.Random(1)
WORDS = ["".join(_draw.choices("abcdefgh", k=8)) for _ in range(50_000)]


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def _tower(levels: int) -> Schema:
    value: Schema = INTEGER
    for _ in range(levels):
        value = closed(k=value)
    return value


def _doubling(levels: int, several: Any) -> Schema:
    """Each definition names the one before it twice: 2 to the power of ``levels`` places."""
    defs = {"d0": INTEGER}
    for level in range(1, levels + 1):
        before = {"$ref": f"#/$defs/d{level - 1}"}
        defs[f"d{level}"] = several(before)
    return {"$defs": defs, "$ref": f"#/$defs/d{levels}"}


def _twice(before: Schema) -> Schema:
    return closed(a=before, b=before)


def _either(before: Schema) -> Schema:
    return {"anyOf": [{"type": "array", "items": before}, closed(a=before)]}


def _both(before: Schema) -> Schema:
    return {"allOf": [before, before]}


def hostile() -> dict[str, Grammar]:
    """By name; the first part of a name is the kind of harm."""
    loop = {"$defs": {"a": closed(a={"$ref": "#/$defs/a"})}, "$ref": "#/$defs/a"}
    circle = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    rules = 3_000
    nulls = "start: " + " ".join(f"r{i}" for i in range(rules)) + "\n"
    nulls += "\n".join(f'r{i}: "x"?' for i in range(rules))
    return {
        "depth: 5,000 lists": Grammar("json_schema", '{"items":' * 5_000 + "{}" + "}" * 5_000),
        "depth: 70 objects": schema(_tower(70)),
        "depth: endless recursion": schema(loop),
        "depth: a circle of references": schema(circle),
        "depth: 3,000 brackets": Grammar("lark", "start: " + "(" * 3_000 + '"x"' + ")" * 3_000),
        "enum: 50,000 strings": schema({"enum": WORDS}),
        "enum: 10,000 strings": schema({"enum": WORDS[:10_000]}),
        "enum: 18,000 integers": schema({"enum": list(range(18_000))}),
        "enum: 3,000 choices": Grammar("choice", json.dumps(WORDS[:3_000])),
        "refs: doubled 30 times": schema(_doubling(30, _twice)),
        "refs: doubled 40 times, either": schema(_doubling(40, _either)),
        "refs: doubled 25 times, both": schema(_doubling(25, _both)),
        "branches: 4,000 optional fields": schema({"properties": {word: {} for word in WORDS[:4_000]}}),
        "branches: 1,000 objects": schema(
            {"anyOf": [{"type": "object", "properties": {word: INTEGER}} for word in WORDS[:1_000]]}
        ),
        "branches: 500 patterns": schema(
            {
                "anyOf": [
                    {"type": "string", "pattern": f"{one}.*{two}"}
                    for one, two in zip(WORDS[:500], WORDS[500:1_000], strict=True)
                ]
            }
        ),
        "regex: a million by repeats": Grammar("regex", "(x{1000}){1000}"),
        "regex: (a+)+b": Grammar("regex", "(a+)+b"),
        "regex: overlapping stars": Grammar("regex", "(a|a|aa)*(a|aa|b)*c"),
        "regex: 200 letters behind": Grammar("regex", "[ab]*a[ab]{200}"),
        "regex: 2,000 of anything behind": Grammar("regex", ".*x.{2000}y"),
        "regex: 12,000 words": Grammar("regex", "|".join(WORDS[:12_000])),
        "regex: words of words": Grammar("regex", r"(\w{1,100}\s){1,100}"),
        "pattern: 25 letters behind": schema({"type": "string", "pattern": "[ab]*a[ab]{25}c"}),
        "repeats: 100,000 items": schema({"type": "array", "items": INTEGER, "minItems": 100_000}),
        "repeats: a million characters": schema({"type": "string", "minLength": 1_000_000}),
        "repeats: up to 10^9 characters": schema({"type": "string", "maxLength": 10**9}),
        "repeats: 50,000 objects": schema(
            {
                "type": "array",
                "items": closed(a={"type": "string", "maxLength": 1_000}),
                "minItems": 50_000,
                "maxItems": 60_000,
            }
        ),
        "numbers: a multiple of 99,991": schema({"type": "integer", "multipleOf": 99_991}),
        "numbers: 600 digits": schema({"type": "integer", "minimum": -(10**300), "maximum": 10**300}),
        "ambiguity: e e e": Grammar("lark", 'start: e\ne: e e e | e e | "x"\n'),
        "ambiguity: 3,000 optional rules": Grammar("lark", nulls),
    }
