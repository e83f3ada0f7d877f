"""The tools that break engines and workers for other tests do break them, and say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from gristmill.engine.messages import Failed, Request, Step
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.process import EngineProcess
from gristmill.engine.settings import EngineSettings

from ..support.faults import DIRECTORY, fault_env, poison

POISON = 77


@pytest.fixture
def settings(tmp_path: Path) -> EngineSettings:
    model = write_tiny(tmp_path / "model")
    return EngineSettings(model=str(model), dtype="float32", num_threads=1, max_num_seqs=4)


def set_all(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def run(engine: EngineProcess, request_id: str, *prompt_ids: int) -> Step | Failed:
    """The first report that has something to say of the request."""
    engine.add([Request(id=request_id, prompt_ids=list(prompt_ids), max_tokens=1)])
    while True:
        report = engine.recv(30)
        assert report is not None, "the engine says nothing"
        if isinstance(report, Failed) or report.outputs:
            return report


@pytest.mark.parametrize(("how", "says"), [("kill", "SIGKILL"), ("raise", "poisoned")])
def test_a_poisoned_token_ends_the_engine_that_is_fed_it_as_often_as_asked(
    how: str, says: str, settings: EngineSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "notes"
    set_all(monkeypatch, poison(POISON, how, times=1, notes=notes))
    with EngineProcess(settings) as engine:
        engine.wait_ready(60)
        assert isinstance(run(engine, "innocent", 1, 2, 3), Step)
        assert not notes.exists()
        report = run(engine, "poisoned", 1, POISON, 3)
        assert isinstance(report, Failed)
        assert says in report.message
        assert notes.read_text() == f"{engine.pid} {how}\n"
    if how == "kill":
        with EngineProcess(settings) as engine:
            engine.wait_ready(60)
            assert isinstance(run(engine, "poisoned", 1, POISON, 3), Step)


def test_wrapping_what_is_not_there_ends_the_process() -> None:
    code = "import sitecustomize; sitecustomize.wrap('wave:Wave_read.rewound', lambda f: f)\n"
    code += "import sys; sys.meta_path.insert(0, sitecustomize._Finder())\nimport wave"
    env = fault_env()
    assert env["PYTHONPATH"].startswith(str(DIRECTORY))
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert ended.returncode == 70
    assert "wave:Wave_read.rewound" in ended.stderr
