"""The contract's own rules: errors, states, names of keys, and what a record refuses."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pkgutil
import re
from pathlib import Path

import pytest
from gristmill import schemas
from gristmill.schemas import errors, keys
from gristmill.schemas.errors import (
    BadInput,
    GristmillError,
    InvalidJson,
    InvalidRequest,
    Misconfigured,
    PayloadTooLarge,
    PromptTooLong,
    Transient,
)
from gristmill.schemas.events import EntryId, event_from_json
from gristmill.schemas.job import FINAL, NEXT, Job, JobState, Priority, new_job_id
from gristmill.schemas.result import FinishReason, Result, Timings
from gristmill.schemas.sampling import SamplingParams
from gristmill.schemas.settings import Settings, load_settings

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = [
    p for name in ("backends", "engine", "producer", "schemas", "worker") for p in (ROOT / name).rglob("*.py")
]
ERRORS = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, GristmillError)]
JOB = {"v": 1, "id": "job_1", "model": "m", "prompt": "p", "submitted_at": 1.0, "expires_at": 2.0}


# ---- errors


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [cls.code for cls in ERRORS]
    assert len(codes) == len(set(codes))
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in codes)


def test_the_drawn_tree_names_every_error() -> None:
    drawn = set(re.findall(r"\b([A-Z]\w+)", errors.__doc__ or ""))
    assert {cls.__name__ for cls in ERRORS} <= drawn


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_exit_codes_and_retries_follow_from_the_tree(cls: type[GristmillError]) -> None:
    expected = (
        (2, False) if issubclass(cls, BadInput) else (75, True) if issubclass(cls, Transient) else (1, False)
    )
    assert (cls.exit_code, cls.retryable) == expected


def test_messages_carry_the_numbers_and_the_next_step() -> None:
    too_long = PromptTooLong(prompt_tokens=9000, max_tokens=500, limit=8192)
    assert "9,000" in too_long.message
    assert "809" in too_long.message  # how many to cut
    assert "lower max_tokens to 192" in PromptTooLong(prompt_tokens=8000, max_tokens=500, limit=8192).message
    assert "10,485,760" in PayloadTooLarge(size_bytes=10 * 2**20, limit_bytes=1).message


# ---- states


def test_a_final_state_goes_nowhere_and_every_other_reaches_all_of_them() -> None:
    assert {state for state in JobState if state.final} == FINAL
    assert all(not NEXT[state] for state in FINAL)
    assert set(NEXT) == set(JobState)
    assert NEXT[JobState.QUEUED] == {JobState.RUNNING} | FINAL - {JobState.SUCCEEDED}
    assert NEXT[JobState.RUNNING] >= FINAL


def test_every_finish_reason_leads_to_a_final_state() -> None:
    assert {reason.state for reason in FinishReason} == FINAL


def test_classes_are_ordered_by_urgency() -> None:
    assert [p.rank for p in (Priority.INTERACTIVE, Priority.NORMAL, Priority.BATCH)] == [0, 1, 2]


# ---- jobs


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt_ids": (1,)}, "prompt_ids"),
        ({"expires_at": 1.0}, "request"),
        ({"id": "../x"}, "id"),
        ({"id": ""}, "id"),
        ({"id": "job_1.2.3"}, "id"),
        ({"model": ""}, "model"),
        ({"tenant": "a b"}, "tenant"),
        ({"priority": "urgent"}, "priority"),
        ({"stream": 1}, "stream"),
        ({"submitted_at": "1"}, "submitted_at"),
        ({"submitted_at": -1.0}, "submitted_at"),
        ({"expires_at": 1e300}, "expires_at"),
        ({"v": 2}, "v"),
        ({"sampling": {"max_tokens": 0}}, "sampling.max_tokens"),
        ({"sampling": {"max_tokens": True}}, "sampling.max_tokens"),
        ({"sampling": {"max_tokens": "5"}}, "sampling.max_tokens"),
        ({"sampling": {"max_tokens": 2**31}}, "sampling.max_tokens"),
        ({"sampling": {"min_tokens": 10**30}}, "sampling.min_tokens"),
        ({"sampling": {"top_k": 10**30}}, "sampling.top_k"),
        ({"sampling": {"stop_token_ids": [10**30]}}, "sampling.stop_token_ids.0"),
        ({"prompt": None, "prompt_ids": [10**30]}, "prompt_ids.0"),
        ({"sampling": {"temperature": -0.1}}, "sampling.temperature"),
        ({"sampling": {"top_p": 0.0}}, "sampling.top_p"),
        ({"sampling": {"top_p": 1.1}}, "sampling.top_p"),
        ({"sampling": {"seed": -1}}, "sampling.seed"),
        ({"sampling": {"stop": [""]}}, "sampling.stop.0"),
        ({"sampling": {"stop": ["x"] * 65}}, "sampling.stop"),
        ({"sampling": {"min_tokens": 5, "max_tokens": 4}}, "min_tokens"),
        ({"sampling": {"n": 3, "best_of": 2}}, "best_of"),
        ({"sampling": {"n": 2, "temperature": 0.0}}, "n"),
        ({"sampling": {"n": 129}}, "sampling.n"),
        ({"sampling": {"typical_p": 0.0}}, "sampling.typical_p"),
        ({"sampling": {"repetition_penalty": 0.0}}, "sampling.repetition_penalty"),
        ({"sampling": {"frequency_penalty": 2.1}}, "sampling.frequency_penalty"),
        ({"sampling": {"presence_penalty": -2.1}}, "sampling.presence_penalty"),
        ({"sampling": {"dry_base": 0.5}}, "sampling.dry_base"),
        ({"sampling": {"logit_bias": {"5": 101}}}, "sampling.logit_bias.5"),
        ({"sampling": {"logit_bias": {"x": 1}}}, "sampling.logit_bias.x.[key]"),
        ({"sampling": {"logit_bias": {"-1": 1}}}, "sampling.logit_bias.-1.[key]"),
        ({"sampling": {"allowed_token_ids": []}}, "sampling.allowed_token_ids"),
        ({"sampling": {"bad_words": [""]}}, "sampling.bad_words.0"),
        ({"sampling": {"logprobs": -1}}, "sampling.logprobs"),
        ({"sampling": {"truncate": 0}}, "sampling.truncate"),
        ({"sampling": {"temprature": 1.0}}, "sampling.temprature"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)
def test_a_bad_job_is_refused_and_the_field_named(change: dict[str, object], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Job.from_python(JOB | change)
    assert caught.value.param == param


def test_a_refusal_never_quotes_the_prompt() -> None:
    secret = "my secret prompt"
    with pytest.raises(InvalidRequest) as caught:
        Job.from_python(JOB | {"prompt": secret, "prompt_ids": [1], "model": ""})
    assert secret not in caught.value.message


def test_a_record_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Job.from_python(JOB).model = "other"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_seed_is_the_jobs_own_on_every_attempt() -> None:
    job = Job.from_python(JOB)
    assert job.seed == Job.from_json(job.to_json()).seed
    assert job.seed != job.model_copy(update={"id": "job_2"}).seed
    assert job.model_copy(update={"sampling": SamplingParams(seed=7)}).seed == 7


def test_new_ids_are_valid_different_and_sort_by_time() -> None:
    ids = [new_job_id() for _ in range(100)]
    assert len(set(ids)) == 100
    assert [i[:16] for i in ids] == sorted(i[:16] for i in ids)
    for job_id in ids:
        Job.from_python(JOB | {"id": job_id})


@pytest.mark.parametrize("state", ["succeeded", "failed"])
def test_a_failure_is_explained_and_a_success_is_not(state: str) -> None:
    timings = Timings(submitted_at=1.0, finished_at=2.0)
    body = {"job_id": "j", "model": "m", "state": state, "timings": timings}
    wrong = {"error": {"code": "c", "message": "m"}} if state == "succeeded" else {}
    with pytest.raises(InvalidRequest, match="error"):
        Result.from_python(body | wrong)


# ---- JSON


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff{}", "not UTF-8: byte 0xff at position 0"),
        (b'{"a": \xc3}', "not UTF-8"),
        (b"{", "not JSON"),
        (b'{"a": "b', "not JSON: Unterminated string starting at column 7"),
        (b"", "not JSON"),
        (b"nope", "not JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"-Infinity", "-Infinity is not a JSON number"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"id": ' + b"9" * 5000 + b"}", "an integer of more than 4,300 digits"),
    ],
)
def test_what_is_not_json_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(InvalidJson, match=re.escape(message)):
        Job.from_json(data)


@pytest.mark.parametrize("data", [b"[]", b"1", b'"x"', b"null"])
def test_json_that_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        Job.from_json(data)


def test_a_job_on_the_wire_leaves_defaults_out_and_says_its_version() -> None:
    assert json.loads(Job.from_python(JOB).to_json()) == JOB


@pytest.mark.parametrize("text", ["", "1", "-", "1-", "-1", "1-2-3", "a-1", "1-x", " 1-2", "1.0-2", "١-٢"])
def test_what_is_no_entry_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        EntryId.parse(text)


# ---- names


def test_keys_are_built_in_one_place() -> None:
    """A key that is spelled elsewhere is missed when the scheme changes, or the two sides disagree."""
    spelled = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in PRODUCT
        if path != ROOT / "schemas" / "keys.py"
        for node in ast.walk(without_docstrings(ast.parse(path.read_text())))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "gm:" in node.value
    }
    assert not spelled


def test_scripts_are_handed_their_keys() -> None:
    for path in (ROOT / "backends" / "lua").glob("*.lua"):
        code = "\n".join(line.split("--")[0] for line in path.read_text().splitlines())
        assert keys.PREFIX not in code, path.name


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [
                s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))
            ]
    return tree


def test_all_keys_have_our_prefix_and_those_of_a_job_one_slot() -> None:
    names = [
        keys.log("j.1"),
        keys.state("j.1"),
        keys.worker("w"),
        keys.control("m"),
        keys.MODELS,
        keys.WORKERS,
    ]
    assert all(name.startswith(keys.PREFIX) for name in names)
    assert len(set(names)) == len(names)
    assert {re.findall(r"\{(.*)\}", name)[0] for name in names[:2]} == {"j.1"}


def test_rows_of_a_batch_lie_together_in_the_store() -> None:
    assert keys.result_object("batch_1.7") == "results/batch_1/7.json"
    assert keys.result_object("job_1") == "results/job_1.json"


# ---- settings


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("broker_url", "amqp://x"),
        ("state_url", "http://x"),
        ("visibility_timeout_s", 10),
        ("result_ttl_s", 0),
        ("result_ttl_s", float("inf")),
        ("job_ttl_s", 1e300),
        ("broker_url", "embedded:"),
        ("tenant", "a b"),
    ],
)
def test_a_setting_that_cannot_work_is_named(setting: str, value: object) -> None:
    with pytest.raises(Misconfigured, match=rf"(?i){setting}"):
        load_settings(**{setting: value})


def test_settings_come_from_the_environment_and_hide_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRISTMILL_S3_SECRET_KEY", "hush")
    monkeypatch.setenv("GRISTMILL_RESULT_TTL_S", "30")
    settings = load_settings()
    assert settings.result_ttl_s == 30.0
    assert "hush" not in repr(settings)
    assert load_settings(result_ttl_s=40.0).result_ttl_s == 40.0


def test_defaults_need_no_settings_at_all(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert settings.broker == f"embedded:{tmp_path / 'embedded'}"
    assert settings.results == f"file://{tmp_path}/results"


# ---- the map


def test_the_readme_maps_every_module_and_its_examples_are_events() -> None:
    text = (ROOT / "schemas" / "README.md").read_text()
    for module in pkgutil.iter_modules(schemas.__path__):
        importlib.import_module(f"{schemas.__name__}.{module.name}")
        assert f"`{module.name}{'/' if module.ispkg else '.py'}`" in text
    examples = [found for found in re.findall(r'\{"kind".*\}', text) if "…" not in found]
    assert len(examples) >= 5
    for example in examples:
        assert event_from_json(example).to_json() == example
