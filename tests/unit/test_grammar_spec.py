"""All the names under which requests ask for a format of their output become one GrammarSpec."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from gristmill.producer.core import Submission, build_job, sampling_params
from gristmill.schemas.batch_lines import parse_line
from gristmill.schemas.errors import BadInput, InvalidRequest, InvalidSchema, Unsupported
from gristmill.schemas.grammar import MAX_GRAMMAR_CHARS, GrammarSpec, with_grammar
from gristmill.schemas.openai import parse_chat, response_body
from gristmill.schemas.result import Choice, FinishReason, JobState, Result, Timings
from gristmill.schemas.sampling import SamplingParams
from gristmill.schemas.settings import Settings
from pydantic import BaseModel

SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
AS_SCHEMA = GrammarSpec(kind="json_schema", text=json.dumps(SCHEMA))
ASKED: list[tuple[dict[str, Any], GrammarSpec | None]] = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, GrammarSpec(kind="json_object")),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, AS_SCHEMA),
    ({"grammar": {"type": "json", "value": SCHEMA}}, AS_SCHEMA),
    ({"grammar": {"type": "json_object", "value": SCHEMA}}, AS_SCHEMA),
    ({"grammar": {"type": "regex", "value": "a+"}}, GrammarSpec(kind="regex", text="a+")),
    ({"grammar": {"type": "lark", "value": "start: /a/"}}, GrammarSpec(kind="lark", text="start: /a/")),
    ({"grammar": AS_SCHEMA}, AS_SCHEMA),
    ({"guided_json": SCHEMA}, AS_SCHEMA),
    ({"guided_json": json.dumps(SCHEMA)}, AS_SCHEMA),
    ({"guided_regex": "a+"}, GrammarSpec(kind="regex", text="a+")),
    ({"guided_choice": ["x", "ü"]}, GrammarSpec(kind="choice", text='["x", "ü"]')),
    ({"guided_grammar": 'root ::= "a"'}, GrammarSpec(kind="gbnf", text='root ::= "a"')),
    ({"guided_grammar": 'start: "a"'}, GrammarSpec(kind="lark", text='start: "a"')),
    ({"structured_outputs": {"choice": ["x"], "json": None}}, GrammarSpec(kind="choice", text='["x"]')),
    ({"guided_regex": "a+", "json_close": False}, GrammarSpec(kind="regex", text="a+", close=False)),
    ({"guided_regex": None, "response_format": None}, None),
]


@pytest.mark.parametrize(("fields", "spec"), ASKED)
def test_every_way_to_ask_means_the_same_to_everybody(
    fields: dict[str, Any], spec: GrammarSpec | None
) -> None:
    assert sampling_params(fields).grammar == spec
    plain = {name: value for name, value in fields.items() if value is not AS_SCHEMA}
    if plain:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], **plain}
        assert parse_chat(body).sampling.grammar == spec
        line = json.dumps({"prompt": "x", **plain}).encode()
        assert parse_line(line, 1).request.sampling.grammar == spec


def test_a_pydantic_model_is_its_schema() -> None:
    class Person(BaseModel):
        name: str

    spec = sampling_params({"response_format": Person}).grammar
    assert spec is not None
    assert json.loads(spec.text) == Person.model_json_schema()


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"guided_regex": "a", "guided_json": {}}, InvalidRequest),
        ({"response_format": {"type": "json_schema"}}, InvalidRequest),
        ({"response_format": {"type": "xml"}}, Unsupported),
        ({"response_format": "json"}, InvalidRequest),
        ({"structured_outputs": {"structural_tag": {}}}, Unsupported),
        ({"grammar": {"type": "peg", "value": ""}}, InvalidRequest),
        ({"guided_choice": "yes"}, InvalidSchema),
        ({"guided_regex": 5}, InvalidSchema),
        ({"guided_regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, InvalidSchema),
    ],
)
def test_what_cannot_be_meant_is_refused(fields: dict[str, Any], error: type[InvalidRequest]) -> None:
    with pytest.raises(error) as caught:
        with_grammar(fields)
    assert (caught.value.param or "").split(".")[0] in fields


def test_a_lines_own_format_goes_before_the_files() -> None:
    default = {"response_format": {"type": "json_object"}}
    own = parse_line(b'{"prompt": "x", "guided_regex": "a"}', 1, default).request.sampling.grammar
    other = parse_line(b'{"prompt": "x"}', 1, default).request.sampling.grammar
    assert own == GrammarSpec(kind="regex", text="a")
    assert other == GrammarSpec(kind="json_object")


def test_a_spec_survives_the_wire() -> None:
    params = SamplingParams(grammar=AS_SCHEMA)
    assert SamplingParams.from_json(params.to_json()) == params


def test_an_answer_says_that_it_was_closed() -> None:
    result = Result(
        job_id="j",
        model="m",
        state=JobState.SUCCEEDED,
        choices=(Choice(text="{}", finish_reason=FinishReason.LENGTH, closed=True),),
        timings=Timings(submitted_at=1, finished_at=2),
    )
    assert response_body(result)["choices"][0]["closed"] is True


def _nested(levels: int) -> Any:
    value: Any = {}
    for _ in range(levels):
        value = [value]
    return value


def _circle() -> Any:
    value: dict[str, Any] = {}
    value["properties"] = value
    return value


@pytest.mark.parametrize("value", [object(), {"a": {1, 2}}, {"a": float("nan")}, _nested(50_000), _circle()])
def test_a_schema_that_is_no_json_is_a_bad_request_under_every_name(value: Any) -> None:
    asked = (
        {"guided_json": value},
        {"grammar": {"type": "json", "value": value}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": value}}},
        {"structured_outputs": {"json": value}},
        {"guided_choice": ["a", value]},
    )
    for fields in asked:
        with pytest.raises(InvalidSchema) as caught:
            with_grammar(fields)
        assert caught.value.param in fields
        assert len(caught.value.message) < 300


def test_a_line_that_nests_as_deep_as_json_is_read_is_that_lines_error() -> None:
    for levels in range(850, 1_000, 10):
        schema = '{"items":' * levels + "{}" + "}" * levels
        with contextlib.suppress(BadInput):
            parse_line(f'{{"prompt": "x", "guided_json": {schema}}}'.encode(), 1)


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "bad_words", "allowed_token_ids"])
def test_a_list_of_wishes_that_is_no_list_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest, match=name):
        sampling_params({name: float("nan")})


def test_an_idempotency_key_that_is_no_unicode_is_a_bad_request() -> None:
    with pytest.raises(InvalidRequest):
        build_job(Submission(prompt="x", idempotency_key="\ud800"), "m", {}, Settings(), 1.0)
