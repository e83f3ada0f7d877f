"""`gristmill` as a user types it: real processes, a real worker, the real model. One stack for all tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends.embedded import read_endpoint
from gristmill.schemas.settings import default_home

from ..support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
START_S = 120
ROWS = 16


@dataclass
class Shell:
    """A terminal of a user who set these variables."""

    home: Path
    env: dict[str, str]

    def start(self, *args: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "gristmill.producer.cli", *args],
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(
        self, *args: str, stdin: str | bytes = "", timeout_s: float = 90
    ) -> subprocess.CompletedProcess[Any]:
        text = isinstance(stdin, str)
        command = [sys.executable, "-P", "-m", "gristmill.producer.cli", *args]
        return subprocess.run(
            command, env=self.env, input=stdin, capture_output=True, text=text, timeout=timeout_s
        )

    def python(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *args], env=self.env, capture_output=True, text=True, timeout=90, cwd=ROOT
        )


def make_shell(home: Path, model: Path) -> Shell:
    """A fresh home, but for the native kernel: compiling it takes longer than all of these tests."""
    kernels = default_home() / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    (home / "kernels").symlink_to(kernels)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GRISTMILL_")}
    ours = {
        "GRISTMILL_BULK_WRITE_EVERY_S": "0.2",  # finished rows of a batch are seen so soon
        "GRISTMILL_HOME": str(home),
        "GRISTMILL_MODEL": str(model),
        "GRISTMILL_VISIBILITY_TIMEOUT_S": "3",  # what a killed worker held comes back after so long
        "GRISTMILL_LEASE_RENEW_EVERY_S": "1",
    }
    return Shell(home, clean | ours)


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gm-e2e-") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def up(home: Path, smollm2: Path) -> Iterator[Shell]:
    """A shell beside a running `gristmill up`."""
    shell = make_shell(home, smollm2)
    process = shell.start("up", "--model", str(smollm2), "--json", start_new_session=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"`up` ended: {process.communicate()[1][-3000:]}"
        ready = json.loads(line)
        assert ready["ready"]
        assert ready["model"] == "smollm2-135m"
        assert ready["broker_url"].startswith("redis://")
        yield shell
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130, err[-3000:]
        assert out == "", "words belong on stderr"
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(path: Path, count: int, **fields: Any) -> Path:
    lines = [
        {"custom_id": f"r{n}", "prompt": f"{n} plus {n} is", "max_tokens": 4} | fields for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# ---- jobs


def test_streamed_text_is_on_stdout_and_words_are_on_stderr(up: Shell) -> None:
    args = ("submit", "The capital of France is", "--max-tokens", "8", "--temperature", "0")
    streamed = up.run(*args, "--stream")
    waited = up.run(*args, "--wait")
    assert streamed.returncode == waited.returncode == 0, streamed.stderr + waited.stderr
    assert "Paris" in streamed.stdout
    assert streamed.stdout == waited.stdout
    assert "tokens" in streamed.stderr
    assert "tokens" not in streamed.stdout


def test_a_job_is_found_again_by_its_id(up: Shell) -> None:
    job_id = up.run("submit", "-", "--chat", "--max-tokens", "5", stdin="Say hello.").stdout.strip()
    assert up.run("result", job_id, "--wait", "--timeout-s", "60").returncode == 0
    whole = json.loads(up.run("result", job_id, "--json").stdout)
    assert (whole["job_id"], whole["state"]) == (job_id, "succeeded")
    assert whole["usage"]["completion_tokens"] <= 5
    status = json.loads(up.run("status", job_id, "--json").stdout)
    assert (status["state"], status["model"]) == ("succeeded", "smollm2-135m")
    pieces = [json.loads(line) for line in up.run("follow", job_id, "--json").stdout.splitlines()]
    assert "".join(p["text"] for p in pieces[:-1]) == whole["choices"][0]["text"]
    assert (pieces[-1]["kind"], pieces[-1]["state"]) == ("end", "succeeded")


def test_a_cancelled_job_ends_early_with_what_it_has(up: Shell) -> None:
    submitted = up.run("submit", "Once", "--max-tokens", "4000", "--ignore-eos", "--json")
    job_id = json.loads(submitted.stdout)["job_id"]
    wait_until(
        lambda: json.loads(up.run("status", job_id, "--json").stdout).get("tokens"), 60, "the job has tokens"
    )
    assert json.loads(up.run("cancel", job_id, "--json").stdout)["cancelling"]
    ended = up.run("result", job_id, "--wait", "--timeout-s", "30")
    assert ended.returncode == 2
    assert "[cancelled]" in ended.stderr
    assert ended.stdout.strip(), "the text so far"


@pytest.mark.parametrize("example", [["submit.py", "Who are you?"], ["async_stream.py", "One two three"]])
def test_the_examples_run(up: Shell, example: list[str]) -> None:
    done = up.python(str(ROOT / "examples" / example[0]), *example[1:])
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 5


def test_doctor_finds_everything_in_order(up: Shell) -> None:
    done = up.run("doctor", "--json")
    checks = {check["name"]: check for check in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, done.stdout
    assert checks["broker"]["data"]["round_trip_ms"] < 1000
    assert checks["workers"]["data"]["models"] == ["smollm2-135m"]
    assert checks["results"]["verdict"] == "ok"
    assert all(check["next_step"] for check in checks.values() if check["verdict"] != "ok")


def test_an_error_is_one_line_on_stderr(up: Shell) -> None:
    done = up.run("submit", "x", "--max-tokens", "900000", "--wait")
    assert (done.returncode, done.stdout) == (2, "")
    assert "[context_length_exceeded]" in done.stderr
    assert "Traceback" not in done.stderr


# ---- bulk


def test_a_file_comes_back_in_order_and_a_second_time_costs_nothing(up: Shell, tmp_path: Path) -> None:
    source, output = prompts(tmp_path / "in.jsonl", 10), tmp_path / "out.jsonl"
    with source.open("a") as file:
        file.write('{"custom_id": "long", "prompt": "x", "max_tokens": 900000}\n')
        file.write('{"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body":')
        file.write(' {"messages": [{"role": "user", "content": "Hi"}], "max_completion_tokens": 3}}\n')
    refused = up.run("run", str(source), "-o", str(output), "--json")
    assert (refused.returncode, output.exists()) == (2, False), "the token count of a row is looked at first"
    assert "line 11: " in refused.stderr
    args = ("run", str(source), "-o", str(output), "--on-invalid", "skip", "--json")
    first = up.run(*args)
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout)
    assert (summary["rows"], summary["succeeded"], summary["failed"], summary["resumed"]) == (12, 11, 1, 0)
    assert summary["completion_tokens"] > 20
    assert 0 < summary["generating_s"] < summary["seconds"]
    assert "tok/s since the first" in first.stderr
    assert [row["custom_id"] for row in rows(output)] == [*(f"r{n}" for n in range(10)), "c"]
    assert rows(output)[-1]["response"]["body"]["object"] == "chat.completion"
    (failed,) = rows(tmp_path / "out.errors.jsonl")
    assert failed["custom_id"] == "long"
    assert failed["response"]["body"]["error"]["code"] == "context_length_exceeded"

    before = output.read_bytes()
    second = json.loads(up.run(*args).stdout)
    assert (second["resumed"], second["succeeded"]) == (12, 11)
    assert output.read_bytes() == before


def test_a_pipe_works_in_both_directions(up: Shell) -> None:
    done = up.run("run", "-", "-o", "-", stdin='{"prompt": "One two three", "max_tokens": 2}\n')
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (row["custom_id"], row["response"]["status_code"]) == ("line-1", 200)


def test_invalid_lines_go_to_the_error_file_if_so_wished(up: Shell, tmp_path: Path) -> None:
    source, output = prompts(tmp_path / "in.jsonl", 2), tmp_path / "out.jsonl"
    with source.open("ab") as file:
        file.write(b'nonsense\n{"custom_id": "r0", "prompt": "again"}\n{"prompt": "caf\xe9"}\n')
    done = up.run("run", str(source), "-o", str(output), "--on-invalid", "skip")
    assert done.returncode == 0, done.stderr
    assert len(rows(output)) == 2
    errors = rows(tmp_path / "out.errors.jsonl")
    assert [row["custom_id"] for row in errors] == ["line-3", "r0", "line-5"]
    assert [row["response"]["body"]["error"]["code"] for row in errors] == [
        "invalid_json_line",
        "duplicate_custom_id",
        "invalid_json_line",
    ]


def finished(home: Path) -> dict[str, int]:
    """Finished rows of bulk runs, in the objects they came in, and when each was written."""
    return {
        row["id"]: path.stat().st_mtime_ns
        for path in home.glob("results/batches/run_*/results/*/*.jsonl")
        for row in map(json.loads, path.read_text().splitlines())
    }


def test_up_starts_a_killed_worker_again(up: Shell) -> None:
    """The job that ran meanwhile is continued, from where its journal ends."""
    job_id = up.run("submit", "Once", "--max-tokens", "200", "--ignore-eos").stdout.strip()
    running = wait_until(
        lambda: (status := json.loads(up.run("status", job_id, "--json").stdout)).get("tokens") and status,
        60,
        "the job has tokens",
    )
    os.kill(int(running["worker"].rsplit("-", 2)[1]), signal.SIGKILL)
    ended = json.loads(up.run("result", job_id, "--wait", "--json", timeout_s=170).stdout)
    assert (ended["state"], ended["usage"]["completion_tokens"]) == ("succeeded", 200)
    assert ended["attempts"] == 2


def test_a_job_outlives_the_embedded_broker(up: Shell) -> None:
    """Kill -9 of the supervisor takes Valkey with it; the worker starts both and writes what it kept."""
    job_id = up.run("submit", "Once", "--max-tokens", "200", "--ignore-eos").stdout.strip()
    wait_until(
        lambda: json.loads(up.run("status", job_id, "--json").stdout).get("tokens"), 60, "it has tokens"
    )
    endpoint = read_endpoint(up.home / "embedded")
    assert endpoint is not None
    os.kill(endpoint.supervisor_pid, signal.SIGKILL)
    wait_until(
        lambda: (now := read_endpoint(up.home / "embedded")) and now != endpoint and now.answers(),
        30,
        "the embedded broker is up again, and this test did not start it",
    )
    ended = json.loads(up.run("result", job_id, "--wait", "--json", timeout_s=60).stdout)
    assert (ended["state"], ended["usage"]["completion_tokens"]) == ("succeeded", 200)
    assert ended.get("attempts", 1) == 1, "the worker was there all along"


def test_a_stopped_run_goes_on_and_pays_for_no_finished_row(smollm2: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL, then stopped by Ctrl-C, then left alone."""
    with tempfile.TemporaryDirectory(prefix="gm-e2e-") as directory:
        shell = make_shell(Path(directory), smollm2)
        source, output = (
            prompts(tmp_path / "in.jsonl", ROWS, max_tokens=40, ignore_eos=True),
            tmp_path / "out.jsonl",
        )
        args = ("run", str(source), "-o", str(output), "--max-num-seqs", "4", "--json")

        _, _, killed = run_until_more_is_finished(shell, args, signal.SIGKILL)
        assert not output.exists()

        out, err, stopped = run_until_more_is_finished(shell, args, signal.SIGINT)
        assert "run the same command again to continue" in err
        assert not json.loads(out)["complete"]
        assert len(rows(output)) == len(stopped)
        assert stopped.items() >= killed.items(), "a finished row was run again"

        last = shell.run(*args, timeout_s=150)
        assert last.returncode == 0, last.stderr
        summary = json.loads(last.stdout)
        assert (summary["succeeded"], summary["resumed"]) == (ROWS, len(stopped))
        assert [row["custom_id"] for row in rows(output)] == [f"r{n}" for n in range(ROWS)]
        assert {row["response"]["body"]["usage"]["completion_tokens"] for row in rows(output)} == {40}
        assert finished(shell.home).items() >= stopped.items(), "a finished row was run again"


def run_until_more_is_finished(
    shell: Shell, args: tuple[str, ...], end: signal.Signals
) -> tuple[str, str, dict[str, int]]:
    """(stdout, stderr, finished rows) of a run that is ended as soon as another row is finished."""
    before = len(finished(shell.home))
    process = shell.start(*args)
    wait_until(lambda: len(finished(shell.home)) > before, START_S, "another row is finished")
    process.send_signal(end)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (130 if end is signal.SIGINT else -end), err
    wait_until(lambda: not workers_of(shell), 30, "worker and broker have ended")
    assert len(finished(shell.home)) < ROWS
    return out, err, finished(shell.home)


def workers_of(shell: Shell) -> list[int]:
    """Processes that were started with this shell's home."""
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if str(shell.home).encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found
