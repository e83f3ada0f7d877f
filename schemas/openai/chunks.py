"""OpenAI's stream: ``chat.completion.chunk`` and ``text_completion`` objects out of a follower's pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..errors import ResultChanged
from ..job import Endpoint, Job, JobState
from ..logprobs import TokenLogprobs
from ..result import FinishReason, Usage
from ..tools import CLOSE, HEAD, NAME_CLOSE, ToolCall, call_id, text_before_calls
from .answers import finish_reason, usage_body


class Piece(Protocol):
    """A follower's chunk, as far as it matters here."""

    @property
    def text(self) -> str: ...
    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def choice(self) -> int: ...
    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None: ...
    @property
    def reset(self) -> bool: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...
    @property
    def stop_reason(self) -> str | int | None: ...
    @property
    def tool_calls(self) -> tuple[ToolCall, ...] | None: ...


def number_of(token: int) -> str:
    """What vLLM writes for a token whose text is not told (``return_tokens_as_token_ids``)."""
    return f"token_id:{token}"


class Chunks:
    """One job's stream. ``of`` for each piece in order, then ``last`` if the request wants the usage.

    Calls of tools come as they are made: the name, then the arguments bit by bit. Their tags never show, and
    a choice that was cut within a call ends with what there is of it. ``text_of``: a token's text, where a
    tokenizer is at hand.
    """

    def __init__(
        self, job: Job, *, include_usage: bool = False, text_of: Callable[[int], str] = number_of
    ) -> None:
        self._job = job
        self._is_chat = job.endpoint is Endpoint.CHAT or (
            job.endpoint is Endpoint.NATIVE and job.messages is not None
        )
        self._include_usage = include_usage
        self._text_of = text_of
        self._choices: dict[int, _Choice] = {}

    def of(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """What a piece becomes; nothing, if all of it has to wait. Raises ResultChanged at a ``reset`` of
        what was sent already, for which this stream has no form.
        """
        known = self._choices.get(piece.choice)
        if piece.reset and known is not None:
            raise ResultChanged(
                f"job {self._job.id}: the text changed after a crash; take the whole of it from its result"
            )
        choice = known or self._choices.setdefault(piece.choice, _Choice(piece.choice, self._job))
        if self._is_chat:
            yield from self._chat(piece, choice, first=known is None)
        else:
            yield from self._text(piece, choice)

    def last(self, usage: Usage) -> dict[str, Any]:
        """The chunk behind all others, with ``stream_options.include_usage``."""
        return {**self._body([]), "usage": usage_body(usage)}

    def _chat(self, piece: Piece, choice: _Choice, *, first: bool) -> Iterator[dict[str, Any]]:
        if first:
            yield self._chunk(piece.choice, {"role": "assistant", "content": ""}, None)
        told = self._chat_logprobs(piece)
        for delta in choice.deltas(piece):
            yield self._chunk(piece.choice, delta, told)
            told = None
        if told is not None:  # their text waits for more, or stands in a tag
            yield self._chunk(piece.choice, {"content": ""}, told)
        if ending := _ending(piece):
            yield self._chunk(piece.choice, {}, None, **ending)

    def _text(self, piece: Piece, choice: _Choice) -> Iterator[dict[str, Any]]:
        told = self._text_logprobs(piece, choice.length)
        choice.length += len(piece.text)
        ending = _ending(piece)
        if piece.text or told or ending:
            body = {"index": piece.choice, "text": piece.text, "logprobs": told, "finish_reason": None}
            yield self._body([body | ending])

    def _chunk(self, index: int, delta: dict[str, Any], told: Any, **ending: Any) -> dict[str, Any]:
        return self._body(
            [{"index": index, "delta": delta, "logprobs": told, "finish_reason": None, **ending}]
        )

    def _body(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head, kind = ("chatcmpl", "chat.completion.chunk") if self._is_chat else ("cmpl", "text_completion")
        body: dict[str, Any] = {
            "id": f"{head}-{self._job.id}",
            "object": kind,
            "created": int(self._job.submitted_at),
            "model": self._job.model,
            "choices": choices,
            "system_fingerprint": None,
        }
        return {**body, "usage": None} if self._include_usage else body

    def _chat_logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if not piece.logprobs:
            return None
        content = [
            {
                **self._token(token, told.logprob),
                "top_logprobs": [self._token(*top) for top in _top(told)],
            }
            for token, told in zip(piece.ids, piece.logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text_of(token)
        known = self._text_of is not number_of
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if known else None}

    def _text_logprobs(self, piece: Piece, offset: int) -> dict[str, Any] | None:
        """Of several tokens in a piece nobody here knows which has which part of its text: their offset is
        the piece's."""
        if not piece.logprobs:
            return None
        return {
            "tokens": [self._text_of(token) for token in piece.ids],
            "token_logprobs": [told.logprob for told in piece.logprobs],
            "top_logprobs": [
                {self._text_of(token): logprob for token, logprob in _top(told)} for told in piece.logprobs
            ],
            "text_offset": [offset] * len(piece.ids),
        }


@dataclass(slots=True)
class _Choice:
    """What of one choice's text was sent, and what of it has to wait."""

    index: int
    job: Job
    length: int = 0
    calls: int = 0
    _waiting: str = ""
    _gap: str = ""
    """Blanks, which count only if more text than a call follows."""
    _within: str = field(default="text")
    """text, name or arguments."""

    def deltas(self, piece: Piece) -> Iterable[dict[str, Any]]:
        if self.job.tools is None:
            return [{"content": piece.text}] if piece.text else []
        self._waiting += piece.text
        last = piece.finish_reason is not None
        if self.job.sampling.ranked:  # it comes all at once, and its calls are named by who they were before
            return self._whole(piece.tool_calls or ()) if last else []
        return self._parsed(last=last)

    def _whole(self, calls: Iterable[ToolCall]) -> Iterator[dict[str, Any]]:
        if content := text_before_calls(self._waiting):
            yield {"content": content}
        for index, call in enumerate(calls):
            yield _call(index, call.arguments, id=call.id, name=call.name)

    def _parsed(self, *, last: bool) -> Iterator[dict[str, Any]]:
        ends = {"text": HEAD, "name": NAME_CLOSE, "arguments": CLOSE}
        while (at := self._waiting.find(ends[self._within])) >= 0:
            found, self._waiting = self._waiting[:at], self._waiting[at + len(ends[self._within]) :]
            match self._within:
                case "text":
                    yield from self._content(found.rstrip())
                    self._gap, self._within = "", "name"
                case "name":
                    yield _call(self.calls, "", id=call_id(self.job.id, self.index, self.calls), name=found)
                    self._within = "arguments"
                case _:
                    yield from self._arguments(found)
                    self.calls, self._within = self.calls + 1, "text"
        if self._within == "text":
            yield from self._plain(last=last)
        elif self._within == "arguments":
            kept = 0 if last else _begun(self._waiting, CLOSE)
            found, self._waiting = _split(self._waiting, kept)
            yield from self._arguments(found)
        elif last and not self.calls:  # not even the name is whole
            yield {"content": HEAD + self._waiting}

    def _plain(self, *, last: bool) -> Iterator[dict[str, Any]]:
        """Text, but for what may be the beginning of a call, and blanks before it."""
        found, self._waiting = _split(self._waiting, 0 if last else _begun(self._waiting, HEAD))
        text = found if last else found.rstrip()
        yield from self._content(text, last=last)
        self._gap += found[len(text) :]

    def _content(self, text: str, *, last: bool = False) -> Iterator[dict[str, Any]]:
        """Behind a call nothing is content."""
        if (text or (last and self._gap)) and not self.calls:
            text, self._gap = self._gap + text, ""
            yield {"content": text}

    def _arguments(self, text: str) -> Iterator[dict[str, Any]]:
        if text:
            yield _call(self.calls, text)


def _call(index: int, arguments: str, **named: str) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": arguments}
    if not named:
        return {"tool_calls": [{"index": index, "function": function}]}
    function["name"] = named["name"]
    return {"tool_calls": [{"index": index, "id": named["id"], "type": "function", "function": function}]}


def _begun(text: str, mark: str) -> int:
    """Characters at the end of ``text`` with which ``mark`` may begin."""
    return next((size for size in range(len(mark) - 1, 0, -1) if text.endswith(mark[:size])), 0)


def _split(text: str, kept: int) -> tuple[str, str]:
    return text[: len(text) - kept], text[len(text) - kept :]


def _top(told: TokenLogprobs) -> Iterator[tuple[int, float]]:
    return zip(told.top_ids, told.top_logprobs, strict=True)


def _ending(piece: Piece) -> dict[str, Any]:
    """Empty, unless the choice ends well here: how it failed an error tells."""
    reason = piece.finish_reason
    if reason is None or reason.state is not JobState.SUCCEEDED:
        return {}
    return {"finish_reason": finish_reason(reason, piece.tool_calls), "stop_reason": piece.stop_reason}
