"""A bulk input is checked whole: every bad line has its code and its number, and nothing else is harmed."""

from __future__ import annotations

import io
import json

import pytest
from gristmill.producer.bulk_input import MAX_REPORTED, Checked, Rules, check
from gristmill.schemas.settings import load_settings

GOOD = b'{"prompt": "hello"}\n'
SETTINGS = load_settings(max_payload_bytes=100_000)


def checked(data: bytes, *models: str) -> Checked:
    return check(io.BytesIO(data), Rules(SETTINGS, frozenset(models) if models else None))


def batch_line(custom_id: object = "a", **fields: object) -> bytes:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body} | fields
    return json.dumps(line).encode() + b"\n"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"nonsense\n", "invalid_json_line"),
        (b'{"prompt": "caf\xe9"}\n', "invalid_json_line"),
        (b'{"prompt": "hi", "max_tokns": 3}\n', "invalid_request"),
        (b'{"prompt": "hi", "max_tokens": 0}\n', "invalid_request"),
        (b'{"prompt": ""}\n', "invalid_request"),
        (b'"hello"\n', "invalid_request"),
        (batch_line(method="GET"), "invalid_method"),
        (batch_line(url="/v1/embeddings"), "url_mismatch"),
        (batch_line(custom_id=None), "invalid_request"),
        (b'{"custom_id": "x", "method": "POST", "url": "/v1/completions"}\n', "missing_required_parameter"),
        (batch_line(body={"prompt": "x"}), "missing_required_parameter"),
        (
            batch_line(body={"messages": [{"role": "user", "content": "hi"}], "modalities": ["audio"]}),
            "unsupported",
        ),
        (b'{"prompt": "' + b"x" * 150_000 + b'"}\n', "payload_too_large"),
        (b'{"prompt": "' + b"x" * 10_000_000 + b'"}\n', "payload_too_large"),
        (b'{"prompt": "hi", "model": "other"}\n', "model_not_found"),
    ],
)
def test_a_bad_line_has_its_code_and_its_number(line: bytes, code: str) -> None:
    found = checked(GOOD + b"\n" + line + GOOD, "mine")
    assert [(error.line, error.error.code) for error in found.errors] == [(3, code)]
    assert (found.rows, found.invalid) == (2, 1)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "a", "max_tokns": 3}, "unknown field 'max_tokns'; did you mean 'max_tokens'?"),
        ({"prompts": "a"}, "unknown field 'prompts'; did you mean 'prompt'?"),
        ({"prompt": "a", "x": 1}, "unknown field 'x'; remove it"),
        ({"prompt": "a", "x": 1, "y": 2}, "unknown field 'x'; remove it (and 1 more problem)"),
        ({"prompt": "a", "x": 1, "y": 2, "z": 3}, "unknown field 'x'; remove it (and 2 more problems)"),
        (
            {"inputs": "a", "parameters": {"max_new_tokens": 3}},
            "inputs and parameters are TGI's form; write prompt, and beside it max_tokens and the like",
        ),
    ],
)
def test_an_unknown_field_is_told_with_the_one_that_was_meant(line: dict[str, object], words: str) -> None:
    (error,) = checked(json.dumps(line).encode()).errors
    assert error.error.message == words


def test_a_custom_id_that_comes_twice_is_an_error_of_the_second_line() -> None:
    found = checked(batch_line("a") + batch_line("b") + batch_line("a"))
    assert [(error.line, error.error.code, error.custom_id) for error in found.errors] == [
        (3, "duplicate_custom_id", "a")
    ]
    assert "line 1" in found.errors[0].error.message
    assert found.duplicates == {3}


def test_bare_lines_never_collide_with_each_other() -> None:
    assert checked(GOOD * 3).rows == 3


def test_rows_that_name_different_models_are_caught() -> None:
    found = checked(b'{"prompt": "a"}\n{"prompt": "b", "model": "m"}\n{"prompt": "c", "model": "n"}\n')
    assert found.model == "m"
    assert [(error.line, error.error.code) for error in found.errors] == [(3, "model_not_found")]


def test_an_empty_input_has_neither_rows_nor_errors() -> None:
    for data in (b"", b"\n\n  \n"):
        found = checked(data)
        assert (found.rows, found.invalid) == (0, 0)


def test_many_bad_lines_are_counted_and_the_first_ones_shown() -> None:
    found = checked(b"bad\n" * 500 + GOOD)
    assert (found.invalid, len(found.errors), found.rows) == (500, MAX_REPORTED, 1)
    assert found.errors[-1].line == MAX_REPORTED


def test_a_byte_order_mark_and_windows_line_ends_are_no_error() -> None:
    found = checked(b'\xef\xbb\xbf{"prompt": "hello"}\r\n{"prompt": "last line without newline"}')
    assert (found.rows, found.invalid) == (2, 0)


def test_the_digest_is_that_of_the_whole_content() -> None:
    assert checked(GOOD).digest == checked(GOOD).digest
    assert checked(GOOD).digest != checked(GOOD + b"\n").digest


def test_an_error_line_keeps_the_custom_id_its_line_claims() -> None:
    found = checked(batch_line("mine", method="GET") + b"broken\n")
    assert [error.custom_id for error in found.errors] == ["mine", "line-2"]
