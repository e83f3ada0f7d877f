"""Faults inside the processes under test, without a line of them in the product.

Python imports a module of this name at start-up. Put this directory first on ``PYTHONPATH`` of a worker (its
engine inherits it; ``tests/support/faults.py`` makes the environment), and by these variables it wraps named
functions of ours as their modules are imported:

``GM_TEST_POISON_TOKEN=123``   an engine step that is about to feed this token id to the model goes wrong …
``GM_TEST_POISON_HOW=kill``    … in this way: kill (SIGKILL), segfault, exit (status 1, no last word), raise
                               (a bug, told through the pipe), oom (torch.OutOfMemoryError), hang
``GM_TEST_POISON_TIMES=2``     … this often at most, over all processes (default: always; needs the notes)
``GM_TEST_POISON_NOTES=FILE``  each time is a line of FILE, written before: ``PID HOW``

``GM_TEST_LEDGER=DIR``         what this process did, as it did it, in ``DIR/PID.jsonl``; ``_keep_ledger``

What is wrapped must exist: a name that does not ends the process at once, with a message.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
_wanted: dict[str, list[tuple[str, Wrapper]]] = {}


def wrap(target: str, wrapper: Wrapper) -> None:
    """Replace ``module:Class.method``, or ``module:function``, by ``wrapper(it)`` when its module loads."""
    module, _, name = target.partition(":")
    assert module not in sys.modules, f"{module} is imported already: too late to wrap {target}"
    _wanted.setdefault(module, []).append((name, wrapper))


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the others find a wanted module, and wraps what is wanted of it after it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _wanted:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        for name, wrapper in _wanted[module.__name__]:
            _replace(module, name, wrapper)


def _replace(module: ModuleType, name: str, wrapper: Wrapper) -> None:
    *owners, last = name.split(".")
    owner: Any = module
    for part in owners:
        owner = getattr(owner, part, None)
    if not callable(getattr(owner, last, None)):
        _die(f"there is no {module.__name__}:{name} to wrap; was it renamed?")
    inner = getattr(owner, last)
    setattr(owner, last, functools.wraps(inner)(wrapper(inner)))


def _die(message: str) -> None:
    os.write(2, f"fault points: {message}\n".encode())
    os._exit(70)


# ---- poison: an engine that goes wrong at a token


def _oom() -> None:
    import torch

    raise torch.OutOfMemoryError("poisoned: tried to allocate more than there is")


def _raise() -> None:
    raise RuntimeError("poisoned: a step went wrong")


HOW: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda: os._exit(1),
    "raise": _raise,
    "oom": _oom,
    "hang": lambda: threading.Event().wait(),
}


def _poison(token: int, how: str, times: int | None, notes: Path | None) -> None:
    if how not in HOW:
        _die(f"GM_TEST_POISON_HOW={how}: there are {', '.join(HOW)}")
    if times is not None and notes is None:
        _die("GM_TEST_POISON_TIMES needs GM_TEST_POISON_NOTES")

    def wrapper(forward: Callable[..., Any]) -> Callable[..., Any]:
        def poisoned(runner: Any, plan: Any) -> Any:
            # Not the step of the warm-up, whose tokens nobody asked for.
            if type(plan).__name__ == "StepPlan" and any(token in fed(work) for work in plan.work):
                if notes is not None:
                    if times is not None and notes.exists() and len(notes.read_text().splitlines()) >= times:
                        return forward(runner, plan)
                    _append(notes, f"{os.getpid()} {how}\n")
                HOW[how]()
            return forward(runner, plan)

        return poisoned

    wrap("gristmill.engine.runner:Runner.forward", wrapper)


def fed(work: Any) -> list[int]:
    """The tokens that one piece of a step plan feeds to the model."""
    seq = work.seq
    return seq.tokens[seq.computed : seq.computed + work.count]


def _append(file: Path, text: str) -> None:
    """In one write, so that lines of several processes stay whole, and survive the death that follows."""
    out = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(out, text.encode())
    finally:
        os.close(out)


# ---- the ledger: what was done, also by those who died of it


def _keep_ledger(directory: Path) -> None:
    """Write down what cannot be seen from outside once a process is dead, a line each, with ``t`` (unix s).

    An engine: ``{"add": [[id, base]]}``, base being the tokens given, prompt and output so far; and for each
    step, before anybody hears of them, ``{"step": [[id, start, count, sampled]]}``: the tokens fed to the
    model, from which place in the sequence, and how many came out. A worker: ``{"claim": job, "attempt": n}``
    once it has claimed a job, ``{"put": name}`` once it was the one who created an object, ``{"final": job}``
    once it was the one who made a job final, ``{"room": yes}`` when that has changed.
    """
    file = directory / f"{os.getpid()}.jsonl"
    fed_now: list[list[Any]] = []

    def note(**what: Any) -> None:
        _append(file, json.dumps({"t": time.time(), **what}) + "\n")

    def add(inner: Callable[..., Any]) -> Callable[..., Any]:
        def noted(engine: Any, request: Any) -> Any:
            inner(engine, request)
            note(add=[[request.id, len(request.prompt_ids) + len(request.output_ids)]])

        return noted

    def forward(inner: Callable[..., Any]) -> Callable[..., Any]:
        def noted(runner: Any, plan: Any) -> Any:
            if type(plan).__name__ == "StepPlan":
                fed_now[:] = [[work.seq.id, work.seq.computed, work.count, 0] for work in plan.work]
            return inner(runner, plan)

        return noted

    def step(inner: Callable[..., Any]) -> Callable[..., Any]:
        def noted(engine: Any) -> Any:
            fed_now.clear()
            outputs = inner(engine)
            came = {o.id: len(o.token_ids) + (o.stop_token_id is not None) for o in outputs}
            if fed_now:
                note(step=[[i, start, count, came.get(i, 0)] for i, start, count, _ in fed_now])
            return outputs

        return noted

    def when_true(key: str, subject: int) -> Wrapper:
        """Note argument number ``subject`` of a call that returns True: it was this one that did it."""

        def wrapper(inner: Callable[..., Any]) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                done = inner(*args, **kwargs)
                if done is True:
                    note(**{key: args[subject]})
                return done

            return noted

        return wrapper

    def claim(inner: Callable[..., Any]) -> Callable[..., Any]:
        def noted(state: Any, job_id: str, *args: Any, **kwargs: Any) -> Any:
            claimed = inner(state, job_id, *args, **kwargs)
            note(claim=job_id, attempt=getattr(claimed, "attempt", None))
            return claimed

        return noted

    said: list[bool] = []

    def room(inner: Callable[..., Any]) -> Callable[..., Any]:
        def noted(handler: Any) -> Any:
            has = bool(inner(handler))
            if said != [has]:
                said[:] = [has]
                note(room=has)
            return has

        return noted

    wrap("gristmill.worker.handler:JobHandler.has_room", room)
    wrap("gristmill.engine.engine:Engine.add", add)
    wrap("gristmill.engine.engine:Engine.step", step)
    wrap("gristmill.engine.runner:Runner.forward", forward)
    wrap("gristmill.backends.state:State.claim", claim)
    wrap("gristmill.backends.state:State.finish", when_true("final", 1))
    wrap("gristmill.backends.store:FileStore.put_new", when_true("put", 1))


# ---- start-up


def _install() -> None:
    env = os.environ
    if token := env.get("GM_TEST_POISON_TOKEN"):
        times, notes = env.get("GM_TEST_POISON_TIMES"), env.get("GM_TEST_POISON_NOTES")
        how = env.get("GM_TEST_POISON_HOW", "kill")
        _poison(int(token), how, int(times) if times else None, Path(notes) if notes else None)
    if ledger := env.get("GM_TEST_LEDGER"):
        _keep_ledger(Path(ledger))
    if _wanted:
        sys.meta_path.insert(0, _Finder())


_install()
