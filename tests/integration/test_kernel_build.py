"""The kernel cache: built once however many start together, and nothing half-built is ever loaded."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gristmill.engine.native import build as building
from gristmill.engine.native.build import BuildFailed, build, find_compiler
from gristmill.engine.native.library import load
from gristmill.producer.doctor import _compiler

needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

SMALL = "sampling"
"""The library that compiles in a third of the other one's time."""
BUILD_S = 300
"""Ten times what three starts and a build take on two cores with nothing else to do."""
START = """
import sys, logging, numpy, torch
from pathlib import Path
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
from gristmill.engine.native.sampling import load_sampling
greedy = numpy.zeros((1, 3)), numpy.zeros(1, numpy.int64), numpy.zeros((1, 2), numpy.uint32)
print("tokens", load_sampling(Path(sys.argv[1]), 1).sample(torch.eye(20)[7:8].clone(), *greedy))
"""


@needs_compiler
def test_processes_that_start_together_build_once_and_all_load(tmp_path: Path) -> None:
    cache = tmp_path / "kernels"
    started = [
        subprocess.Popen([sys.executable, "-c", START, str(cache)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=BUILD_S)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert all("tokens [7]" in output for output in outputs)
    assert sum("kernel.compiling" in output for output in outputs) == 1
    assert sum("kernel.built" in output for output in outputs) == 1
    assert len(list(cache.glob("*.so"))) == 1
    assert not list(cache.glob("build-*")), "a working directory was left behind"


@needs_compiler
def test_a_builder_that_dies_leaves_the_lock_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken compiler fails the first; its lock and its rubbish do not hinder the second."""
    broken = tmp_path / "bin"
    broken.mkdir()
    compiler = broken / "g++"
    compiler.write_text("#!/bin/sh\necho 'no space left' >&2; exit 1\n")
    compiler.chmod(0o755)
    cache = tmp_path / "kernels"
    with monkeypatch.context() as patched:
        patched.setenv("PATH", f"{broken}:{os.environ['PATH']}")
        with pytest.raises(BuildFailed, match="no space left"):
            build(cache, SMALL)
    assert not list(cache.glob("*.so"))
    verdict = _compiler(cache)
    assert verdict.verdict == "warning"
    assert "sampling could not be built" in verdict.text
    assert "no space left" in verdict.text
    assert build(cache, SMALL).exists()
    assert _compiler(cache).verdict == "ok"

    monkeypatch.setenv("PATH", str(tmp_path))
    verdict = _compiler(cache)
    assert verdict.verdict == "warning"
    assert "a third of the tokens per second" in verdict.text
    assert "1 built earlier" in verdict.text


@needs_compiler
def test_a_compiler_that_is_not_ready_in_time_is_stopped_and_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "BUILD_TIMEOUT_S", 0.01)
    with pytest.raises(BuildFailed, match=r"stopped after 0.01 s; .* the next start tries again"):
        build(tmp_path / "kernels", SMALL)


def test_without_a_compiler_the_engine_falls_back_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path / "kernels", torch.float32, 1) is None
    (record,) = [record for record in caplog.records if record.message == "kernel.unavailable"]
    assert "no C++ compiler" in record.__dict__["reason"]


@needs_compiler
def test_a_kernel_built_earlier_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build(tmp_path / "kernels", SMALL)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build(tmp_path / "kernels", SMALL) == built


def test_a_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "kernels"
    cache.mkdir()
    cache.chmod(0o777)
    with pytest.raises(BuildFailed, match="can be written by others"):
        build(cache)


def test_another_cpu_torch_or_source_means_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = building.read_sources("kernels")
    here = building.key(sources)
    for file in ("kernels.cpp", "attention.h", "vectors.h"):
        assert building.key({**sources, file: sources[file] + b"\n"}) != here, file
    with monkeypatch.context() as patched:
        patched.setattr(torch, "__version__", "0.0.1")
        assert building.key(sources) != here
    assert building.key(sources, "haswell") != here
    monkeypatch.setattr(building, "_instructions", lambda: "sse2")
    assert building.key(sources) != here


def test_the_compiler_is_told_of_the_cpu_in_its_own_words() -> None:
    assert "-march=native" in building.flags(building.NATIVE, "x86_64")
    assert "-mcpu=native" in building.flags(building.NATIVE, "aarch64")
    assert "-march=armv8.2-a" in building.flags("armv8.2-a", "aarch64")
