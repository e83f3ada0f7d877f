"""Conversations with tools, for chat templates that know tools and for those that do not. Pure.

Templates take turns in the form transformers documents: arguments of past calls are objects, not JSON texts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..schemas.job import Message
from ..schemas.tools import Function, written
from .chat_template import text_of

INSTRUCTIONS = """\
You can call functions to help with the user's request. Their signatures stand in <tools></tools>:
<tools>
{signatures}
</tools>

To call a function, write its name and its arguments as a JSON object within <tool_call></tool_call>:
<tool_call>
{{"name": "<function>", "arguments": {{<arguments>}}}}
</tool_call>"""
RESPONSE = "<tool_response>\n{content}\n</tool_response>"

Turn = dict[str, Any]

_PROBE = Function(name="probe_of_tools", description="?", parameters={"type": "object", "properties": {}})
_MARKS = (_PROBE.name, "<tool_call>", '"arguments"')
_OTHER_FORMS = ("<function=", "<|python_tag|>", "[TOOL_CALLS]")


def described(functions: Sequence[Function]) -> list[Turn]:
    """What a template is given as ``tools``."""
    return [
        {
            "type": "function",
            "function": {
                "name": each.name,
                "description": each.description or "",
                "parameters": {"type": "object", "properties": {}, **(each.parameters or {})},
            },
        }
        for each in functions
    ]


PROBE_TURNS: list[Turn] = [{"role": "user", "content": "?"}]
PROBE_TOOLS = described([_PROBE])


def tells_of_tools(rendered: str) -> bool:
    """Whether a template that was given the probe told of it, and of calls as we write them."""
    return all(mark in rendered for mark in _MARKS) and not any(form in rendered for form in _OTHER_FORMS)


def turns_of(messages: Sequence[Message]) -> list[Turn]:
    """For a template that knows tools."""
    return [_turn(message) for message in messages]


def plain_turns(messages: Sequence[Message], functions: Sequence[Function]) -> list[Turn]:
    """For one that does not: tools are told of in the system message, calls and outcomes are text."""
    turns: list[Turn] = []
    before = None
    for message in messages:
        turn = _plain(message)
        if message.role == before == "tool":  # outcomes of parallel calls are one turn
            turns[-1]["content"] += "\n" + turn["content"]
        else:
            turns.append(turn)
        before = message.role
    return turns if not functions else _with_instructions(turns, functions)


def _turn(message: Message) -> Turn:
    turn = message.model_dump(exclude_none=True, exclude={"tool_calls"})
    turn.setdefault("content", "")
    if message.tool_calls is not None:
        turn["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": _parsed(c.arguments)}}
            for c in message.tool_calls
        ]
    return turn


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):  # what some other model wrote
        return arguments


def _plain(message: Message) -> Turn:
    turn = message.model_dump(exclude_none=True, exclude={"tool_calls", "tool_call_id"})
    content = text_of(message.content)
    if message.role == "tool":
        return {"role": "user", "content": RESPONSE.format(content=content)}
    if message.tool_calls:
        content = "\n".join(each for each in (content, written(message.tool_calls)) if each)
    return {**turn, "content": content}


def _with_instructions(turns: list[Turn], functions: Sequence[Function]) -> list[Turn]:
    signatures = "\n".join(json.dumps(each, ensure_ascii=False) for each in described(functions))
    text = INSTRUCTIONS.format(signatures=signatures)
    if turns and turns[0]["role"] == "system":
        return [{**turns[0], "content": f"{turns[0]['content']}\n\n{text}"}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]
