"""What goes wrong on the command line: one line with its code on stderr, nothing on stdout, an exit code.

In this process, for speed; ``tests/e2e`` runs the same command line as a user does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gristmill.backends.state import State
from gristmill.producer.console import Interrupts
from gristmill.schemas.result import FinishReason

from ..support.command_line import Run
from ..support.journal import Attempt, make_job


@pytest.mark.parametrize(
    ("args", "code", "word"),
    [
        (("submit", "x", "--model", "nope"), 2, "[model_not_found]"),
        (("submit", "x", "--max-tokens", "0"), 2, "[invalid_request]"),
        (("submit", ""), 2, "[invalid_request]"),
        (("submit", "x", "--wait", "--timeout-s", "0.05"), 75, "[wait_timeout]"),
        (("status", "job_nobody"), 2, "[job_not_found]"),
        (("follow", "job_nobody"), 2, "[job_not_found]"),
        (("result", "job_nobody"), 2, "[job_not_found]"),
        (("cancel", "job_nobody"), 2, "[job_not_found]"),
        (("result", "no such id"), 2, "[invalid_request]"),
        (("submit", "x", "--broker", "redis://127.0.0.1:1/0"), 75, "[broker_unavailable]"),
        (("submit", "x", "--broker", "http://example.com"), 2, "[misconfigured]"),
        (("status", "job_x", "--results", "ftp://example.com"), 2, "[misconfigured]"),
        (("models", "path", "Qwen/Nothing-0B"), 2, "[model_not_found]"),
        (("submit",), 2, "Missing argument"),
        (("submti",), 2, "No such command"),
    ],
)
def test_an_error_is_one_line_with_its_code(run: Run, args: tuple[str, ...], code: int, word: str) -> None:
    exit_code, out, err = run(*args)
    assert (exit_code, out) == (code, "")
    assert word in err
    assert "Traceback" not in err


def test_debug_shows_the_trace(run: Run) -> None:
    assert "Traceback" in run("submit", "x", "--model", "nope", "--debug")[2]


def test_a_bug_of_ours_is_an_internal_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gristmill.producer.commands_jobs.Client", None)
    code, out, err = run("status", "job_x")
    assert (code, out) == (1, "")
    assert "[internal_error]" in err
    assert "--debug" in err


def test_a_ten_megabyte_prompt_is_refused_with_numbers(run: Run) -> None:
    code, out, err = run("submit", "-", stdin=b"x" * 10_000_000)
    assert (code, out) == (2, "")
    assert "10,000," in err
    assert "[payload_too_large]" in err


def test_stdin_that_is_not_utf8_is_refused(run: Run) -> None:
    code, _, err = run("submit", "-", stdin=b"caf\xe9")
    assert code == 2
    assert "0xe9" in err


def test_a_job_with_nobody_to_run_it_is_accepted_with_a_warning(run: Run, state: State) -> None:
    state.unregister("w1")
    code, out, err = run("submit", "x", "--json")
    assert code == 0
    sent = json.loads(out)
    assert sent["job_id"].startswith("job_")
    assert "no worker for tiny" in sent["warnings"][0]
    assert "warning" in err
    assert run("result", sent["job_id"])[0] == 75


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.EXPIRED])
def test_the_text_of_a_job_that_was_stopped_is_its_result(
    run: Run, state: State, reason: FinishReason
) -> None:
    job = make_job()
    state.submit(job)
    attempt = Attempt.begin(state, job)
    attempt.write("half ", "a story")
    attempt.finish(reason=reason)
    code, out, err = run("result", job.id)
    assert (code, out) == (2, "half a story\n")
    assert f"[{attempt.result(reason).state}]" in err


# ---- bulk


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"prompt": "a", "model": "tiny"}\nnonsense\n'
        b'{"custom_id": "line-1", "prompt": "again"}\n{"prompt": "caf\xe9"}\n'
    )
    return path


def test_invalid_lines_are_named_and_nothing_runs(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("run", source, "-o", tmp_path / "out.jsonl")
    assert (code, out) == (2, "")
    for word in (
        "line 2: ",
        "[invalid_json_line]",
        "line 3: ",
        "[duplicate_custom_id]",
        "line 4: ",
        "nothing ran",
    ):
        assert word in err
    assert not (tmp_path / "out.jsonl").exists()
    code, out, _ = run("run", source, "-o", tmp_path / "out.jsonl", "--json")
    *told, last = map(json.loads, out.splitlines())
    assert [each["line"] for each in told] == [2, 3, 4]
    assert (last["complete"], last["rows"], last["invalid"]) == (False, 4, 3)


def test_what_cannot_work_is_said_before_any_work(run: Run, source: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "a"}\n')
    output = tmp_path / "out.jsonl"
    for args, code in (
        ((empty, "-o", output), "empty_file"),
        ((tmp_path / "gone", "-o", output), "bad_input"),
        ((tmp_path, "-o", output), "bad_input"),
        ((good, "-o", tmp_path / "no" / "dir" / "o"), "misconfigured"),
        ((good, "-o", good), "misconfigured"),
        ((good, "-o", output, "--errors", good), "misconfigured"),
        ((good, "-o", "/proc/o"), "misconfigured"),
        ((good, "-o", tmp_path), "misconfigured"),
        ((good, "-o", output, "--model", "nope"), "model_not_found"),
        ((good, "-o", output, "--results", "file:///gone/away"), "misconfigured"),
        ((good, "-o", "-", "--json"), "bad_input"),
        ((good, "-o", output, "--broker", "redis://127.0.0.1:1"), "broker_unavailable"),
    ):
        exit_code, out, err = run("run", *args)
        assert (exit_code, out) == (75 if code == "broker_unavailable" else 2, ""), err
        assert f"[{code}]" in err
    assert not output.exists()


def test_a_line_for_another_model_is_an_invalid_line(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n{"prompt": "a", "model": "gpt-5"}\n')
    code, _, err = run("run", source, "-o", tmp_path / "out.jsonl", "--model", "tiny")
    assert code == 2
    assert "line 2: " in err
    assert "[model_not_found]" in err


@pytest.mark.parametrize(
    ("redirection", "code", "words"),
    [
        (">/dev/full", 2, "error: No space left on device; mend that and try again [misconfigured]\n"),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
    ],
)
def test_a_stdout_that_takes_nothing_is_no_bug_of_ours(redirection: str, code: int, words: str) -> None:
    command = f"{sys.executable} -P -m gristmill.producer.cli --version {redirection}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=30)
    assert (ended.returncode, ended.stderr) == (code, words)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-P", "-m", "gristmill.producer.cli", "--version"]
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=30)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(("before", "stops"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closing_terminal_stops_a_command_once_and_not_under_nohup(
    before: signal.Handlers, stops: bool
) -> None:
    """It sends SIGHUP by itself and through its shell; the second one must not cut the first one short."""
    killed: list[bool] = []
    old = signal.signal(signal.SIGHUP, before)
    try:
        with Interrupts(lambda: killed.append(True)) as interrupts:
            for _ in range(2):
                signal.raise_signal(signal.SIGHUP)
                assert interrupts.stopping is stops
        assert signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, old)
    assert not killed


def test_words_that_nobody_can_read_stop_nothing() -> None:
    command = (
        f"{sys.executable} -P -m gristmill.producer.cli submit x --broker redis://127.0.0.1:1 2>/dev/full"
    )
    assert subprocess.run(["bash", "-c", command], timeout=30).returncode == 75
