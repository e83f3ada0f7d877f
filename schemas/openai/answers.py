"""OpenAI's response bodies out of results."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ..job import Endpoint
from ..result import Choice, FinishReason, Result, TokenLogprob, TopLogprob, Usage
from ..tools import ToolCall, text_before_calls


def response_body(result: Result) -> dict[str, Any]:
    """The ``chat.completion`` (for a job of the chat endpoint) or ``text_completion`` of a result."""
    is_chat = result.endpoint is Endpoint.CHAT
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{result.job_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(result.timings.submitted_at),
        "model": result.model,
        "choices": [
            _chat_choice(each) if is_chat else _text_choice(each, result.prompt_logprobs)
            for each in result.choices
        ],
        "usage": usage_body(result.usage),
        "system_fingerprint": result.fingerprint,
    }
    if is_chat and result.prompt_logprobs is not None:
        body["prompt_logprobs"] = _prompt_body(result.prompt_logprobs)
    return body


def usage_body(usage: Usage) -> dict[str, Any]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finish_reason(reason: FinishReason, calls: Sequence[ToolCall] | None) -> str:
    """OpenAI's word for how a choice ended well."""
    if reason is FinishReason.LENGTH:
        return "length"
    return "tool_calls" if calls else "stop"


def _chat_choice(choice: Choice) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    if choice.tool_calls:
        message["content"] = text_before_calls(choice.text) or None
        message["tool_calls"] = [_call(each) for each in choice.tool_calls]
    told = None
    if choice.logprobs is not None:
        told = {"content": [_chat_token(each) for each in choice.logprobs], "refusal": None}
    return {"index": choice.index, "message": message, "logprobs": told, **_ending(choice)}


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _chat_token(told: TokenLogprob) -> dict[str, Any]:
    return {**_chat_top(told), "top_logprobs": [_chat_top(each) for each in told.top]}


def _chat_top(told: TopLogprob) -> dict[str, Any]:
    body = told.token.encode() if told.raw is None else bytes.fromhex(told.raw)
    return {"token": told.token, "logprob": told.logprob, "bytes": list(body)}


def _text_choice(choice: Choice, prompt: tuple[TokenLogprob, ...] | None) -> dict[str, Any]:
    """``prompt``: what was told of it; it stands before the output's tokens if the text begins with it."""
    body: dict[str, Any] = {"index": choice.index, "text": choice.text, "logprobs": None}
    if prompt is not None:
        body["prompt_logprobs"] = _prompt_body(prompt)
    if choice.logprobs is not None:
        echoed = prompt if choice.echo and prompt is not None else ()
        body["logprobs"] = _text_logprobs((*echoed, *choice.logprobs))
    return body | _ending(choice)


def _text_logprobs(told: Sequence[TokenLogprob]) -> dict[str, Any]:
    texts = [one.token for one in told]
    offsets = [0, *accumulate(len(text) for text in texts)][: len(texts)]
    return {
        "tokens": texts,
        "token_logprobs": [one.logprob for one in told],
        "top_logprobs": [
            None if one.logprob is None else {each.token: each.logprob for each in one.top} for one in told
        ],
        "text_offset": offsets,
    }


def _prompt_body(told: Sequence[TokenLogprob]) -> list[dict[str, Any] | None]:
    """vLLM's shape: by token id, the prompt's own token first; null for the first one."""
    return [
        None
        if one.logprob is None
        else {
            str(each.id): {"logprob": each.logprob, "decoded_token": each.token} for each in (one, *one.top)
        }
        for one in told
    ]


def _ending(choice: Choice) -> dict[str, Any]:
    reason = finish_reason(choice.finish_reason, choice.tool_calls)
    ending: dict[str, Any] = {"finish_reason": reason, "stop_reason": choice.stop_reason}
    if choice.closed is not None:
        ending["closed"] = choice.closed
    if choice.token_ids is not None:
        ending["token_ids"] = list(choice.token_ids)
    return ending
