"""OpenAI's request bodies, as they become jobs.

A field we act on is validated; one that changes nothing here is accepted; a known feature that is missing is
refused unless it is at its neutral value; anything else is an unknown field. Nothing is silently ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from pydantic import Field

from ..errors import InvalidRequest, Unsupported
from ..grammar import CLOSE_FIELD, GRAMMAR_FIELDS, with_grammar
from ..job import Endpoint, Message
from ..sampling import SamplingParams
from ..tools import TOOL_FIELDS, Toolbox, check_fit, toolbox
from ..wire import MAX_COUNT, Bool, Float, Int, Record, kind_of
from .messages import check_neutral, parse_messages

COMPLETIONS_DEFAULT_MAX_TOKENS = 16
"""OpenAI's own default for /v1/completions; the chat endpoint has none."""

_NO_EFFECT = frozenset(
    [
        "user",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "guided_decoding_backend",
    ]
)
_SAMPLING = (
    "temperature",
    "top_p",
    "min_p",
    "typical_p",
    "min_tokens",
    "n",
    "best_of",
    "seed",
    "adapter_id",
    "stop_token_ids",
    "ignore_eos",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_range",
    "dry_sequence_breakers",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "skip_special_tokens",
    "return_token_ids",
)
"""Fields that SamplingParams knows under the same name, and checks."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "web_search_options": (),
    "moderation": (),
    # vLLM
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "add_special_tokens": (True, False),
    "chat_template_kwargs": ({},),
    "chat_template": (),
    "documents": (),
    "mm_processor_kwargs": ({},),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "return_tokens_as_token_ids": (False,),
    "include_reasoning": (True,),
    "thinking_token_budget": (),
    "logits_processors": ([],),
    "prompt_embeds": (),
    "priority": (0,),
    "request_id": (),
    "cache_salt": (),
    "kv_transfer_params": (),
    "vllm_xargs": ({},),
}
"""Known and not offered: accepted when null or one of these values, which ask for nothing."""

_GRAMMAR = frozenset([*GRAMMAR_FIELDS, CLOSE_FIELD])


@dataclass(frozen=True, slots=True)
class Request:
    """What a request says about its job, before the job has an id, a tenant and a time."""

    endpoint: Endpoint
    model: str | None
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    messages: tuple[Message, ...] | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tools: Toolbox | None = None
    stream: bool = False
    include_usage: bool = False
    """``stream_options.include_usage``: end the stream with the usage."""
    metadata: dict[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        check_fit(self.tools, self.sampling, chat=self.messages is not None)


class _StreamOptions(Record):
    include_usage: Bool = False
    include_obfuscation: Bool = False
    continuous_usage_stats: Bool = False


class _Body(Record):
    """The fields both endpoints share. Ranges of sampling values are SamplingParams' business."""

    model: Annotated[str, Field(strict=True, min_length=1, max_length=256)] | None = None
    max_tokens: Int | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Int | None = None
    min_p: Float | None = None
    typical_p: Float | None = None
    min_tokens: Int | None = None
    n: Int | None = None
    best_of: Int | None = None
    seed: Int | None = None
    adapter_id: str | None = None
    frequency_penalty: Float | None = None
    presence_penalty: Float | None = None
    repetition_penalty: Float | None = None
    dry_multiplier: Float | None = None
    dry_base: Float | None = None
    dry_allowed_length: Int | None = None
    dry_range: Int | None = None
    dry_sequence_breakers: Any = None
    logit_bias: Any = None
    allowed_token_ids: Any = None
    bad_words: Any = None
    prompt_logprobs: Int | None = None
    truncate_prompt_tokens: Int | None = None
    skip_special_tokens: Bool | None = None
    return_token_ids: Bool | None = None
    stop: Any = None
    stop_token_ids: tuple[Int, ...] | None = None
    include_stop_str_in_output: Bool | None = None
    ignore_eos: Bool | None = None
    stream: Bool = False
    stream_options: _StreamOptions | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)
    grammar: dict[str, Any] | None = None

    def base_and_adapter(self) -> tuple[str | None, str | None]:
        """``model`` is BASE, or BASE:ADAPTER to go through a LoRA adapter. Raises InvalidRequest."""
        base, colon, adapter = (self.model or "").partition(":")
        if not colon:
            return self.model, self.adapter_id
        if not base or not adapter:
            raise InvalidRequest("model is BASE, or BASE:ADAPTER to name an adapter", param="model")
        if self.adapter_id not in (None, adapter):
            raise InvalidRequest(
                "model and adapter_id name two adapters; give one of them", param="adapter_id"
            )
        return base, adapter

    def sampling(self, max_tokens: int | None, **more: Any) -> SamplingParams:
        given: dict[str, Any] = {name: getattr(self, name) for name in _SAMPLING}
        given["max_tokens"] = max_tokens
        given["adapter_id"] = self.base_and_adapter()[1]
        given["grammar"] = self.grammar
        given["top_k"] = 0 if self.top_k == -1 else self.top_k  # -1 is vLLM's word for "off"
        given["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        given["include_stop"] = self.include_stop_str_in_output
        given["truncate"] = self.truncate_prompt_tokens
        given |= more
        return SamplingParams.from_python({k: v for k, v in given.items() if v is not None})


class _CompletionBody(_Body):
    prompt: Any
    echo: Bool = False
    logprobs: Any = None
    """How many of the likeliest tokens; false, as in the other endpoint, is none at all."""


class _ChatBody(_Body):
    messages: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    max_completion_tokens: Int | None = None
    logprobs: Bool = False
    top_logprobs: Int | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None


def parse_completion(body: Any) -> Request:
    """A body of /v1/completions. Raises InvalidRequest or its subclasses, each naming the field."""
    given = _CompletionBody.from_python(_without_neutral(body))
    prompt, prompt_ids = _one_prompt(given.prompt)
    max_tokens = COMPLETIONS_DEFAULT_MAX_TOKENS if given.max_tokens is None else given.max_tokens
    return Request(
        endpoint=Endpoint.COMPLETIONS,
        model=given.base_and_adapter()[0],
        prompt=prompt,
        prompt_ids=prompt_ids,
        sampling=given.sampling(max_tokens, **_completion_logprobs(given)),
        stream=given.stream,
        include_usage=bool(given.stream_options and given.stream_options.include_usage),
        metadata=given.metadata or {},
    )


def parse_chat(body: Any) -> Request:
    """A body of /v1/chat/completions. Raises InvalidRequest or its subclasses, each naming the field."""
    given = _ChatBody.from_python(_without_neutral(body))
    limits = {each for each in (given.max_tokens, given.max_completion_tokens) if each is not None}
    if len(limits) > 1:
        raise InvalidRequest(
            f"max_tokens ({given.max_tokens}) and max_completion_tokens ({given.max_completion_tokens}) "
            "mean the same; give one of them",
            param="max_tokens",
        )
    return Request(
        endpoint=Endpoint.CHAT,
        model=given.base_and_adapter()[0],
        messages=parse_messages(given.messages),
        sampling=given.sampling(limits.pop() if limits else None, logprobs=_chat_logprobs(given)),
        tools=toolbox({name: getattr(given, name) for name in TOOL_FIELDS}),
        stream=given.stream,
        include_usage=bool(given.stream_options and given.stream_options.include_usage),
        metadata=given.metadata or {},
    )


def _completion_logprobs(given: _CompletionBody) -> dict[str, Any]:
    count = given.logprobs
    if isinstance(count, bool):
        if count:
            raise InvalidRequest("logprobs is a number of tokens here, not true", param="logprobs")
        count = None
    told: dict[str, Any] = {"logprobs": count, "echo": given.echo}
    if given.echo and given.prompt_logprobs is None:  # what is echoed is told of as well
        told["prompt_logprobs"] = count
    return told


def _chat_logprobs(given: _ChatBody) -> int | None:
    if given.logprobs:
        return given.top_logprobs or 0
    if given.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: true", param="top_logprobs")
    return None


PARSERS = {Endpoint.CHAT: parse_chat, Endpoint.COMPLETIONS: parse_completion}


def _without_neutral(body: Any) -> dict[str, Any]:
    """The body without what changes nothing. Raises Unsupported for a feature that was really asked for."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"the request is {kind_of(body)}, not a JSON object", param="body")
    kept: dict[str, Any] = {}
    for name, value in cast("dict[str, Any]", body).items():
        if name in _NO_EFFECT:
            if name == "store" and value not in (None, False):
                raise Unsupported("store: nothing is kept beyond the result; leave it out", param=name)
        elif name in _NEUTRAL:
            check_neutral(name, value, _NEUTRAL[name])
        elif name not in _GRAMMAR and value is not None:  # null means "not given" everywhere in this API
            kept[name] = value
    return kept | with_grammar({k: v for k, v in cast("dict[str, Any]", body).items() if k in _GRAMMAR})


def _one_prompt(prompt: Any, *, listed: bool = False) -> tuple[str | None, tuple[int, ...] | None]:
    """(text, None) or (None, ids). A list of one prompt is that prompt; ``listed``: that was unwrapped."""
    many = cast("list[Any]", prompt) if isinstance(prompt, list) else [prompt]
    if many and many is prompt and all(type(each) is int for each in many):
        if not 0 <= min(many) <= max(many) <= MAX_COUNT:
            raise InvalidRequest(
                f"prompt holds a token id that is not within 0 to {MAX_COUNT}", param="prompt"
            )
        return None, tuple(many)
    if len(many) > 1:
        raise Unsupported(
            f"prompt: {len(many)} prompts in one request are not supported by this version; "
            "send one request for each",
            param="prompt",
        )
    if many and isinstance(many[0], list) and not listed:
        return _one_prompt(cast("list[Any]", many[0]), listed=True)
    if not many or not isinstance(many[0], str):
        raise InvalidRequest("prompt is neither a string nor a list of token ids", param="prompt")
    if not many[0]:
        raise InvalidRequest("prompt is empty", param="prompt")
    return many[0], None
