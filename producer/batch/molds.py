"""Rows checked fast: what all but a row's text says was checked with the first row that said the same.

Rows of a bulk file mostly differ in their prompts alone. ``made`` is the slow, obvious way to check a row;
``Molds.make`` gives the same for the price of reading the text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from ...schemas.batch_lines import MAX_CUSTOM_ID_CHARS, Row, default_custom_id, parse_fields
from ...schemas.job import Job, Priority
from ...schemas.openai import Request
from ...schemas.settings import Settings

CHARS_PER_TOKEN = 4.0
TOKENS_PER_MESSAGE = 4.0
UNSAID_OUTPUT_TOKENS = 256.0
"""What a row is taken to generate that names no number."""
MOST_MOLDS = 512
MOLDS_CHARS = 8_000_000
"""Of what molds are known by: rows may bring a schema of a hundred thousand characters each."""

_PLACE = {"v", "id", "model", "submitted_at", "expires_at", "custom_id"}
"""What a job owes to its place in a batch."""
_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_TURN = frozenset(["role", "content"])
_ROLES = frozenset(["system", "user", "assistant"])
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Made:
    """A valid row. ``body``: its job in JSON, but for what it owes to its place in a batch."""

    custom_id: str
    body: bytes
    model: str | None
    endpoint: str
    prompt_tokens: float
    """Estimates, like ``output_tokens``."""
    output_tokens: float


def made(row: Row, settings: Settings) -> Made:
    """Of a parsed row. Raises InvalidRequest."""
    request = row.request
    job = Job(
        id="row",
        model="-",
        prompt=request.prompt,
        prompt_ids=request.prompt_ids,
        messages=request.messages,
        sampling=request.sampling,
        tools=request.tools,
        endpoint=request.endpoint,
        priority=Priority.BATCH,
        tenant=settings.tenant,
        submitted_at=0.0,
        expires_at=1.0,
        metadata=request.metadata,
    )
    return Made(row.custom_id, body_of(job), request.model, request.endpoint.value, *estimate(request))


def body_of(job: Job) -> bytes:
    """A job in JSON, but for what it owes to its place in a batch. It begins with its prompt."""
    return job.model_dump_json(exclude=_PLACE, exclude_defaults=True).encode()


def content_of(body: bytes) -> bytes:
    """What of a body decides its answer: rows that differ in nothing else are copies of each other."""
    if b'"metadata":' not in body:
        return body
    fields: dict[str, Any] = json.loads(body)
    fields.pop("metadata", None)
    return _encode(fields).encode()


def estimate(job: Job | Request) -> tuple[float, float]:
    """(tokens of the prompt, tokens of the output), before a tokenizer or a model has seen it."""
    if job.prompt_ids is not None:
        prompt = float(len(job.prompt_ids))
    elif job.prompt is not None:
        prompt = len(job.prompt) / CHARS_PER_TOKEN
    else:
        contents = [each.content for each in job.messages or ()]
        prompt = _tokens_of(sum(len(text) for text in contents if text is not None), len(contents))
    wished = job.sampling.max_tokens
    return prompt, (UNSAID_OUTPUT_TOKENS if wished is None else float(wished)) * job.sampling.choices


@dataclass(frozen=True, slots=True)
class _Mold:
    """A made row without its text."""

    rest: bytes
    """Of the body, behind the text."""
    row: Made


class Molds:
    """Molds of the rows so far, by all that they say but their texts."""

    def __init__(self, settings: Settings, defaults: Mapping[str, Any]) -> None:
        self._settings, self._defaults = settings, defaults
        self._molds: dict[tuple[str, str], _Mold] = {}
        self._chars = 0

    def make(self, number: int, fields: dict[str, Any]) -> Made:
        """A row of its fields, as ``made(parse_fields(…))``. Raises what that raises."""
        parts = _parts(fields, number)
        if parts is None:
            return made(parse_fields(fields, number, self._defaults), self._settings)
        custom_id, name, text, key = parts
        head, tokens = _head(name, text)
        mold = self._molds.get(key)
        if mold is None:
            row = made(parse_fields(fields, number, self._defaults), self._settings)
            assert row.body.startswith(head), "a job does not begin with its text"
            if len(self._molds) >= MOST_MOLDS or self._chars >= MOLDS_CHARS:
                self._molds.clear()
                self._chars = 0
            self._chars += len(key[1])
            self._molds[key] = _Mold(row.body[len(head) :], row)
            return row
        return replace(mold.row, custom_id=custom_id, body=head + mold.rest, prompt_tokens=tokens)


def _parts(fields: dict[str, Any], number: int) -> tuple[str, str, Any, tuple[str, str]] | None:
    """(custom_id, name of the text, the text, all the rest) of a row in a usual form; None: look closer."""
    url: Any = fields.get("url")
    if url is None:
        if "body" in fields or "method" in fields:
            return None
        said: Any = fields
        custom_id: Any = fields.get("custom_id")
        custom_id = default_custom_id(number) if custom_id is None else custom_id
        name = "prompt" if "prompt" in fields else "messages"
        if name == "prompt" and "messages" in fields:
            return None
    else:
        said, custom_id = fields.get("body"), fields.get("custom_id")
        if len(fields) != 4 or fields.get("method") != "POST" or url not in (_CHAT, _TEXT):
            return None
        name = "messages" if url == _CHAT else "prompt"
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_CUSTOM_ID_CHARS:
        return None
    if not isinstance(said, dict):
        return None
    body = cast("dict[str, Any]", said)
    if body.get("metadata") or (url is not None and "custom_id" in body):
        return None
    text: Any = body.get(name)
    if not (_usual(text) if name == "messages" else isinstance(text, str) and text):
        return None
    rest = {key: value for key, value in body.items() if key not in (name, "custom_id")}
    return custom_id, name, text, (str(url), f"{name}{rest!r}")


def _usual(messages: Any) -> bool:
    if not isinstance(messages, list) or not messages:
        return False
    return all(
        isinstance(turn, dict)
        and turn.keys() == _TURN
        and isinstance(turn["content"], str)
        and turn["role"] in _ROLES
        for turn in cast("list[Any]", messages)
    )


def _head(name: str, text: Any) -> tuple[bytes, float]:
    """The body's beginning, and what the text is estimated to have of tokens."""
    if name == "prompt":
        return f'{{"prompt":{_encode(text)}'.encode(), len(text) / CHARS_PER_TOKEN
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in text]
    chars = sum(len(turn["content"]) for turn in turns)
    return f'{{"messages":{_encode(turns)}'.encode(), _tokens_of(chars, len(turns))


def _tokens_of(chars: int, messages: int) -> float:
    return chars / CHARS_PER_TOKEN + TOKENS_PER_MESSAGE * messages
