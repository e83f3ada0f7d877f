"""Functions that a model may call: what a request says of them, and the calls in a text.

A call is written as Hermes models do, whatever the model, and in exactly this way:

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, StringConstraints, model_validator

from .errors import InvalidRequest, InvalidSchema, Unsupported
from .sampling import SamplingParams
from .wire import Answer, Bool, Record, shown

MAX_FUNCTIONS = 128
MAX_SCHEMA_CHARS = 120_000
"""Of all functions' parameters together, as JSON."""
MAX_NESTING = 64
TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")
OPEN, NAME_OPEN, NAME_CLOSE, CLOSE = "<tool_call>", '\n{"name": "', '", "arguments": ', "}\n</tool_call>"
HEAD = OPEN + NAME_OPEN
SEPARATOR = "\n"
"""Between two calls."""
_CALL = re.compile(
    rf'{re.escape(OPEN + NAME_OPEN)}([^"\n]+){re.escape(NAME_CLOSE)}(.*?){re.escape(CLOSE)}', re.DOTALL
)
_FORMATS = ("json_schema", "json_object")


class Function(Record):
    """One that may be called. ``parameters`` is a JSON schema of an object; None: it takes none."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Bool | None = None
    """Accepted and without effect: arguments always fit the parameters."""

    @property
    def schema_of_arguments(self) -> dict[str, Any]:
        """What arguments must look like."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Toolbox(Record):
    """The functions of a request, and whether one must be called."""

    functions: tuple[Function, ...] = Field(min_length=1, max_length=MAX_FUNCTIONS)
    mode: Literal["auto", "required"] = "auto"
    """auto: text, or text and calls, or calls; required: calls only."""
    only: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Of the functions that the model is told of, those it may call. None: all."""
    parallel: Bool = True
    """More than one call may be made."""

    @model_validator(mode="after")
    def _names_are_unique_and_known(self) -> Self:
        names = [function.name for function in self.functions]
        if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
            raise InvalidRequest(f"two tools are named '{twice}'; rename one", param="tools")
        if (strange := next((name for name in self.only or () if name not in names), None)) is not None:
            raise InvalidRequest(
                f"tool_choice names '{shown(strange)}', which is none of the tools", param="tool_choice"
            )
        return self

    @property
    def callable(self) -> tuple[Function, ...]:
        """Those that may be called, in the order given."""
        return tuple(each for each in self.functions if self.only is None or each.name in self.only)


class ToolCall(Answer):
    """A call that a model made."""

    id: str
    """The same on every attempt."""
    name: str
    arguments: str
    """JSON."""


class PastCall(Record):
    """The same as a part of a request."""

    id: str
    name: str
    arguments: str
    """JSON."""


def calls_in(text: str, job_id: str, choice: int = 0) -> tuple[ToolCall, ...]:
    """The complete calls in a text."""
    found = enumerate(_CALL.finditer(text))
    return tuple(
        ToolCall(id=call_id(job_id, choice, index), name=call[1], arguments=call[2]) for index, call in found
    )


def text_before_calls(text: str) -> str:
    """What was said before the first of ``calls_in``."""
    first = _CALL.search(text)
    return text if first is None else text[: first.start()].rstrip()


def written(calls: Sequence[ToolCall | PastCall]) -> str:
    """Calls as a model writes them."""
    return SEPARATOR.join(f"{OPEN}{NAME_OPEN}{c.name}{NAME_CLOSE}{c.arguments}{CLOSE}" for c in calls)


def call_id(job_id: str, choice: int, index: int) -> str:
    """Of a choice's call: the same on every attempt."""
    return "call_" + hashlib.sha256(f"{job_id}/{choice}/{index}".encode()).hexdigest()[:24]


# ---- OpenAI's form


class _Tool(Record):
    type: str
    function: Function


class _Tools(Record):
    tools: tuple[_Tool, ...]


def toolbox(fields: Mapping[str, Any]) -> Toolbox | None:
    """``TOOL_FIELDS`` in OpenAI's form; None: nothing is to be called.

    Raises InvalidRequest or its subclasses, each naming the field.
    """
    tools, choice, parallel = (fields.get(name) for name in TOOL_FIELDS)
    if tools is None or tools in ([], ()):
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice asks for a call and there are no tools", param="tool_choice")
        return None
    if parallel is not None and not isinstance(parallel, bool):
        raise InvalidRequest("parallel_tool_calls is neither true nor false", param="parallel_tool_calls")
    given: dict[str, Any] = {"functions": _functions(tools), "parallel": parallel is not False}
    if choice not in (None, "none"):
        given |= _choice(choice)
    box = Toolbox.from_python(given)
    return None if choice == "none" else box


def check_fit(box: Toolbox | None, sampling: SamplingParams, *, chat: bool) -> None:
    """Raises InvalidRequest for what tools cannot be combined with."""
    if box is None:
        return
    if not chat:
        raise InvalidRequest("tools need messages: a plain prompt has no place for them", param="tools")
    if sampling.echo:
        raise InvalidRequest("tools and echo exclude each other: leave echo out", param="echo")
    if sampling.grammar is not None and sampling.grammar.kind not in _FORMATS:
        raise Unsupported(
            f"tools go together with a JSON schema for the answer, not with a {sampling.grammar.kind}; "
            "give one of them",
            param="tools",
        )


def _functions(tools: Any) -> tuple[Function, ...]:
    if not isinstance(tools, list | tuple):
        raise InvalidRequest("tools is not a list", param="tools")
    several = cast("Sequence[Any]", tools)
    if len(several) > MAX_FUNCTIONS:
        raise InvalidRequest(
            f"{len(several):,} tools and {MAX_FUNCTIONS} are allowed; give fewer", param="tools"
        )
    for index, tool in enumerate(several):
        kind: Any = cast("dict[str, Any]", tool).get("type") if isinstance(tool, dict) else None
        if isinstance(kind, str) and kind != "function":
            raise Unsupported(
                f"tools.{index}: tools of type '{shown(kind)}' are not supported by this version; "
                "functions only",
                param=f"tools.{index}.type",
            )
    functions = tuple(each.function for each in _Tools.from_python({"tools": several}).tools)
    _check_schemas(functions)
    return functions


def _check_schemas(functions: Sequence[Function]) -> None:
    """What shows without compiling them; the rest only a worker finds out."""
    chars = 0
    for index, function in enumerate(functions):
        where = f"tools.{index}.function.parameters"
        if function.schema_of_arguments["type"] != "object":
            raise InvalidSchema(f'{where}: the type of parameters is "object"', param=where)
        if _nests_deeper(function.parameters, MAX_NESTING):
            raise InvalidSchema(
                f"{where}: nested more than {MAX_NESTING} levels; name the inner parts in $defs", param=where
            )
        try:
            chars += len(json.dumps(function.parameters, allow_nan=False))
        except (TypeError, ValueError) as exc:
            raise InvalidSchema(f"{where}: not JSON: {exc}", param=where) from exc
    if chars > MAX_SCHEMA_CHARS:
        raise InvalidSchema(
            f"the parameters of all tools are {chars:,} characters and {MAX_SCHEMA_CHARS:,} are allowed; "
            "make them smaller, or give fewer tools",
            param="tools",
        )


def _nests_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels + 1):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return False
    return True


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*cast("dict[str, Any]", value).values()]
    return [*cast("Sequence[Any]", value)] if isinstance(value, list | tuple) else []


def _choice(choice: Any) -> dict[str, Any]:
    """The fields of a Toolbox that ``tool_choice`` sets."""
    match choice:
        case "auto" | "required":
            return {"mode": choice}
        case {"type": "function", "function": {"name": str(name)}}:
            return {"mode": "required", "only": (name,), "parallel": False}
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": some},
        }:
            return {"mode": mode, "only": _names(some)}
        case _:
            raise InvalidRequest(
                'tool_choice is none of "none", "auto", "required", '
                '{"type": "function", "function": {"name": …}}',
                param="tool_choice",
            )


def _names(tools: Any) -> tuple[str, ...]:
    if not isinstance(tools, list | tuple):
        raise InvalidRequest("tool_choice.allowed_tools.tools is not a list", param="tool_choice")
    return tuple(each.function.name for each in _Tools.from_python({"tools": tools}).tools)
