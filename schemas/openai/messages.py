"""Turns of a conversation in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ..errors import InvalidRequest, Unsupported
from ..job import Message
from ..tools import PastCall
from ..wire import kind_of, shown

_MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "function_call": (),
    "refusal": (),
    "audio": (),
    "annotations": ([],),
    "reasoning": (),
    "reasoning_content": (),
}
_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Message, ...]:
    """OpenAI's turns in ours: text parts are joined by newlines, "developer" becomes "system".

    Raises InvalidRequest or Unsupported naming ``messages.<index>.<field>``.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' lists are untyped
        raise InvalidRequest(f"messages is {kind_of(messages)}, not a list of messages", param="messages")
    if not messages:
        raise InvalidRequest("messages is empty", param="messages")
    return tuple(_message(turn, f"messages.{index}") for index, turn in enumerate(messages))


def _message(turn: Mapping[str, Any], where: str) -> Message:
    if not isinstance(turn, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' lists are untyped
        raise InvalidRequest(f"{where}: a message is an object with role and content", param=where)
    role, content, name = turn.get("role"), turn.get("content"), turn.get("name")
    for key, value in turn.items():
        if key in _MESSAGE_NEUTRAL:
            check_neutral(f"{where}.{key}", value, _MESSAGE_NEUTRAL[key])
        elif key not in _FIELDS:
            name = f"{where}.{shown(str(key))}"
            raise InvalidRequest(f"unknown field '{name}'; remove it", param=name)
    if not isinstance(role, str) or role not in _ROLES:
        raise InvalidRequest(f"{where}.role is none of {', '.join(_ROLES)}", param=f"{where}.role")
    if name is not None and not isinstance(name, str):
        raise InvalidRequest(f"{where}.name is {kind_of(name)}, not a string", param=f"{where}.name")
    calls = _past_calls(turn.get("tool_calls"), f"{where}.tool_calls")
    if calls and role != "assistant":
        raise InvalidRequest(f"{where}: only an assistant calls tools", param=f"{where}.tool_calls")
    return Message(
        role=_ROLES[role],
        content=None if calls and content is None else _content(content, f"{where}.content"),
        name=name,
        tool_calls=calls or None,
        tool_call_id=_call_id(turn.get("tool_call_id"), role, f"{where}.tool_call_id"),
    )


def _past_calls(calls: Any, where: str) -> tuple[PastCall, ...]:
    """What an assistant's turn called."""
    if calls is not None and not isinstance(calls, list | tuple):
        raise InvalidRequest(f"{where} is {kind_of(calls)}, not a list", param=where)
    return tuple(
        _past_call(call, f"{where}.{index}") for index, call in enumerate(cast("Sequence[Any]", calls or ()))
    )


def _past_call(call: Any, where: str) -> PastCall:
    match call:
        case {"id": str(call_id), "function": {"name": str(name), "arguments": str(arguments)}}:
            return PastCall(id=call_id, name=name, arguments=arguments)
        case _:
            raise InvalidRequest(
                f'{where}: a call is {{"id": …, "type": "function", "function": '
                '{"name": …, "arguments": "<JSON>"}}}',
                param=where,
            )


def _call_id(call_id: Any, role: str, where: str) -> str | None:
    if call_id is None:
        return None
    if role != "tool" or not isinstance(call_id, str):
        raise InvalidRequest(f"{where}: a string, and only in messages of the role tool", param=where)
    return call_id


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple) or not content:
        raise InvalidRequest(f"{where} is {kind_of(content)}, not a string or a list of parts", param=where)
    texts: list[str] = []
    for index, part in enumerate(cast("Sequence[Any]", content)):
        fields = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
        kind: Any = fields.get("type")
        if not isinstance(kind, str):
            raise InvalidRequest(
                f"{where}.{index}: a part is an object with a type", param=f"{where}.{index}"
            )
        if kind != "text":
            raise Unsupported(
                f"{where}.{index}: parts of type {kind[:40]!r} are not supported by this version; text only",
                param=f"{where}.{index}.type",
            )
        text: Any = fields.get("text")
        if not isinstance(text, str):
            raise InvalidRequest(
                f"{where}.{index}.text is {kind_of(text)}, not a string", param=f"{where}.{index}"
            )
        texts.append(text)
    return "\n".join(texts)


def check_neutral(name: str, value: Any, neutral: tuple[Any, ...]) -> None:
    """Raises Unsupported for a value that asks for something that is not there."""
    if value is None or any(type(value) is type(each) and value == each for each in neutral):
        return
    raise Unsupported(f"{name}: not supported by this version; leave it out", param=name)
