"""torch without the parts that only its compilers, exporters and trainers need: two fifths of its import.

``begin`` has the modules of LATER take their places empty while torch is imported. The first look into one of
them, a module beneath one, or a package that may count on what they register reads them all, in the order in
which torch asked for them: there is no state between "left out" and "whole". What they do when they are read
is to register operators for tensors without data (the "meta" device) and in the "prims" namespace; a step of
ours on a CPU has neither. Kernels on numbers are registered in C++, before.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

LATER = frozenset(
    {
        "torch._meta_registrations",
        "torch.ao",
        "torch.distributed._meta_registrations",
        "torch.distributions",
        "torch.export",
        "torch.masked",
        "torch.nn.intrinsic",
        "torch.nn.qat",
        "torch.nn.quantizable",
        "torch.nn.quantized",
        "torch.optim",
        "torch.profiler",
        "torch.quantization",
        "torch.utils.data",
    }
)
NEEDS_ALL = frozenset(
    {
        "accelerate",
        "bitsandbytes",
        "compressed_tensors",
        "flash_attn",
        "gptqmodel",
        "optimum",
        "peft",
        "torch._dynamo",
        "torch._export",
        "torch._inductor",
        "torch.onnx",
        "torchao",
        "torchvision",
        "transformers",
        "triton",
    }
)
"""Who works with tensors without data, or may, and does not say so by looking into a module of LATER. (Who is
forgotten here fails and says so: torch finds no kernel for the meta device.)"""
GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")

_lock = threading.RLock()
_asked: list[ModuleType] = []
"""Those of LATER, in torch's order."""
_reading: set[str] = set()
_imported = False


LIBRARIES = (("libtorch_global_deps.so", os.RTLD_NOW | os.RTLD_GLOBAL), ("libtorch_cpu.so", os.RTLD_NOW))
"""As torch opens them, in its order."""


class TorchIsOdd(Exception):
    """Something that a plain import has is missing; torch is half there, and only a new process helps."""


def open_libraries() -> None:
    """Have torch's shared libraries opened by a thread: a third of a second in which Python does others.

    Through ctypes ``dlopen`` runs without the interpreter's lock; who imports torch meanwhile waits for
    it. What cannot be opened is for the import to complain of.
    """
    spec = None if "torch" in sys.modules else importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return
    folder = Path(spec.submodule_search_locations[0]) / "lib"
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p

    def run() -> None:
        for name, how in LIBRARIES:
            if (folder / name).exists():
                dlopen(os.fsencode(folder / name), how)

    threading.Thread(target=run, name="open torch", daemon=True).start()


def begin() -> None:
    """Import torch, quickly, unless it is there already. Raises TorchIsOdd."""
    global _imported
    if "torch" in sys.modules:
        return
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    gc_was_on = gc.isenabled()
    gc.disable()  # nothing that an import makes is garbage
    try:
        torch: Any = importlib.import_module("torch")
        _complete_generators(torch)
        _imported = True
        _try(torch)
    except Exception as exc:
        raise TorchIsOdd(f"{type(exc).__name__}: {exc}") from exc
    finally:
        if gc_was_on:
            gc.enable()


def complete() -> None:
    """Have the rest of torch read, if it was left out. Any thread."""
    with _lock:
        for module in _asked:
            if isinstance(module, _Later):
                module.read()


def left_out() -> list[str]:
    """The modules that nobody has looked at."""
    return [module.__name__ for module in _asked if isinstance(module, _Later)]


class Asked(Protocol):
    """What is asked of an engine, by its own settings or its worker's."""

    @property
    def device(self) -> str: ...
    @property
    def quick_start(self) -> bool: ...
    @property
    def tensor_parallel_size(self) -> int: ...


def will_do(settings: Asked) -> bool:
    """Whether an engine on a CPU and on no other rank is asked for. With a driver there, torch may end up on
    the card, and has more to be careful of."""
    on_cpu = settings.device == "cpu" or not any(Path(driver).exists() for driver in GPU_DRIVERS)
    return (
        settings.quick_start and settings.tensor_parallel_size == 1 and settings.device != "cuda" and on_cpu
    )


class _Later(ModuleType):
    """A module whose code has not been run. Reading it turns it into a plain module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module: by inspect, warnings and the import itself
            raise AttributeError(name)
        with _lock:
            if self.__name__ in _reading:  # by this thread, which holds the lock: not defined yet
                raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
            if type(self) is _Later:  # not if another thread has read it while we waited
                self.be_read()
        return getattr(self, name)

    def be_read(self) -> None:
        """With all others; but one that torch looks into while it reads itself comes alone, as it would."""
        if _imported and not _reading:
            complete()
        else:
            self.read()

    def read(self) -> None:
        if self.__name__ in _reading:
            return
        assert isinstance(self.__loader__, _Placeholder)
        _reading.add(self.__name__)
        try:
            self.__loader__.behind.exec_module(self)
            self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]  # Python allows modules it
        finally:
            _reading.remove(self.__name__)


class _Placeholder(Loader):
    """Makes the empty module; ``behind`` is who can fill it."""

    def __init__(self, behind: Loader) -> None:
        self.behind = behind

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = _Later(spec.name)
        _asked.append(module)
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent = sys.modules.get(name.rpartition(".")[0])
        if name in LATER and not _imported and not isinstance(parent, _Later):
            spec = PathFinder.find_spec(name, path)
            if spec is not None and spec.loader is not None:
                spec.loader = _Placeholder(spec.loader)
            return spec
        if isinstance(parent, _Later):
            parent.be_read()
        elif _imported and name in NEEDS_ALL:
            complete()
        return None


def _complete_generators(torch: Any) -> None:
    """One thing beside operators: ``torch.Generator`` gets its metaclass, from 2.13 on."""
    if hasattr(torch._C, "_set_generator_metaclass"):
        torch._C._set_generator_metaclass(importlib.import_module("torch._opaque_base").OpaqueBaseMeta)


def _try(torch: Any) -> None:
    """A few things that a step or a start does: another torch may depend on its modules differently."""
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        x = torch.randn(4, 8, generator=generator)
        y = torch.nn.functional.linear(x, torch.eye(8))
        assert bool((x == y).all()), "a product with the identity"
        assert tuple(torch.cat([x, y.to(torch.bfloat16).float()]).argmax(1).shape) == (8,)
    assert left_out(), "nothing was left out"
