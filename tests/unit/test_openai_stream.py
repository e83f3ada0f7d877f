"""A job's stream in OpenAI's form, as the openai package's own types read it."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import pytest
from gristmill.producer.replica import Chunk
from gristmill.schemas.errors import ResultChanged
from gristmill.schemas.events import EntryId
from gristmill.schemas.job import Endpoint, Job, Message
from gristmill.schemas.logprobs import TokenLogprobs
from gristmill.schemas.openai import Chunks, response_body
from gristmill.schemas.result import Choice, FinishReason, Result, Timings, Usage
from gristmill.schemas.sampling import SamplingParams
from gristmill.schemas.tools import calls_in, text_before_calls, toolbox
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

USAGE = Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=2)
TOOLS = toolbox({"tools": [{"type": "function", "function": {"name": name}} for name in ("f", "weather")]})


def job(*, chat: bool = True, tools: bool = False, **fields: Any) -> Job:
    asked: dict[str, Any] = {"messages": (Message(role="user", content="hi"),)} if chat else {"prompt": "hi"}
    given = {"id": "job_1", "model": "m", "submitted_at": 100.7, "expires_at": 200.0, **asked, **fields}
    return Job(**given, tools=TOOLS if tools else None)


def piece(text: str, **fields: Any) -> Chunk:
    given = {"ids": (), "choice": 0, "offset": 0, "id": EntryId(1, 1), **fields}
    return Chunk(text, **given)


def pieces_of(text: str, rng: random.Random, choice: int = 0, reason: str = "stop") -> list[Chunk]:
    """The text in pieces of any size, the last of which says how it ended."""
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randrange(0, 12)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    calls = calls_in(text, "job_1", choice) or None
    *first, last = [piece(part, choice=choice) for part in parts]
    ended = piece(last.text, choice=choice, finish_reason=FinishReason(reason), tool_calls=calls)
    return [*first, ended]


def streamed(chunks: Chunks, pieces: Sequence[Chunk]) -> list[ChatCompletionChunk]:
    return [
        ChatCompletionChunk.model_validate(body, strict=True) for one in pieces for body in chunks.of(one)
    ]


def put_together(chunks: Sequence[ChatCompletionChunk], index: int = 0) -> tuple[str, list[list[str]]]:
    """Content, and of each call: id, name, arguments."""
    content, calls = "", defaultdict[int, list[str]](lambda: ["", "", ""])
    for delta in (each.delta for chunk in chunks for each in chunk.choices if each.index == index):
        content += delta.content or ""
        for call in delta.tool_calls or ():
            assert call.function
            calls[call.index][0] += call.id or ""
            calls[call.index][1] += call.function.name or ""
            calls[call.index][2] += call.function.arguments or ""
    return content, [calls[number] for number in sorted(calls)]


def test_a_chat_stream_has_a_role_then_text_then_an_end_then_the_usage() -> None:
    chunks = Chunks(job(), include_usage=True)
    first, text, more, end = streamed(
        chunks, [piece("Hi"), piece(""), piece(" you", finish_reason=FinishReason.LENGTH)]
    )
    assert (first.id, first.object, first.created, first.model) == (
        "chatcmpl-job_1",
        "chat.completion.chunk",
        100,
        "m",
    )
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [one.choices[0].delta.content for one in (text, more, end)] == ["Hi", " you", None]
    assert [one.choices[0].finish_reason for one in (first, text, more, end)] == [None, None, None, "length"]
    last = ChatCompletionChunk.model_validate(chunks.last(USAGE), strict=True)
    assert last.choices == []
    assert last.usage
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (5, 3, 8)
    assert {one.usage for one in (first, text, more, end)} == {None}
    assert "usage" not in next(Chunks(job()).of(piece("a"))), "nobody asked"


def test_choices_come_as_they_do_and_each_has_its_own_role_and_end() -> None:
    rng = random.Random(1)
    texts = ["one two three", "", "eins zwei drei"]
    waiting = [pieces_of(text, rng, index) for index, text in enumerate(texts)]
    mixed: list[Chunk] = []
    while some := [each for each in waiting if each]:
        mixed.append(rng.choice(some).pop(0))
    got = streamed(Chunks(job(sampling=SamplingParams(n=3))), mixed)
    for index, text in enumerate(texts):
        of_choice = [each for chunk in got for each in chunk.choices if each.index == index]
        assert [each.delta.role for each in of_choice if each.delta.role] == ["assistant"]
        assert [each.finish_reason for each in of_choice if each.finish_reason] == ["stop"]
        assert of_choice[-1].finish_reason == "stop"
        assert put_together(got, index) == (text, [])


def completion(body: dict[str, Any]) -> Completion:
    """The type has no word for "not ended", which is null in OpenAI's own streams."""
    for choice in body["choices"]:
        choice["finish_reason"] = choice["finish_reason"] or "content_filter"
    return Completion.model_validate(body, strict=True)


def test_a_text_stream_has_openais_shape_and_tells_log_probabilities_by_token_id() -> None:
    told = (
        TokenLogprobs(logprob=-0.5, top_ids=[7, 9], top_logprobs=[-0.5, -1.0]),
        TokenLogprobs(logprob=-2.0),
    )
    chunks = Chunks(job(chat=False))
    pieces = [piece("ab"), piece("cd", ids=(7, 8), logprobs=told), piece("", finish_reason=FinishReason.STOP)]
    first, second, last = [completion(body) for one in pieces for body in chunks.of(one)]
    assert (first.object, first.id, first.choices[0].text) == ("text_completion", "cmpl-job_1", "ab")
    assert second.choices[0].logprobs
    assert second.choices[0].logprobs.model_dump() == {
        "tokens": ["token_id:7", "token_id:8"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{"token_id:7": -0.5, "token_id:9": -1.0}, {}],
        "text_offset": [2, 2],
    }
    assert last.choices[0].finish_reason == "stop"


def test_chat_log_probabilities_go_with_the_text_of_their_tokens() -> None:
    told = (TokenLogprobs(logprob=-0.5, top_ids=[7], top_logprobs=[-0.5]),)
    chunks = Chunks(job(), text_of={7: "ü"}.__getitem__)
    _, text, waits = streamed(
        chunks, [piece("ü", ids=(7,), logprobs=told), piece("", ids=(7,), logprobs=told)]
    )
    for one in (text, waits):
        assert one.choices[0].logprobs
        assert one.choices[0].logprobs.content
        (token,) = one.choices[0].logprobs.content
        assert (token.token, token.logprob, token.bytes) == ("ü", -0.5, [0xC3, 0xBC])
        assert [top.token for top in token.top_logprobs] == ["ü"]


def called(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    "text",
    [
        "No call at all. \n",
        "a < b, <tool_call, <tool_call> and so on  ",
        called("f", "{}"),
        "Let me see.\n\n" + called("weather", '{"city": "Oslo \\u00e9 }", "deep": {"a": {}}}'),
        called("f", '{"a": "}"}') + "\n" + called("weather", "{}") + "\n" + called("f", '{"x": [1, 2]}'),
        '{"answer": "<tool_call>"}',
    ],
)
@pytest.mark.parametrize("ranked", [False, True])
def test_calls_are_streamed_as_the_result_has_them_wherever_pieces_end(text: str, ranked: bool) -> None:
    rng = random.Random(7)
    asked = job(tools=True, sampling=SamplingParams(best_of=2 if ranked else None))
    calls = calls_in(text, "job_1")
    for _ in range(40):
        got = streamed(Chunks(asked), pieces_of(text, rng))
        content, made = put_together(got)
        assert content == (text_before_calls(text) if calls else text)
        assert made == [[call.id, call.name, call.arguments] for call in calls]
        assert got[-1].choices[0].finish_reason == ("tool_calls" if calls else "stop")


def test_arguments_arrive_while_they_are_made_and_a_call_that_was_cut_keeps_what_it_has() -> None:
    begun = called("weather", '{"city": "Os')[: -len("}\n</tool_call>")]
    chunks = Chunks(job(tools=True))
    assert put_together(streamed(chunks, [piece("Hm. " + begun)])) == (
        "Hm.",
        [[f"{calls_in(called('f', '{}'), 'job_1')[0].id}", "weather", '{"city": "Os']],
    )
    (end,) = streamed(chunks, [piece("", finish_reason=FinishReason.LENGTH)])
    assert end.choices[0].finish_reason == "length"
    cut = '<tool_call>\n{"name": "wea'
    assert put_together(
        streamed(Chunks(job(tools=True)), [piece(cut, finish_reason=FinishReason.LENGTH)])
    ) == (cut, [])


def test_what_has_no_form_in_the_stream_is_an_error_and_a_failure_no_end() -> None:
    chunks = Chunks(job())
    assert len(streamed(chunks, [piece("a", reset=True)])) == 2, "nothing was sent before"
    with pytest.raises(ResultChanged, match="take the whole of it from its result"):
        next(chunks.of(piece("b", reset=True)))
    assert streamed(chunks, [piece("", finish_reason=FinishReason.ERROR)]) == []


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
def test_every_choice_of_a_result_stands_in_the_answer_under_its_number(endpoint: Endpoint) -> None:
    is_chat = endpoint is Endpoint.CHAT
    text = "I ask." + called("f", "{}")
    calls = calls_in(text, "job_1", 1) if is_chat else None
    choices = (
        Choice(index=0, text="plain", finish_reason=FinishReason.LENGTH),
        Choice(index=1, text=text, finish_reason=FinishReason.STOP, tool_calls=calls, token_ids=(1, 2)),
        Choice(index=2, text="", finish_reason=FinishReason.STOP, stop_reason="END"),
    )
    result = Result(
        job_id="job_1",
        model="m",
        state=FinishReason.STOP.state,
        endpoint=endpoint,
        choices=choices,
        usage=USAGE,
        timings=Timings(submitted_at=100.7, finished_at=101.0),
    )
    answer = (ChatCompletion if is_chat else Completion).model_validate(response_body(result))
    assert [each.index for each in answer.choices] == [0, 1, 2]
    assert [each.finish_reason for each in answer.choices] == [
        "length",
        "tool_calls" if calls else "stop",
        "stop",
    ]
    if isinstance(answer, ChatCompletion):
        assert calls
        message = answer.choices[1].message
        assert message.content == "I ask."
        assert message.tool_calls
        assert [call.id for call in message.tool_calls] == [call.id for call in calls]
    else:
        assert [each.text for each in answer.choices] == [each.text for each in choices]
