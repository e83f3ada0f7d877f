"""A schema travels from the client through the queue to the engine; back comes a document that fits it."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from gristmill.producer.cli import cli
from gristmill.producer.console import run_guarded
from gristmill.schemas.errors import JobFailed

from ..support.stack import Stack

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_a_schema_travels_with_a_job_and_a_bad_one_is_that_jobs_error(
    tiny_stack: Stack, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tiny_stack.worker()
    client = tiny_stack.client
    asked = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}
    free = client.submit("a", max_tokens=200, temperature=1.5, seed=1, response_format=asked)
    short = client.submit("a", max_tokens=30, temperature=1.5, seed=1, guided_json=PERSON)
    chosen = client.submit("a", max_tokens=9, guided_choice=["left", "right"])
    bad = client.submit("a", max_tokens=9, guided_json={"type": "thing"})
    tight = client.submit("a", max_tokens=3, guided_json=PERSON)
    called = client.submit(
        messages=[{"role": "user", "content": "Hi"}],
        tools=[{"type": "function", "function": {"name": "greet", "parameters": PERSON}}],
        tool_choice="required",
        truncate=100,
        max_tokens=300,
        temperature=1.5,
        seed=2,
    )

    for job in (free, short):
        jsonschema.validate(json.loads(job.result(timeout_s=120).text), PERSON)
    assert short.result().finish_reason == "length"
    assert short.result().choices[0].closed is True
    assert chosen.result(timeout_s=120).text in ("left", "right")
    assert chosen.result().usage.completion_tokens == len(chosen.result().text), "no end token was drawn"
    for job, word in ((bad, "Invalid type: thing"), (tight, "raise max_tokens")):
        with pytest.raises(JobFailed) as caught:
            job.result(timeout_s=120)
        assert word in caught.value.message
        failed = tiny_stack.result(job.id)
        assert failed is not None
        assert failed.error is not None
        assert failed.error.code == "invalid_schema"

    choice = called.result(timeout_s=120).choices[0]
    assert choice.tool_calls
    for call in choice.tool_calls:
        assert call.name == "greet"
        jsonschema.validate(json.loads(call.arguments), PERSON)
    assert [*called.stream()][-1].tool_calls == choice.tool_calls

    schema = tmp_path / "person.json"
    schema.write_text(json.dumps(PERSON))
    broker = ["--broker", tiny_stack.settings.broker_url, "--results", tiny_stack.settings.results_url]
    capfd.readouterr()
    job = ["a", "--max-tokens", "60", "--json-schema", str(schema), "--model", "m", "--wait"]
    assert run_guarded(cli, ["submit", *job, *broker]) == 0
    jsonschema.validate(json.loads(capfd.readouterr().out), PERSON)
