"""OpenAI's requests in, OpenAI's responses out; nothing a user asked for is ignored in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gristmill.schemas.batch_lines import error_line, output_line, parse_line
from gristmill.schemas.errors import (
    BadInput,
    InvalidJson,
    InvalidMethod,
    InvalidRequest,
    MissingParameter,
    Unsupported,
    UrlMismatch,
)
from gristmill.schemas.job import Endpoint, JobState
from gristmill.schemas.openai import parse_chat, parse_completion, response_body
from gristmill.schemas.result import (
    Choice,
    ErrorInfo,
    FinishReason,
    Result,
    Timings,
    TokenLogprob,
    TopLogprob,
    Usage,
)

HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": HI} | fields


def make_result(**fields: Any) -> Result:
    given: dict[str, Any] = {
        "job_id": "run_1.2",
        "model": "m",
        "state": JobState.SUCCEEDED,
        "endpoint": Endpoint.CHAT,
        "choices": (Choice(text="Grüße", finish_reason=FinishReason.LENGTH),),
        "usage": Usage(prompt_tokens=5, completion_tokens=3),
        "timings": Timings(submitted_at=100.7, finished_at=101.0),
    }
    return Result(**(given | fields))


def test_a_chat_request_becomes_messages_and_sampling() -> None:
    request = parse_chat(
        chat(model="m", max_tokens=7, temperature=0, top_p=0.5, seed=3, stop="END", metadata={"a": "b"})
    )
    assert request.endpoint is Endpoint.CHAT
    assert request.model == "m"
    assert request.messages is not None
    assert request.messages[0].content == "hi"
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.top_p) == (7, 0, 0.5)
    assert (request.sampling.seed, request.sampling.stop) == (3, ("END",))
    assert request.metadata == {"a": "b"}


@pytest.mark.parametrize(
    "neutral",
    [
        {"user": "u", "store": False, "service_tier": "auto", "n": 1, "logprobs": False, "top_logprobs": 0},
        {
            "frequency_penalty": 0,
            "presence_penalty": 0.0,
            "logit_bias": {},
            "tools": [],
            "tool_choice": "auto",
        },
        {"logprobs": None, "stop": None, "temperature": None, "response_format": {"type": "text"}},
        {"stream": False, "stream_options": None, "modalities": ["text"], "max_tokens": None},
        {"repetition_penalty": 1.0, "skip_special_tokens": True, "use_beam_search": False},
    ],
)
def test_fields_at_their_neutral_value_change_nothing(neutral: dict[str, Any]) -> None:
    assert parse_chat(chat(**neutral)) == parse_chat(chat())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prediction", {"type": "content"}),
        ("store", True),
    ],
)
def test_a_missing_feature_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(Unsupported) as caught:
        parse_chat(chat(**{field: value}))
    assert caught.value.param == field
    assert caught.value.message.startswith(f"{field}: ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (chat(foo=1), "foo"),
        (chat(temperature="hot"), "temperature"),
        (chat(temperature=-1), "temperature"),
        (chat(max_tokens=0), "max_tokens"),
        (chat(max_tokens=5, max_completion_tokens=6), "max_tokens"),
        (chat(max_tokens=True), "max_tokens"),
        (chat(stop=["a"] * 65), "stop"),
        (chat(top_logprobs=3), "top_logprobs"),
        (chat(logprobs=3), "logprobs"),
        (chat(logit_bias={"a": 1}), "logit_bias.a.[key]"),
        (chat(logit_bias={"5": 200}), "logit_bias.5"),
        (chat(presence_penalty=3), "presence_penalty"),
        (chat(repetition_penalty=0), "repetition_penalty"),
        (chat(bad_words="no"), "bad_words"),
        (chat(seed=-1), "seed"),
        (chat(n=0), "n"),
        (chat(n=True), "n"),
        (chat(n=3, best_of=2), "best_of"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "spell": 1}]}, "messages.0.spell"),
        ([], "body"),
    ],
)
def test_a_bad_field_is_named(body: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_chat(body)
    assert caught.value.param == param


def test_a_missing_field_has_its_own_code() -> None:
    with pytest.raises(MissingParameter) as caught:
        parse_chat({"model": "m"})
    assert (caught.value.code, caught.value.param) == ("missing_required_parameter", "messages")


def test_text_parts_are_joined_and_developer_speaks_as_system() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    request = parse_chat({"messages": [{"role": "developer", "content": parts}]})
    assert request.messages is not None
    assert (request.messages[0].role, request.messages[0].content) == ("system", "one\ntwo")


def test_an_image_part_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="image_url"):
        parse_chat({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]})


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [
        ("x", "x", None),
        (["x"], "x", None),
        ([1, 2], None, (1, 2)),
        ([[1, 2]], None, (1, 2)),
    ],
)
def test_a_completion_prompt_may_be_text_or_ids(prompt: Any, text: str | None, ids: Any) -> None:
    request = parse_completion({"prompt": prompt})
    assert (request.prompt, request.prompt_ids) == (text, ids)
    assert request.sampling.max_tokens == 16, "OpenAI's default for this endpoint"


@pytest.mark.parametrize("prompt", ["", [], 5, [""], [1, -1], [2**31], [True, 1], {}, [[]], [[["x"]]]])
def test_a_completion_prompt_that_is_none_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_completion({"prompt": prompt})
    assert caught.value.param == "prompt"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "m"}, ("m", None)),
        ({"model": "org/m:formal"}, ("org/m", "formal")),
        ({"model": "m:a", "adapter_id": "a"}, ("m", "a")),
        ({"model": "m", "adapter_id": "b"}, ("m", "b")),
    ],
)
def test_a_model_may_name_its_adapter(fields: Any, expected: Any) -> None:
    for request in (parse_chat(chat(**fields)), parse_completion({"prompt": "x", **fields})):
        assert (request.model, request.sampling.adapter_id) == expected


@pytest.mark.parametrize("fields", [{"model": ":a"}, {"model": "m:"}, {"model": "m:a", "adapter_id": "b"}])
def test_a_model_that_names_its_adapter_badly_is_refused(fields: Any) -> None:
    with pytest.raises(InvalidRequest, match="adapter"):
        parse_chat(chat(**fields))


def test_structured_outputs_may_say_what_is_so_anyway() -> None:
    options = {"json": {"type": "object"}, "disable_any_whitespace": True, "disable_fallback": False}
    grammar = parse_chat(chat(structured_outputs=options)).sampling.grammar
    assert grammar is not None
    assert grammar.kind == "json_schema"
    with pytest.raises(Unsupported):
        parse_chat(chat(structured_outputs={**options, "whitespace_pattern": " *"}))


def test_vllm_extras_reach_the_sampler() -> None:
    sampling = parse_completion(
        {
            "prompt": "x",
            "top_k": 5,
            "min_p": 0.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [7],
            "include_stop_str_in_output": True,
        }
    ).sampling
    assert (sampling.top_k, sampling.min_p, sampling.min_tokens) == (5, 0.1, 2)
    assert (sampling.ignore_eos, sampling.stop_token_ids, sampling.include_stop) == (True, (7,), True)
    assert parse_completion({"prompt": "x", "top_k": -1}).sampling.top_k == 0


def line(**fields: Any) -> bytes:
    given = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": chat()}
    return json.dumps(given | fields).encode()


def test_a_batch_line_and_bare_lines_become_rows() -> None:
    assert parse_line(line(), 1).custom_id == "a"
    bare = parse_line(b'{"prompt": "x", "max_tokens": 5, "stop": "\\n"}', 4)
    assert bare.custom_id == "line-4"
    assert bare.request.endpoint is Endpoint.COMPLETIONS
    assert (bare.request.sampling.max_tokens, bare.request.sampling.stop) == (5, ("\n",))
    turns = parse_line(b'{"custom_id": "c", "messages": [{"role": "user", "content": "hi"}]}', 5)
    assert (turns.custom_id, turns.request.endpoint) == ("c", Endpoint.CHAT)


def test_defaults_fill_what_a_line_leaves_open() -> None:
    defaults = {"max_tokens": 9, "temperature": 0.0}
    assert parse_line(line(), 1, defaults).request.sampling.max_tokens == 9
    own = line(body=chat(max_completion_tokens=4, temperature=0.5))
    assert parse_line(own, 1, defaults).request.sampling.max_tokens == 4
    assert parse_line(own, 1, defaults).request.sampling.temperature == 0.5
    assert parse_line(b'{"prompt": "x", "max_tokens": 3}', 1, defaults).request.sampling.max_tokens == 3


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"nonsense", InvalidJson),
        (b'{"prompt": "\xff"}', InvalidJson),
        (b'{"prompt": "\\ud800"}', InvalidJson),
        (b'{"prompt": NaN}', InvalidJson),
        (b"[1]", InvalidRequest),
        (b"{}", InvalidRequest),
        (b'{"prompt": "x", "messages": []}', InvalidRequest),
        (b'{"prompt": "x", "foo": 1}', InvalidRequest),
        (line(method="GET"), InvalidMethod),
        (line(url="/v1/embeddings"), UrlMismatch),
        (line(url=None), UrlMismatch),
        (line(custom_id=5), InvalidRequest),
        (line(foo=5), InvalidRequest),
        (line(body=chat(stream=True)), InvalidRequest),
        (b'{"custom_id": "a", "url": "/v1/completions"}', MissingParameter),
    ],
)
def test_a_line_that_is_no_request_says_why(data: bytes, error: type[BadInput]) -> None:
    with pytest.raises(error) as caught:
        parse_line(data, 1)
    assert type(caught.value) is error


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "x" * 10_000])
def test_an_error_about_a_strange_name_is_one_short_line(name: str) -> None:
    turn = {"role": "user", "content": "hi", name: 1}
    for fields in (
        {"prompt": "x", name: 1},
        {"prompt": "x", "metadata": {name: 1}},
        {"messages": [turn]},
        {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", name: 1}},
    ):
        with pytest.raises(InvalidRequest) as caught:
            parse_line(json.dumps(fields).encode(), 1)
        assert caught.value.message.isprintable()
        assert len(caught.value.message) < 200


def test_a_chat_result_has_openais_shape() -> None:
    body = response_body(make_result())
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Grüße", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    assert body["created"] == 100
    assert body["usage"]["total_tokens"] == 8


def test_a_text_result_has_openais_shape() -> None:
    body = response_body(make_result(endpoint=Endpoint.COMPLETIONS))
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "Grüße"


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [
        ("context_length_exceeded", 400, "invalid_request_error"),
        ("model_not_found", 404, "invalid_request_error"),
        ("payload_too_large", 413, "invalid_request_error"),
        ("internal_error", 500, "server_error"),
        ("invalid_logits", 500, "server_error"),
        ("store_unavailable", 503, "server_error"),
    ],
)
def test_whose_fault_an_error_is_follows_from_the_tree(code: str, status: int, kind: str) -> None:
    """A broken model's invalid_logits, which no class of ours has, was once called the request's fault."""
    response = error_line("r", "a", ErrorInfo(code=code, message="sorry")).response
    assert response is not None
    assert (response.status_code, response.body["error"]["type"]) == (status, kind)


def test_output_lines_carry_response_or_error_as_openais_do() -> None:
    ok = json.loads(output_line(make_result(), "a").to_line())
    assert set(ok) == {"id", "custom_id", "response", "error"}
    assert (ok["custom_id"], ok["response"]["status_code"], ok["error"]) == ("a", 200, None)

    error = ErrorInfo(code="context_length_exceeded", message="too long", param="messages")
    failed = output_line(make_result(state=JobState.FAILED, error=error), "b")
    assert failed.error is None
    assert failed.response is not None
    assert failed.response.status_code == 400
    assert failed.response.body["error"] == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }

    cancelled = output_line(make_result(state=JobState.CANCELLED), "c")
    assert cancelled.response is None
    assert cancelled.error is not None
    assert cancelled.error["code"] == "batch_cancelled"


# ---- sampling and log probabilities


def test_everything_about_sampling_arrives_under_its_name() -> None:
    wishes: dict[str, Any] = {
        "typical_p": 0.9,
        "frequency_penalty": 0.5,
        "presence_penalty": -1,
        "repetition_penalty": 1.2,
        "dry_multiplier": 0.8,
        "dry_sequence_breakers": ("\n",),
        "allowed_token_ids": (1, 2),
        "bad_words": ("no",),
        "prompt_logprobs": 2,
        "skip_special_tokens": False,
        "return_token_ids": True,
    }
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in wishes.items()}
    sampling = parse_chat(chat(**given, logit_bias={"50": -100}, truncate_prompt_tokens=7)).sampling
    assert {name: getattr(sampling, name) for name in wishes} == wishes
    assert sampling.logit_bias == {50: -100.0}
    assert sampling.truncate == 7


@pytest.mark.parametrize(
    ("parsed", "expected"),
    [
        (parse_chat(chat()), (None, None, False)),
        (parse_chat(chat(logprobs=True)), (0, None, False)),
        (parse_chat(chat(logprobs=True, top_logprobs=4)), (4, None, False)),
        (parse_completion({"prompt": "p", "logprobs": 3}), (3, None, False)),
        (parse_completion({"prompt": "p", "logprobs": False}), (None, None, False)),
        (parse_completion({"prompt": "p", "echo": True}), (None, None, True)),
        (parse_completion({"prompt": "p", "echo": True, "logprobs": 2}), (2, 2, True)),
    ],
)
def test_each_endpoint_says_in_its_own_way_how_much_to_tell(parsed: Any, expected: Any) -> None:
    sampling = parsed.sampling
    assert (sampling.logprobs, sampling.prompt_logprobs, sampling.echo) == expected


def told(token: str, logprob: float | None, **more: Any) -> TokenLogprob:
    return TokenLogprob(id=len(token), token=token, logprob=logprob, **more)


TOLD = (
    told(
        "Hi", -0.5, top=(TopLogprob(id=2, token="Hi", logprob=-0.5), TopLogprob(id=9, token="Yo", logprob=-1))
    ),
    told("\ufffd", -2.0, raw="c3"),
)


def test_chat_log_probabilities_have_openais_shape() -> None:
    choice = Choice(text="Hi", finish_reason=FinishReason.STOP, logprobs=TOLD, token_ids=(2, 1))
    (body,) = response_body(make_result(choices=(choice,)))["choices"]
    assert body["token_ids"] == [2, 1]
    first, second = body["logprobs"]["content"]
    assert first == {
        "token": "Hi",
        "logprob": -0.5,
        "bytes": [72, 105],
        "top_logprobs": [
            {"token": "Hi", "logprob": -0.5, "bytes": [72, 105]},
            {"token": "Yo", "logprob": -1.0, "bytes": [89, 111]},
        ],
    }
    assert second["bytes"] == [0xC3]


def test_completion_log_probabilities_begin_with_the_prompt_that_is_echoed() -> None:
    prompt = (told("Say", None), told(" it:", -3.0, top=(TopLogprob(id=1, token=" a", logprob=-1.0),)))
    for echo in (True, False):
        choice = Choice(text="…", finish_reason=FinishReason.STOP, logprobs=TOLD, echo=echo)
        result = make_result(choices=(choice,), prompt_logprobs=prompt, endpoint=Endpoint.COMPLETIONS)
        (body,) = response_body(result)["choices"]
        expected = ["Say", " it:", "Hi", "\ufffd"] if echo else ["Hi", "\ufffd"]
        assert body["logprobs"]["tokens"] == expected
        assert body["logprobs"]["token_logprobs"] == ([None, -3.0] if echo else []) + [-0.5, -2.0]
        assert body["logprobs"]["text_offset"] == ([0, 3, 7, 9] if echo else [0, 2])
        assert body["logprobs"]["top_logprobs"][-2] == {"Hi": -0.5, "Yo": -1.0}
        assert body["prompt_logprobs"][0] is None
        assert body["prompt_logprobs"][1]["1"] == {"logprob": -1.0, "decoded_token": " a"}
