"""TGI's requests mean here what they mean there."""

from __future__ import annotations

from typing import Any

import pytest
from gristmill.producer.replica import Chunk
from gristmill.schemas.errors import InvalidRequest
from gristmill.schemas.events import EntryId
from gristmill.schemas.job import JobState
from gristmill.schemas.logprobs import TokenLogprobs
from gristmill.schemas.result import (
    Choice,
    ErrorInfo,
    FinishReason,
    Result,
    Timings,
    TokenLogprob,
    TopLogprob,
)
from gristmill.schemas.sampling import SamplingParams
from gristmill.schemas.tgi import parse_generate
from gristmill.schemas.tgi_answers import error_answer, generate_body, stream_events


def sampling(**parameters: Any) -> SamplingParams:
    return parse_generate({"inputs": "Hi", "parameters": parameters}).sampling


def test_every_parameter_arrives() -> None:
    alike: dict[str, Any] = {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.9,
        "typical_p": 0.8,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.5,
        "seed": 3,
        "truncate": 100,
        "watermark": True,
    }
    found = sampling(
        **alike,
        max_new_tokens=7,
        do_sample=True,
        stop=["END"],
        return_full_text=True,
        details=True,
        decoder_input_details=True,
        top_n_tokens=4,
    )
    assert found == SamplingParams(
        **alike, max_tokens=7, stop=("END",), include_stop=True, echo=True, logprobs=4, prompt_logprobs=0
    )


@pytest.mark.parametrize(
    ("body", "temperature"),
    [
        ({}, 1.0),
        ({"parameters": {}}, 0.0),
        ({"parameters": {"do_sample": False}}, 0.0),
        ({"parameters": {"do_sample": True}}, 1.0),
        ({"parameters": {"temperature": 1.0}}, 0.0),
        ({"parameters": {"temperature": 0.5}}, 0.5),
        ({"parameters": {"top_k": 10}}, 1.0),
        ({"parameters": {"typical_p": 0.9}}, 1.0),
        ({"parameters": {"repetition_penalty": 1.2}}, 0.0),
    ],
)
def test_it_is_greedy_where_tgi_is(body: dict[str, Any], temperature: float) -> None:
    assert parse_generate({"inputs": "Hi", **body}).sampling.temperature == temperature


def test_details_without_top_tokens_tell_of_each_token_alone() -> None:
    assert (sampling().logprobs, sampling(details=True).logprobs) == (None, 0)


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"temperature": 0.0}, "parameters.temperature"),
        ({"top_p": 1.0}, "parameters.top_p"),
        ({"typical_p": 1.0}, "parameters.typical_p"),
        ({"top_k": 0}, "parameters.top_k"),
        ({"max_new_tokens": 0}, "parameters.max_new_tokens"),
        ({"truncate": 0}, "parameters.truncate"),
        ({"foo": 1}, "parameters.foo"),
    ],
)
def test_what_tgi_refuses_is_refused_by_its_name(parameters: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sampling(**parameters)
    assert caught.value.param == param


def test_greedy_choices_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="2 choices at temperature 0"):
        sampling(best_of=2)


@pytest.mark.parametrize(
    ("grammar", "kind", "text"),
    [
        ({"type": "json", "value": {"type": "object"}}, "json_schema", '{"type": "object"}'),
        ({"type": "json_object", "value": {"type": "object"}}, "json_schema", '{"type": "object"}'),
        ({"type": "regex", "value": "a+"}, "regex", "a+"),
    ],
)
def test_a_grammar_is_passed_on(grammar: Any, kind: str, text: str) -> None:
    found = sampling(grammar=grammar).grammar
    assert found is not None
    assert (found.kind, found.text) == (kind, text)


def test_a_grammar_that_is_none_is_refused_and_so_are_details_of_the_prompt_in_a_stream() -> None:
    with pytest.raises(InvalidRequest) as caught:
        sampling(grammar={"type": "poem"})
    assert caught.value.param == "grammar.type"
    body = {"inputs": "Hi", "parameters": {"decoder_input_details": True}, "stream": True}
    with pytest.raises(InvalidRequest) as caught:
        parse_generate(body)
    assert caught.value.param == "parameters.decoder_input_details"


# ---- answers

HI = TokenLogprob(id=7, token="Hi", logprob=-0.5, top=(TopLogprob(id=7, token="Hi", logprob=-0.5),))
END = TokenLogprob(id=9, token="END", logprob=-1.0)


def answered(*choices: Choice, **more: Any) -> dict[str, Any]:
    timings = Timings(submitted_at=1.0, finished_at=2.0)
    result = Result(
        job_id="j", model="m", state=JobState.SUCCEEDED, choices=choices, timings=timings, seed=3, **more
    )
    return generate_body(result)


def test_an_answer_has_details_only_if_they_were_asked_for() -> None:
    plain = Choice(text="Hi", finish_reason=FinishReason.LENGTH)
    assert answered(plain) == {"generated_text": "Hi", "details": None}
    best = Choice(text="HiEND", finish_reason=FinishReason.STOP, stop_reason="END", logprobs=(HI, END))
    other = Choice(index=1, text="Hi", finish_reason=FinishReason.STOP, logprobs=(HI,))
    prompt = (TokenLogprob(id=1, token="Say"), TokenLogprob(id=2, token=" it", logprob=-3.0))
    answer = answered(best, other, prompt_logprobs=prompt)
    details = answer["details"]
    told = {"id": 7, "text": "Hi", "logprob": -0.5, "special": False}
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("stop_sequence", 2, 3)
    assert details["prefill"][0] == {"id": 1, "text": "Say", "logprob": None}
    assert details["tokens"][0] == told
    assert details["top_tokens"] == [[told], []]
    (second,) = details["best_of_sequences"]
    assert (second["generated_text"], second["finish_reason"]) == ("Hi", "eos_token")


def pieces() -> list[Chunk]:
    likely = TokenLogprobs(logprob=-0.5, top_ids=[5], top_logprobs=[-0.25])
    at = EntryId(1, 1)
    return [
        Chunk("", (1,), 0, 0, at, logprobs=(likely,)),
        Chunk("Hello", (2, 3), 0, 1, at, logprobs=(likely, likely)),
        Chunk("!", (), 0, 3, at, finish_reason=FinishReason.STOP, stop_reason="!"),
    ]


def test_a_stream_has_an_event_for_each_token_and_ends_with_the_whole_text() -> None:
    events = [*stream_events(pieces(), input_length=4)]
    assert [(e["index"], e["token"]["id"], e["token"]["text"]) for e in events] == [
        (1, 1, ""),
        (2, 2, ""),
        (3, 3, "Hello!"),
    ]
    assert [e["generated_text"] for e in events] == [None, None, "Hello!"]
    assert events[0]["top_tokens"] == [{"id": 5, "text": "", "logprob": -0.25, "special": False}]
    assert events[2]["details"] == {
        "finish_reason": "stop_sequence",
        "generated_tokens": 3,
        "seed": None,
        "input_length": 4,
    }


def test_a_stream_without_a_token_and_one_that_began_anew_end_in_an_event() -> None:
    at = EntryId(1, 1)
    (event,) = stream_events([Chunk("", (), 0, 0, at, finish_reason=FinishReason.STOP)])
    assert (event["generated_text"], event["details"]["generated_tokens"]) == ("", 0)
    *_, last = stream_events([pieces()[0], Chunk("x", (9,), 0, 0, at, reset=True)])
    assert last["error_type"] == "incomplete_generation_stream"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("context_length_exceeded", (422, "validation")),
        ("store_unavailable", (429, "overloaded")),
        ("engine_error", (424, "generation")),
    ],
)
def test_errors_have_tgis_types(code: str, expected: tuple[int, str]) -> None:
    status, body = error_answer(ErrorInfo(code=code, message="sorry"))
    assert (status, body["error_type"], body["error"]) == (*expected, "sorry")


def test_an_adapter_is_passed_on() -> None:
    assert sampling(adapter_id="formal").adapter_id == "formal"
