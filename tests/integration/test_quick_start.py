"""An engine whose torch has been imported in part: the same tokens, and the whole of torch for who asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Request, Step
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.process import EngineProcess
from gristmill.engine.settings import EngineSettings
from gristmill.engine.spawn import begin_early

from ..support.engines import READY_S, tiny_settings
from ..support.waiting import wait_until

OURS = ("aten::", "mkldnn::", "onednn::", "prims::", "quantized::")

PROBE = """
import json, sys
from gristmill.engine import quick_torch
quick_torch.begin()
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Request
from gristmill.engine.settings import EngineSettings

def kernels(key):
    return sorted(torch._C._dispatch_get_registrations_for_dispatch_key(key))

import torch
engine = Engine(EngineSettings.model_validate_json(sys.argv[1]))
engine.add(Request(id="a", prompt_ids=[5, 6, 7], max_tokens=12, temperature=1.0, top_p=0.9, seed=3))
tokens = [t for _ in range(12) if engine.has_work for output in engine.step() for t in output.token_ids]
left_out, cpu = quick_torch.left_out(), kernels("CPU")
found = {"tokens": tokens, "left_out": left_out, "cpu": cpu, "looked": torch.optim.SGD.__name__}
print(json.dumps({**found, "still": quick_torch.left_out(), "meta": kernels("Meta")}))
"""

ASIDE = """
import json, os, sys
from gristmill.engine.priority import step_aside
from gristmill.engine.process import EngineProcess
from gristmill.engine.settings import EngineSettings
from gristmill.engine.spawn import begin_early

step_aside()
if sys.argv[2:]:
    begin_early()
with EngineProcess(EngineSettings.model_validate_json(sys.argv[1])) as engine:
    engine.wait_ready(180)
    threads = [os.sched_getscheduler(int(thread)) for thread in os.listdir(f"/proc/{engine.pid}/task")]
print(json.dumps([os.sched_getscheduler(0), threads]))
"""

ODD = """
import sys

class Odd:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.signal" and type(sys.modules["torch.optim"]).__name__ == "_Later":
            raise ImportError("this torch wants its parts")

sys.meta_path.insert(0, Odd())
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return tiny_settings(write_tiny(tmp_path_factory.mktemp("tiny")))


def kernels(key: str) -> set[str]:
    found = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name for name in found if name.startswith(OURS)}


def test_a_step_looks_into_nothing_that_was_left_out_and_makes_the_same_tokens(
    settings: EngineSettings,
) -> None:
    run = [sys.executable, "-P", "-c", PROBE, settings.model_dump_json()]
    found = json.loads(subprocess.run(run, check=True, capture_output=True, timeout=READY_S).stdout)
    assert "torch._meta_registrations" in found["left_out"]
    assert "torch.export" in found["left_out"]

    engine = Engine(settings)
    engine.add(Request(id="a", prompt_ids=[5, 6, 7], max_tokens=12, temperature=1.0, top_p=0.9, seed=3))
    tokens = [t for _ in range(12) if engine.has_work for output in engine.step() for t in output.token_ids]
    assert found["tokens"] == tokens

    assert kernels("CPU") <= set(found["cpu"]), "a kernel on numbers was left out"
    assert (found["looked"], found["still"]) == ("SGD", []), "who looks into one part gets them all"
    assert kernels("Meta") <= set(found["meta"]), "an operator was forgotten for good"


def test_a_torch_that_cannot_be_read_in_parts_is_read_whole_by_a_new_start(
    settings: EngineSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "sitecustomize.py").write_text(ODD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with EngineProcess(settings) as engine:
        pid = engine.pid
        engine.wait_ready(READY_S)
        engine.add([Request(id="a", prompt_ids=[5], max_tokens=1, ignore_eos=True)])
        report = engine.recv(READY_S)
        assert isinstance(report, Step)
        assert engine.pid == pid
    assert "engine.whole_torch" in capfd.readouterr().err


def test_an_engine_begun_early_is_the_next_one(settings: EngineSettings) -> None:
    pid = begin_early()
    with EngineProcess(settings) as engine:
        assert engine.pid == pid
        engine.wait_ready(READY_S)
        engine.add([Request(id="a", prompt_ids=[5], max_tokens=1, ignore_eos=True)])
        assert isinstance(engine.recv(READY_S), Step)


def test_what_was_begun_otherwise_than_it_is_wanted_ends(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wanted, name in (
        (settings, "GRISTMILL_TEST_OTHER"),
        (settings.model_copy(update={"quick_start": False}), ""),
    ):
        pid = begin_early()
        if name:
            monkeypatch.setenv(name, "1")
        with EngineProcess(wanted) as engine:
            assert engine.pid != pid
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_what_nobody_wants_ends_with_who_began_it() -> None:
    code = "from gristmill.engine.spawn import begin_early; print(begin_early())"
    said = subprocess.run(
        [sys.executable, "-P", "-c", code], check=True, capture_output=True, timeout=READY_S
    )
    wait_until(lambda: ended(int(said.stdout)), READY_S, "it ended")
    assert b"Traceback" not in said.stderr, "quietly, whatever torch warns of"


def ended(pid: int) -> bool:
    """Gone, or waiting for whoever inherited it to see that it is."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux")
@pytest.mark.parametrize("early", [False, True])
def test_a_consumer_that_steps_aside_does_not_take_its_engine_along(
    settings: EngineSettings, *, early: bool
) -> None:
    found = subprocess.run(
        [sys.executable, "-c", ASIDE, settings.model_dump_json(), *["early"] * early],
        stdout=subprocess.PIPE,
        check=True,
    )
    consumer, threads = json.loads(found.stdout)
    assert consumer == os.SCHED_BATCH
    assert len(threads) > 1
    assert set(threads) == {os.SCHED_OTHER}
