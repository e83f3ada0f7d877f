"""A grammar as users write it → the text llguidance compiles. Pure; the limits on size and depth are here."""

from __future__ import annotations

import json
from typing import Any, cast

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from ...schemas.errors import InvalidJson, InvalidSchema
from ...schemas.wire import loads, shown
from ..messages import Grammar
from .smallest import COUNTED_TO, smallest

MAX_GRAMMAR_BYTES = 131_072
MAX_NESTING = 64
"""Levels of lists and objects in a schema; llguidance reads 128 of them, and its own wrapping takes some."""
MAX_SMALLEST_CHARS = 1_000_000
"""Of the smallest document that fits a schema: references may double it many times over."""
MAX_CHOICES = 4_096
JSON_STYLE: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
"""As ``json.dumps`` writes: models have seen it most, and there are no blanks to ramble on. What is forced
is skipped, so one way to write a document is faster than many. ``x-guidance`` in a schema overrides it.
"""


def to_source(grammar: Grammar) -> str:
    """What llguidance compiles. Raises InvalidSchema for what is wrong, or too big, at first sight."""
    size = len(grammar.text.encode())
    if size > MAX_GRAMMAR_BYTES:
        raise InvalidSchema(
            f"the {_name(grammar)} is {size:,} bytes and {MAX_GRAMMAR_BYTES:,} are allowed; make it smaller"
        )
    match grammar.kind:
        case "json_schema":
            return _from_schema(_parse(grammar))
        case "json_object":
            return _from_schema({"type": "object"})
        case "choice":
            return _from_choices(_parse(grammar))
        case "regex":
            return LLMatcher.grammar_from_regex(_some(grammar))
        case "lark":
            return LLMatcher.grammar_from_lark(_some(grammar))
        case "gbnf":
            return LLMatcher.grammar_from_lark(_lark_of(_some(grammar)))


def _name(grammar: Grammar) -> str:
    return {"json_schema": "schema", "choice": "list of choices"}.get(grammar.kind, grammar.kind)


def _some(grammar: Grammar) -> str:
    if not grammar.text.strip():
        raise InvalidSchema(f"the {_name(grammar)} is empty")
    return grammar.text


def _parse(grammar: Grammar) -> Any:
    try:
        value = loads(grammar.text)
    except InvalidJson as exc:
        raise InvalidSchema(f"the {_name(grammar)} is {exc.message}") from exc
    if (place := _too_deep(value)) is not None:
        raise InvalidSchema(
            f"the {_name(grammar)} nests more than {MAX_NESTING} levels at {place}; "
            "name the inner parts in $defs and refer to them with $ref"
        )
    return value


def _too_deep(value: Any) -> str | None:
    """JSON pointer to the first place that is nested too deep."""
    level: list[tuple[str, Any]] = [("", value)]
    for _ in range(MAX_NESTING):
        level = [
            (f"{place}/{key}", inner)
            for place, outer in level
            for key, inner in _children(outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return None
    return f"'#{level[0][0][:120]}…'"


def _children(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        return list(cast("dict[str, Any]", value).items())
    return list(enumerate(cast("list[Any]", value))) if isinstance(value, list) else []


def _from_schema(schema: Any) -> str:
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidSchema("the schema is not a JSON object; {} allows any value, and false allows none")
    check_smallest(schema, "the schema")
    try:
        return LLMatcher.grammar_from_json_schema(json.dumps(schema), defaults=JSON_STYLE)
    except ValueError as exc:
        raise InvalidSchema(f"the schema cannot be used: {exc}") from exc


def check_smallest(schema: Any, name: str) -> None:
    """Raises InvalidSchema if no document of a moderate size can fit; ``name``: what to call the schema."""
    chars = smallest(schema)
    if isinstance(chars, str):
        raise InvalidSchema(
            f"{name} cannot be used: '{shown(chars)}' leads to itself whatever is chosen, so that "
            "no document ends; make a property on the way optional, or allow null or an empty list"
        )
    if chars > MAX_SMALLEST_CHARS:
        least = f"{chars:,}" if chars < COUNTED_TO else f"more than {COUNTED_TO:,}"
        raise InvalidSchema(
            f"{name} cannot be used: its smallest document has {least} characters and "
            f"{MAX_SMALLEST_CHARS:,} are allowed; require fewer parts, or lower minItems and minLength"
        )


def _from_choices(choices: Any) -> str:
    if not isinstance(choices, list) or not choices:
        raise InvalidSchema("the choices are a list of at least one string")
    several = cast("list[Any]", choices)
    if len(several) > MAX_CHOICES:
        raise InvalidSchema(f"{len(several):,} choices, and {MAX_CHOICES:,} are allowed")
    for index, choice in enumerate(several):
        if not isinstance(choice, str) or not choice:
            raise InvalidSchema(f"choice {index} is not a string, or it is empty")
    # One terminal: as rules of their own they would fill a row of the parser, which ends at 2,000.
    several = [json.dumps(choice) for choice in dict.fromkeys(several)]
    return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {' | '.join(several)}\n")


def _lark_of(gbnf: str) -> str:
    try:
        return gbnf_to_lark(gbnf)
    except GbnfToLarkError as exc:
        raise InvalidSchema(f"the gbnf grammar is wrong: {exc}") from exc
    except RecursionError as exc:
        raise InvalidSchema("the gbnf grammar nests too deep; give its inner parts names") from exc
    except Exception as exc:  # the library raises nothing more special
        raise InvalidSchema(f"the gbnf grammar is wrong: {exc}") from exc
