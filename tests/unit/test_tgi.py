"""TGI's requests mean here what they mean there."""

from __future__ import annotations

from typing import Any

import pytest
from gristmill.schemas.errors import InvalidRequest, Unsupported
from gristmill.schemas.sampling import SamplingParams
from gristmill.schemas.tgi import parse_generate


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
        **alike, max_tokens=7, stop=("END",), echo=True, logprobs=4, prompt_logprobs=0
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


def test_what_is_missing_is_not_ignored() -> None:
    with pytest.raises(Unsupported) as caught:
        sampling(grammar="x")
    assert caught.value.param == "grammar"


def test_an_adapter_is_passed_on() -> None:
    assert sampling(adapter_id="formal").adapter_id == "formal"
