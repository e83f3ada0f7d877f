"""JSON schemas of every kind that guided generation takes: written by hand, and drawn at random."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def closed(**properties: Any) -> Schema:
    """An object with exactly these."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


STRING, INTEGER, NUMBER, BOOLEAN, NULL = (
    {"type": kind} for kind in ("string", "integer", "number", "boolean", "null")
)
TREE = {
    "$defs": {"node": closed(v=INTEGER, kids={"type": "array", "items": {"$ref": "#/$defs/node"}})},
    "$ref": "#/$defs/node",
}
LINKED = {
    "definitions": {
        "link": {
            "type": "object",
            "properties": {"value": STRING, "next": {"$ref": "#/definitions/link"}},
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/definitions/link",
}
EXPRESSION = {
    "$defs": {
        "e": {
            "anyOf": [
                INTEGER,
                closed(op={"enum": ["+", "-"]}, left={"$ref": "#/$defs/e"}, right={"$ref": "#/$defs/e"}),
            ]
        }
    },
    "$ref": "#/$defs/e",
}
EVEN_ODD = {
    "$defs": {
        "even": {"anyOf": [NULL, closed(odd={"$ref": "#/$defs/odd"})]},
        "odd": closed(even={"$ref": "#/$defs/even"}),
    },
    "$ref": "#/$defs/even",
}
NESTED: Schema = STRING
for _level in range(12):
    NESTED = closed(inner=NESTED)
INVOICE = closed(
    id={"type": "string", "pattern": "^INV-[0-9]{6}$"},
    customer=closed(name={"type": "string", "minLength": 1, "maxLength": 30}, email={"type": "string"}),
    lines={
        "type": "array",
        "minItems": 1,
        "maxItems": 4,
        "items": closed(
            sku={"type": "string", "pattern": "^[A-Z]{2,4}$"}, count={"type": "integer", "minimum": 1}
        ),
    },
    paid=BOOLEAN,
    total={"type": "number", "minimum": 0},
)
WRITTEN: list[Schema] = [
    {},
    {"type": "object"},
    {"type": "array"},
    STRING,
    INTEGER,
    NUMBER,
    BOOLEAN,
    NULL,
    {"type": ["string", "null"]},
    {"type": ["integer", "boolean", "array"]},
    {"const": 7},
    {"const": "Mühle 東京 🙂"},
    {"const": {"a": [1, 2.5, None, True], "b": {"c": "ü"}}},
    {"enum": ["a", "bb", "ccc"]},
    {"enum": [1, "1", None, True, [1], {"a": 1}]},
    {"enum": ['"quoted"', "back\\slash", "new\nline", "tab\t", "/"]},
    {"enum": ["東京", "大阪", "名古屋"]},
    {"enum": [f"value-{i}" for i in range(500)]},
    {"type": "string", "maxLength": 3},
    {"type": "string", "minLength": 5, "maxLength": 8},
    {"type": "string", "minLength": 20},
    {"type": "string", "minLength": 4, "maxLength": 4},
    {"type": "string", "pattern": "^[a-f0-9]{8}$"},
    {"type": "string", "pattern": "^(yes|no|maybe)$"},
    {"type": "string", "pattern": "[0-9]{3}"},
    {"type": "string", "pattern": "^[a-z]+@[a-z]+\\.(com|org)$"},
    {"type": "string", "pattern": "^\\d{4}-\\d{2}-\\d{2}$"},
    {"type": "string", "pattern": "^[äöü東京]{2,5}$"},
    {"type": "string", "pattern": "^(\\([0-9]{3}\\))?[0-9]{3}-[0-9]{4}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "email"},
    {"type": "integer", "minimum": 10, "maximum": 20},
    {"type": "integer", "minimum": -5},
    {"type": "integer", "maximum": -100},
    {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 103},
    {"type": "integer", "multipleOf": 7},
    {"type": "integer", "minimum": 1000, "maximum": 100000, "multipleOf": 50},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0.5, "maximum": 0.75},
    {"type": "number", "minimum": -2.5, "maximum": -2.25},
    {"type": "array", "items": INTEGER, "minItems": 3, "maxItems": 3},
    {"type": "array", "items": STRING, "maxItems": 2},
    {"type": "array", "items": {"type": "array", "items": BOOLEAN}, "minItems": 2},
    {"type": "array", "prefixItems": [STRING, INTEGER, BOOLEAN], "items": False, "minItems": 3},
    {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 12},
    closed(),
    closed(a=STRING, b=INTEGER),
    closed(**{"with space": STRING, "ключ": INTEGER, 'quote"d': BOOLEAN}),
    closed(**{f"field_{i}": INTEGER for i in range(40)}),
    {"type": "object", "properties": {"a": STRING, "b": INTEGER}, "additionalProperties": False},
    {"type": "object", "properties": {"a": STRING, "b": INTEGER}, "required": ["b"]},
    {"type": "object", "additionalProperties": INTEGER},
    {"type": "object", "patternProperties": {"^x-": STRING}, "additionalProperties": False},
    {"type": "object", "additionalProperties": BOOLEAN, "minProperties": 1},
    {"anyOf": [STRING, INTEGER, NULL]},
    {"anyOf": [closed(kind={"const": "a"}, x=INTEGER), closed(kind={"const": "b"}, y=STRING)]},
    {"oneOf": [STRING, BOOLEAN]},
    {"oneOf": [closed(cat={"const": 1}), closed(dog={"const": 2})]},
    {"anyOf": [NULL, closed(**{f"must_{i}": NUMBER for i in range(10)})]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    {
        "allOf": [
            {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
            {"properties": {"b": STRING}},
        ]
    },
    {
        "$defs": {"p": closed(x=NUMBER, y=NUMBER)},
        "type": "array",
        "items": {"$ref": "#/$defs/p"},
        "minItems": 1,
    },
    {
        "$defs": {"s": {"type": "string", "maxLength": 4}},
        **closed(a={"$ref": "#/$defs/s"}, b={"$ref": "#/$defs/s"}),
    },
    TREE,
    LINKED,
    EXPRESSION,
    EVEN_ODD,
    NESTED,
    INVOICE,
    closed(title=STRING, tags={"type": "array", "items": STRING}, meta={"type": "object"}),
    closed(optional={"anyOf": [STRING, NULL]}, list={"type": ["array", "null"], "items": INTEGER}),
]


def drawn(count: int, seed: int = 7) -> list[Schema]:
    """Random ones, the same for the same seed."""
    draw = random.Random(seed)
    return [_any(draw, 3) for _ in range(count)]


def _any(draw: random.Random, depth: int) -> Schema:
    kinds = [_string, _integer, _number, _enum, _plain]
    if depth:
        kinds += [_object, _object, _object, _array, _array, _union, _ref]
    return draw.choice(kinds)(draw, depth)


def _plain(draw: random.Random, _: int) -> Schema:
    return draw.choice([BOOLEAN, NULL, STRING, INTEGER, {"type": ["string", "integer", "null"]}])


def _string(draw: random.Random, _: int) -> Schema:
    least = draw.randrange(0, 6)
    return draw.choice(
        [
            {"type": "string", "minLength": least, "maxLength": least + draw.randrange(0, 9)},
            {"type": "string", "pattern": f"^[a-z]{{{least},{least + 4}}}[0-9]+$"},
            {
                "type": "string",
                "pattern": draw.choice(["[A-Z]{2}", "^#[0-9a-f]{6}$", "^(a|bc)+$", "x$", "^é"]),
            },
            {"type": "string", "format": draw.choice(["date", "uuid", "ipv4", "time"])},
        ]
    )


def _integer(draw: random.Random, _: int) -> Schema:
    low = draw.randrange(-2000, 2000)
    return draw.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + draw.randrange(0, 5000)},
            {"type": "integer", "minimum": low},
            {"type": "integer", "multipleOf": draw.randrange(2, 12)},
        ]
    )


def _number(draw: random.Random, _: int) -> Schema:
    low = draw.randrange(-400, 400) / 8
    return {"type": "number", "minimum": low, "maximum": low + draw.randrange(1, 100) / 4}


def _enum(draw: random.Random, _: int) -> Schema:
    values: list[Any] = ["red", "grün", "青", 1, -2.5, None, True, ["x"], {"k": 0}, "", "a b", '"']
    return {"enum": draw.sample(values, draw.randrange(1, 7))}


def _object(draw: random.Random, depth: int) -> Schema:
    names = draw.sample(
        ["id", "name", "größe", "x y", "items", "a/b", 'q"', "тег", "n", "z"], draw.randrange(1, 5)
    )
    made: Schema = {"type": "object", "properties": {name: _any(draw, depth - 1) for name in names}}
    made["required"] = draw.sample(names, draw.randrange(0, len(names) + 1))
    if draw.random() < 0.7:
        made["additionalProperties"] = False
    return made


def _array(draw: random.Random, depth: int) -> Schema:
    made: Schema = {"type": "array", "items": _any(draw, depth - 1)}
    if draw.random() < 0.6:
        made["minItems"] = draw.randrange(0, 4)
    if draw.random() < 0.6:
        made["maxItems"] = made.get("minItems", 0) + draw.randrange(0, 4)
    return made


def _union(draw: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(draw, depth - 1) for _ in range(draw.randrange(2, 4))]}


def _ref(draw: random.Random, depth: int) -> Schema:
    """A list of itself beside something else: recursion with a way out. References are by place, so these
    stand only at the top."""
    if depth < 3:
        return _plain(draw, depth)
    leaf = draw.choice([_string, _integer, _enum])(draw, 0)
    return {
        "$defs": {"t": closed(v=leaf, next={"anyOf": [NULL, {"$ref": "#/$defs/t"}]})},
        **draw.choice(
            [{"$ref": "#/$defs/t"}, closed(first={"$ref": "#/$defs/t"}, last={"$ref": "#/$defs/t"})]
        ),
    }
