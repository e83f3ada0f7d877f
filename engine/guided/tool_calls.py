"""Tools as a grammar: which texts may come, when a model may or must call functions. Pure."""

from __future__ import annotations

import json
from typing import Any, cast

from ...schemas.tools import CLOSE, NAME_CLOSE, NAME_OPEN, OPEN, SEPARATOR, Toolbox
from ..messages import Grammar
from .source import JSON_STYLE, check_smallest, to_source

ANY_OBJECT: dict[str, Any] = {"type": "object"}


def grammar_of_calls(tools: Toolbox, answer: Grammar | None) -> Grammar:
    """Text and then calls, or calls alone, as ``tools`` has it.

    The opening tag ends free text wherever it stands, and a call must follow. With ``answer``, a JSON schema
    or any JSON object, the text fits that, and stands instead of calls. Raises InvalidSchema.
    """
    functions = tools.callable
    any_function = " | ".join(f"f_{index}" for index in range(len(functions)))
    more = f" ({_quoted(SEPARATOR)} call)*" if tools.parallel else ""
    rules = [
        "%llguidance {}",
        f"call: {_quoted(OPEN)} inner",
        f"inner: {_quoted(NAME_OPEN)} ({any_function}) {_quoted(CLOSE)}",
    ]
    for index, function in enumerate(functions):
        check_smallest(function.schema_of_arguments, f"the schema of tool '{function.name}'")
        rules.append(f"f_{index}: {_quoted(function.name + NAME_CLOSE)} a_{index}")
        rules.append(f"a_{index}: {_json(function.schema_of_arguments)}")
    rules += _starts(tools, answer, more)
    return Grammar("lark", "\n".join(rules) + "\n", True if answer is None else answer.close)


def _starts(tools: Toolbox, answer: Grammar | None, more: str) -> list[str]:
    if tools.mode == "required":
        return [f"start: call{more}"]
    if answer is None:
        return [
            f"start: TEXT | opened inner{more}",
            "TEXT: /(.|\\n)*/",
            f"opened[lazy]: /(.|\\n)*/ {_quoted(OPEN)}",
        ]
    to_source(answer)  # says what is wrong with it
    schema = json.loads(answer.text) if answer.kind == "json_schema" else ANY_OBJECT
    return [f"start: answer | call{more}", f"answer: {_json(schema)}"]


def _quoted(text: str) -> str:
    return json.dumps(text)


def _json(schema: Any) -> str:
    """A schema of its own, so that its references find their root."""
    if isinstance(schema, dict):
        schema = {"x-guidance": JSON_STYLE, **cast("dict[str, Any]", schema)}
    return f"%json {json.dumps(schema)}"
