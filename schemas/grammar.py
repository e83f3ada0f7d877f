"""GrammarSpec: what an output must look like, and the names under which requests ask for it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from .errors import InvalidRequest, InvalidSchema, Unsupported
from .wire import Bool, Record, kind_of

GrammarKind = Literal["json_schema", "json_object", "regex", "choice", "lark", "gbnf"]
MAX_GRAMMAR_CHARS = 131_072

GRAMMAR_FIELDS = (
    "response_format",
    "grammar",
    "structured_outputs",
    "guided_json",
    "guided_json_object",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
)
"""OpenAI's, TGI's and ours, then vLLM's, new and old."""
CLOSE_FIELD = "json_close"
"""Beside any of them: false leaves a text cut where its budget ends."""
_NAMES: dict[str, GrammarKind] = {
    "json": "json_schema",
    "json_schema": "json_schema",
    "json_object": "json_object",
    "regex": "regex",
    "choice": "choice",
    "grammar": "gbnf",
    "lark": "lark",
    "gbnf": "gbnf",
    "ebnf": "gbnf",
}
_STRUCTURED_NO_EFFECT = frozenset(["disable_fallback", "disable_any_whitespace"])
"""Options of structured_outputs that ask for what is so anyway."""


class GrammarSpec(Record):
    """One representation of all the ways to ask. Whether it can be compiled only a worker knows."""

    kind: GrammarKind
    text: Annotated[str, Field(max_length=MAX_GRAMMAR_CHARS)] = ""
    """JSON of the schema, or of the list of choices; the regex; the grammar. json_object: nothing."""
    close: Bool = True
    """Steer to the shortest end when the budget of tokens runs out (``json_close``)."""


def with_grammar(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``fields`` with all that ask for a grammar replaced by one ``grammar``, a GrammarSpec.

    Raises InvalidRequest: two that ask, or one that is wrong.
    """
    kept = {name: value for name, value in fields.items() if name not in (*GRAMMAR_FIELDS, CLOSE_FIELD)}
    asked = {name: fields[name] for name in GRAMMAR_FIELDS if fields.get(name) is not None}
    found = {name: spec for name, value in asked.items() if (spec := _spec(name, value)) is not None}
    if len(found) > 1:
        raise InvalidRequest(
            f"{' and '.join(found)} ask for a format of the output each; give one of them", param=[*found][1]
        )
    close = fields.get(CLOSE_FIELD)
    if close is not None and not isinstance(close, bool):
        raise InvalidRequest(f"{CLOSE_FIELD} is {kind_of(close)}, not true or false", param=CLOSE_FIELD)
    for spec in found.values():
        kept["grammar"] = spec if close is None else {**spec, "close": close}
    return kept


def _spec(name: str, value: Any) -> dict[str, Any] | None:
    """The grammar as a dict; None: ``value`` asks for nothing."""
    if isinstance(value, GrammarSpec):
        return value.model_dump()
    if hasattr(value, "model_json_schema"):  # a pydantic model, as the openai SDK takes
        return _made("json_schema", value.model_json_schema(), name)
    if name == "guided_json_object":
        if not isinstance(value, bool):
            raise InvalidRequest(f"{name} is {kind_of(value)}, not true or false", param=name)
        return _made("json_object", None, name) if value else None
    if name.startswith("guided_"):
        return _made(_NAMES[name.removeprefix("guided_")], value, name)
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"{name} is not a JSON object", param=name)
    given = cast("Mapping[str, Any]", value)
    if name == "response_format":
        return _from_response_format(given)
    if name == "structured_outputs":
        return _from_structured_outputs(given)
    return _from_grammar(given)


def _from_response_format(given: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return _made("json_object", None, "response_format")
    if kind == "json_schema":
        named: Any = given.get("json_schema")
        if not isinstance(named, Mapping) or "schema" not in named:
            raise InvalidRequest("response_format.json_schema has no schema", param="response_format")
        return _made("json_schema", cast("Mapping[str, Any]", named)["schema"], "response_format")
    raise Unsupported(
        "response_format.type is none of text, json_object, json_schema; use one of them",
        param="response_format.type",
    )


def _from_structured_outputs(given: Mapping[str, Any]) -> dict[str, Any] | None:
    kinds = {name: given[name] for name in given if given[name] is not None and name in _NAMES}
    others = [name for name in given if given[name] not in (None, False) and name not in _NAMES]
    others = [name for name in others if name not in _STRUCTURED_NO_EFFECT]
    if others or len(kinds) > 1:
        raise Unsupported(
            "structured_outputs takes one of json, json_object, regex, choice, grammar",
            param="structured_outputs",
        )
    for name, value in kinds.items():
        if name == "json_object":
            return _made("json_object", None, "structured_outputs") if value else None
        return _made(_NAMES[name], value, "structured_outputs")
    return None


def _from_grammar(given: Mapping[str, Any]) -> dict[str, Any]:
    """TGI's ``{"type", "value"}``, or a GrammarSpec's own fields."""
    if "kind" in given:
        return dict(given)
    kind: Any = given.get("type")
    if not isinstance(kind, str) or kind not in _NAMES:
        raise InvalidRequest(f"grammar.type is none of {', '.join(_NAMES)}", param="grammar.type")
    if kind == "json_object" and given.get("value") is None:
        return _made("json_object", None, "grammar")
    if given.get("value") is None:
        raise InvalidRequest("grammar.value is not given: the schema, or the text", param="grammar.value")
    known = "json_schema" if kind == "json_object" else _NAMES[kind]  # TGI's json_object has a schema
    return _made(known, given.get("value"), "grammar")


def _made(kind: GrammarKind, value: Any, name: str) -> dict[str, Any]:
    if kind == "json_object":
        return {"kind": kind}
    if kind in ("json_schema", "choice"):
        if kind == "choice" and not isinstance(value, list | tuple):
            raise InvalidSchema(f"{name} is not a list of strings", param=name)
        text = value if isinstance(value, str) else _json(value, name)
    elif isinstance(value, str):
        text = value
        if kind == "gbnf" and "::=" not in text:  # vLLM takes both under one name
            kind = "lark"
    else:
        raise InvalidSchema(f"{name} is not a string", param=name)
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InvalidSchema(f"{name} holds half a surrogate pair, which is no Unicode", param=name) from exc
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InvalidSchema(
            f"{name} is {len(text):,} characters and {MAX_GRAMMAR_CHARS:,} are allowed; make it smaller",
            param=name,
        )
    return {"kind": kind, "text": text}


def _json(value: Any, name: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except RecursionError as exc:
        raise InvalidSchema(f"{name} nests too deep; name its inner parts in $defs", param=name) from exc
    except (TypeError, ValueError) as exc:  # only from Python: an object, a cycle, NaN
        raise InvalidSchema(f"{name} cannot be written as JSON ({exc}); use plain data", param=name) from exc
