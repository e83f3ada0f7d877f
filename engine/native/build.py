"""Build the CPU kernels once per machine, compiler and source; find them again at the next start.

The library is plain C over raw pointers, so that a build takes a few seconds. Concurrent starts agree through
a file lock and an atomic rename: one builds, the others wait and load the same file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-Wno-psabi")
NATIVE = "native"
"""All that this machine's CPU can do. Other targets are what the compiler calls a CPU: haswell, x86-64-v4,
armv8.2-a; a CPU that can do less than its library's target ends the process (SIGILL)."""
COMPILERS = ("g++", "c++", "clang++")
BUILD_TIMEOUT_S = 270.0
"""The larger library takes 7 s of processor time; seen: 80 s, on two cores with a load of 14. Twice this is
below what a worker waits for its engine."""


class BuildFailed(Exception):
    """No kernel on this machine; the message says why. The caller falls back to torch."""


def build(cache: Path, name: str = "kernels", target: str = NATIVE) -> Path:
    """The shared library of ``name``.cpp for ``target``, built now if ``cache`` does not hold it yet.

    One compilation of that file and the headers beside it.

    Raises BuildFailed: no compiler, a compiler error, or a cache that cannot be written or is not ours.
    """
    sources = read_sources(name)
    compiler = find_compiler()
    library = _private(cache) / f"{name}-{key(sources, target)}.so"
    if library.exists():
        return library
    if compiler is None:
        raise BuildFailed(
            f"no C++ compiler ({', '.join(COMPILERS)}) on PATH and no kernel built earlier in {cache}"
        )
    with _locked(library.with_suffix(".lock")):
        if not library.exists():  # another process may have built it while we waited
            _compile_on_record([compiler, *flags(target)], name, sources, library)
    return library


def flags(target: str, machine: str = platform.machine()) -> tuple[str, ...]:
    """What the compiler is told."""
    # On ARM -march=native is new to some compilers and says nothing of which core to schedule for.
    cpu = "-mcpu" if target == NATIVE and machine in ("aarch64", "arm64") else "-march"
    return (*FLAGS, f"{cpu}={target}")


def _compile_on_record(command: list[str], name: str, sources: Mapping[str, bytes], library: Path) -> None:
    """Compile; a failure leaves its reason in ``name``.failed for `gristmill doctor`, success removes it."""
    record = library.with_name(f"{name}.failed")
    try:
        _compile(command, name, sources, library)
    except BuildFailed as exc:
        with contextlib.suppress(OSError):  # the log has it, too
            record.write_text(f"{exc}\n")
        raise
    record.unlink(missing_ok=True)


def find_compiler() -> str | None:
    """The first C++ compiler on PATH."""
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def read_sources(name: str) -> dict[str, bytes]:
    """``name``.cpp and every header, by file name: all that the compiler may read of ours."""
    folder = resources.files(__name__.rpartition(".")[0])
    return {
        file.name: file.read_bytes()
        for file in sorted(folder.iterdir(), key=lambda file: file.name)
        if file.name == f"{name}.cpp" or file.name.endswith(".h")
    }


def key(sources: Mapping[str, bytes], target: str = NATIVE) -> str:
    """What a built library depends on: sources, flags, torch (its OpenMP), and the instructions of this CPU.

    The compiler is left out: a machine without one may use what an image was shipped with.
    """
    digest = hashlib.sha256()
    for name, text in sources.items():
        digest.update(name.encode() + b"\0" + hashlib.sha256(text).digest())
    for part in (*flags(target), torch.__version__, platform.machine(), _instructions()):
        digest.update(b"\0" + part.encode())
    return digest.hexdigest()[:20]


def _instructions() -> str:
    """The CPU's feature flags: -march=native means these, and they differ between hosts that share a home."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (" ".join(sorted(line.split()[2:])) for line in lines if line.startswith(("flags", "Features"))), ""
    )


def _private(cache: Path) -> Path:
    """``cache``, created; refused if another user could put a library there."""
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = cache.stat()
    except OSError as exc:
        raise BuildFailed(f"kernel cache {cache} cannot be created: {exc}") from exc
    if info.st_uid not in (os.getuid(), 0) or info.st_mode & 0o022:
        raise BuildFailed(f"kernel cache {cache} can be written by others; make it yours alone (chmod go-w)")
    return cache


class _locked:  # noqa: N801  (used like a function)
    """An exclusive lock on a file for the length of a with-block; the kernel drops it if we die."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        try:
            self.fd = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as exc:
            raise BuildFailed(f"kernel cache {self.path.parent} cannot be written: {exc}") from exc
        fcntl.flock(self.fd, fcntl.LOCK_EX)

    def __exit__(self, *exc: object) -> None:
        os.close(self.fd)


def _compile(compiler: list[str], name: str, sources: Mapping[str, bytes], library: Path) -> None:
    """``compiler``: with its flags."""
    started = time.monotonic()
    log.info("kernel.compiling %s, once on this machine: it takes seconds to minutes", name)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as work:
        cpp, so = Path(work, f"{name}.cpp"), Path(work, f"{name}.so")
        for file, text in sources.items():
            Path(work, file).write_bytes(text)
        command = [*compiler, "-fopenmp", str(cpp), "-o", str(so)]
        if runtime := _openmp_in_use():
            # Share torch's thread pool: two OpenMP runtimes in one process would fight over the cores.
            _run([*compiler, "-fopenmp", "-c", str(cpp), "-o", f"{so}.o"])
            command = [compiler[0], "-shared", f"{so}.o", str(runtime), "-o", str(so), "-lm"]
        _run(command)
        so.replace(library)
    log.info(
        "kernel.built",
        extra={"path": str(library), "compiler": compiler[0], "build_s": time.monotonic() - started},
    )


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=BUILD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as exc:
        raise BuildFailed(
            f"{command[0]} was stopped after {BUILD_TIMEOUT_S:g} s; the machine is busy or short of memory, "
            "torch does the work meanwhile, and the next start tries again"
        ) from exc
    except OSError as exc:
        raise BuildFailed(f"{command[0]} did not run: {exc}") from exc
    if done.returncode != 0:
        raise BuildFailed(f"{command[0]} failed ({done.returncode}): {done.stderr[-2000:].strip()}")


def _openmp_in_use() -> Path | None:
    """The libgomp that torch has loaded into this process, if the system tells."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    return next((Path(line.split()[-1]) for line in lines if "libgomp" in line), None)
