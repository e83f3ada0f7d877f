"""Jobs are checked before anything is sent; ids, models and errors follow from what was given."""

from __future__ import annotations

import math
from typing import Any

import pytest
from gristmill.producer import core
from gristmill.producer.core import Submission
from gristmill.schemas.errors import BadInput, InvalidRequest, JobFailed, ModelNotFound, PayloadTooLarge
from gristmill.schemas.grammar import CLOSE_FIELD, GRAMMAR_FIELDS
from gristmill.schemas.job import Job, JobState, Priority
from gristmill.schemas.result import ErrorInfo, Result, Timings
from gristmill.schemas.sampling import SamplingParams
from gristmill.schemas.settings import Settings, load_settings

SETTINGS = load_settings(model=None, broker_url="redis://:secret@queue:6379/0")


def build(settings: Settings = SETTINGS, *, sampling: dict[str, Any] | None = None, **given: Any) -> Job:
    return core.build_job(Submission(**given), "m", sampling or {}, settings, 1000.0)


def test_a_prompt_becomes_a_job_with_the_settings_defaults() -> None:
    job = build(prompt="hello", sampling={"max_tokens": 4, "stop": "x", "seed": None})
    assert (job.prompt, job.model, job.tenant, job.priority) == ("hello", "m", "default", Priority.NORMAL)
    assert (job.sampling.max_tokens, job.sampling.stop, job.sampling.seed) == (4, ("x",), None)
    assert job.expires_at == 1000.0 + SETTINGS.job_ttl_s
    assert build(prompt="hello").id != build(prompt="hello").id


def test_a_deadline_counts_from_submission_and_never_prolongs() -> None:
    assert build(prompt="a", deadline_s=2.5).expires_at == 1002.5
    assert build(prompt="a", deadline_s=1e12).expires_at == 1000.0 + SETTINGS.job_ttl_s
    for wrong in (0, -1, float("nan")):
        with pytest.raises(InvalidRequest, match="deadline_s"):
            build(prompt="a", deadline_s=wrong)


def test_an_idempotency_key_decides_the_id_within_a_tenant() -> None:
    first = build(prompt="a", idempotency_key="k")
    assert build(prompt="b", idempotency_key="k").id == first.id
    assert build(prompt="a", idempotency_key="k", tenant="other").id != first.id


@pytest.mark.parametrize(
    ("given", "sampling", "param"),
    [
        ({}, {}, "prompt"),
        ({"prompt": ""}, {}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, {}, "messages"),
        ({"prompt": "a"}, {"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"prompt": "a"}, {"n": 3, "best_of": 2}, "best_of"),
        ({"prompt": "a"}, {"n": 3, "temperature": 0}, "n"),
        ({"prompt": "a"}, {"max_tokens": 0}, "max_tokens"),
        ({"prompt": "a"}, {"max_token": 5}, "max_token"),
        ({"prompt": "a", "priority": "urgent"}, {}, "priority"),
        ({"prompt": "a", "tenant": "no spaces"}, {}, "tenant"),
        ({"messages": [{"role": "user"}]}, {}, "messages.0.content"),
    ],
)
def test_bad_input_names_its_field(given: Any, sampling: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build(sampling=sampling, **given)
    assert caught.value.param == param


ENDLESS: dict[str, Any] = {}
ENDLESS["self"] = ENDLESS
HI = [{"role": "user", "content": "hi"}]
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
STRANGE: list[Any] = [
    *(True, False, 0, -1, 5, 2**70, 0.5, math.nan, math.inf, 1j, b"x", "", "x", "2", "\x00", "\ud800"),
    *((), [], [1], ["x"], [""], [None], [[1]], [True], ["\ud800"], {1}, range(3), object(), int, len),
    *(
        {},
        {"a": 1},
        {"1": "x"},
        {None: 1},
        {(1, 2): 3},
        {"\ud800": 1},
        {1: math.nan},
        {-1: 1.0},
        {2**40: 1.0},
    ),
    *(ENDLESS, [ENDLESS], HI[0], [{}], [{"role": 1}], [{1: 2}], [{**HI[0], "name": ["a"]}]),
    *([{**HI[0], "content": value}] for value in (5, [5], [{"type": "text"}], [{"type": ["text"]}], {})),
    *([{**HI[0], "tool_calls": value}] for value in (5, [5], [{"id": 1}])),
    *([{"type": "function", "function": {**FUNCTION, "parameters": value}}] for value in (5, [], ENDLESS)),
    *([{"type": "function", "function": {**FUNCTION, "parameters": {"a": v}}}] for v in (math.nan, "\ud800")),
    *([{"type": "function", "function": value}] for value in (5, {"name": 5}, {"name": "f", "strict": "x"})),
    *({"type": "function", "function": value} for value in (5, {"name": 5}, {"name": "g"})),
    *({"type": "allowed_tools", "allowed_tools": value} for value in (5, {"mode": "auto", "tools": 5})),
    *({"type": "json_schema", "json_schema": value} for value in (5, {"schema": len}, {"schema": ENDLESS})),
    *({"type": "json", "value": value} for value in (len, ENDLESS, None)),
    *({"type": ["json"]}, {"kind": "regex", "text": 5}, {"kind": ["regex"], "text": "x"}),
    *({"json": len}, {"regex": 5}, {"choice": {"a"}}, {"json": {}, "regex": "x"}),
]
BESIDE: dict[str, dict[str, Any]] = {
    "prompt": {},
    "prompt_ids": {},
    "messages": {},
    "tools": {"messages": HI},
    "tool_choice": {"messages": HI, "tools": [{"type": "function", "function": FUNCTION}]},
    "parallel_tool_calls": {"messages": HI, "tools": [{"type": "function", "function": FUNCTION}]},
}


def made_or_refused(name: str, given: dict[str, Any], sampling: dict[str, Any]) -> BadInput | None:
    """None: a job that can be sent and read again. Else it is refused in a line that names the field."""
    try:
        job = core.draft_job(Submission(**given), sampling, SETTINGS, 1000.0)
    except BadInput as exc:
        refused = exc
    else:
        assert Job.from_json(job.to_json()).to_json() == job.to_json()
        return None
    param: str = getattr(refused, "param", "")
    assert param.partition(".")[0] in (name, "grammar" if name in GRAMMAR_FIELDS else name), refused.message
    assert refused.message.isprintable()
    assert len(refused.message) < 600
    return refused


@pytest.mark.parametrize("name", [*Submission.__dataclass_fields__])
def test_any_python_value_for_a_field_makes_a_job_or_is_refused_by_name(name: str) -> None:
    """metadata=True and deadline_s="" were bare TypeErrors."""
    beside = BESIDE.get(name, {"prompt": "hi"})
    assert any(made_or_refused(name, {**beside, name: value}, {}) for value in STRANGE)


@pytest.mark.parametrize("name", [*SamplingParams.model_fields, *GRAMMAR_FIELDS, CLOSE_FIELD, "nonsense"])
def test_any_python_value_for_a_sampling_wish_makes_a_job_or_is_refused_by_name(name: str) -> None:
    assert any(made_or_refused(name, {"prompt": "hi"}, {name: value}) for value in STRANGE)


@pytest.mark.parametrize("wrong", [5, ["m"], b"m"])
def test_a_model_or_a_job_id_that_is_no_string_is_refused_by_name(wrong: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"model is .*, not a string"):
        core.pick_model(wrong, {"m"}, SETTINGS)
    with pytest.raises(InvalidRequest, match=r"job_id is .*, not a string"):
        core.check_job_id(wrong)


def test_a_payload_over_the_limit_tells_both_numbers() -> None:
    with pytest.raises(PayloadTooLarge) as caught:
        core.check_payload(build(prompt="x" * 2000), 1000)
    assert caught.value.limit_bytes == 1000
    assert caught.value.size_bytes > 2000


def test_half_a_character_is_refused_rather_than_sent() -> None:
    with pytest.raises(InvalidRequest):
        core.check_payload(build(prompt="\ud800"), 1000)


def test_the_model_is_the_one_asked_for_or_the_only_one() -> None:
    assert core.pick_model("a", {"a", "b"}, SETTINGS) == "a"
    assert core.pick_model(None, {"a"}, SETTINGS) == "a"
    assert core.pick_model(None, {"a", "b"}, load_settings(model="b")) == "b"


@pytest.mark.parametrize(
    ("wanted", "known", "said"),
    [
        ("x", {"a", "b"}, "known models: a, b"),
        ("x", set[str](), "gristmill-worker run --model x"),
        (None, {"a", "b"}, "a, b"),
        (None, set[str](), "gristmill-worker run --model"),
    ],
)
def test_an_unknown_model_comes_with_the_next_step(wanted: str | None, known: set[str], said: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        core.pick_model(wanted, known, SETTINGS)
    assert said in caught.value.message
    assert "secret" not in caught.value.message


def test_the_next_step_for_an_embedded_broker_is_up() -> None:
    assert core.start_command("m", load_settings(broker_url="embedded:/x")) == "gristmill up --model m"


@pytest.mark.parametrize("model", ["a\nb\x1b[31m", "x" * 5000, "my model; rm -rf"])
def test_a_strange_model_name_stays_in_its_line_and_in_its_quotes(model: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        core.pick_model(model, {"m"}, SETTINGS)
    message = caught.value.message
    assert message.isprintable()
    assert len(message) < 500
    assert f"--model {model}" not in message


def test_a_result_that_did_not_succeed_is_raised_with_its_own_code() -> None:
    timings = Timings(submitted_at=1.0, finished_at=2.0)
    error = ErrorInfo(code="context_length_exceeded", message="too long")
    failed = Result(job_id="j", model="m", state=JobState.FAILED, timings=timings, error=error)
    with pytest.raises(JobFailed) as caught:
        core.raise_unless_succeeded(failed)
    assert caught.value.job_error_code == "context_length_exceeded"
    cancelled = Result(job_id="j", model="m", state=JobState.CANCELLED, timings=timings)
    with pytest.raises(JobFailed) as caught:
        core.raise_unless_succeeded(cancelled)
    assert caught.value.job_error_code == "cancelled"


@pytest.mark.parametrize("job_id", ["", "../../etc/passwd", "a b", "x" * 80, "job_1\n", "a.b"])
def test_what_is_no_job_id_reaches_no_key(job_id: str) -> None:
    with pytest.raises(InvalidRequest):
        core.check_job_id(job_id)
