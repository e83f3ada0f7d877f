"""Faults inside the processes under test, without a line of them in the product.

Python imports a module of this name at start-up. Put this directory first on ``PYTHONPATH`` of a worker (its
engine inherits it; ``tests/support/faults.py`` makes the environment), and by these variables it wraps named
functions of ours as their modules are imported:

``GM_TEST_POISON_TOKEN=123``   an engine step that is about to feed this token id to the model goes wrong …
``GM_TEST_POISON_HOW=kill``    … in this way: kill (SIGKILL), kill_worker (that of the engine's parent, too),
                               segfault, exit (status 1, no last word), raise
                               (a bug, told through the pipe), oom (torch.OutOfMemoryError), hang
``GM_TEST_POISON_TIMES=2``     … this often at most, over all processes (default: always; needs the notes)
``GM_TEST_POISON_NOTES=FILE``  each time is a line of FILE, written before: ``PID HOW``

``GM_TEST_KILL_POINTS=DIR``    who comes to the point named in ``DIR/armed`` is SIGKILLed: ``POINTS``
``GM_TEST_LEDGER=DIR``         what this process did, in ``DIR/PID.jsonl``: see ``_keep_ledger``

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


def _kill_worker() -> None:
    """As when a container is killed: first who could tell of it, then the engine."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


HOW: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "kill_worker": _kill_worker,
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
        def poisoned(runner: Any, plan: Any, *more: Any) -> Any:
            # Not the step of the warm-up, whose tokens nobody asked for.
            if type(plan).__name__ == "StepPlan" and any(token in fed(work) for work in plan.work):
                if notes is not None:
                    if times is not None and notes.exists() and len(notes.read_text().splitlines()) >= times:
                        return forward(runner, plan, *more)
                    _append(notes, f"{os.getpid()} {how}\n")
                HOW[how]()
            return forward(runner, plan, *more)

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


# ---- kill points: an end between two effects

POINTS: dict[str, tuple[str, str]] = {
    # a client: record, then message
    "before:State.submit": ("gristmill.backends.state:State.submit", "nothing is known of the job"),
    "after:State.submit": ("gristmill.backends.state:State.submit", "recorded; no message"),
    "after:broker.publish": ("gristmill.backends.broker:publish", "accepted; the client does not know"),
    # a worker: message, attempt, tokens, done, result object, final state, acknowledgement
    "before:State.claim": ("gristmill.backends.state:State.claim", "the message is claimed; no attempt"),
    "after:State.claim": ("gristmill.backends.state:State.claim", "an attempt has begun; no token"),
    "before:State.publish": ("gristmill.backends.state:State.publish", "tokens sampled; not journalled"),
    "after:State.publish": ("gristmill.backends.state:State.publish", "tokens journalled; nobody was told"),
    "before:State.publish(done)": ("gristmill.backends.state:State.publish", "it ended; the log does not"),
    "after:State.publish(done)": ("gristmill.backends.state:State.publish", "the log is complete; no result"),
    "after:Spool.add": ("gristmill.worker.spool:Spool.add", "the result is in the spool"),
    "after:Parcel.put_away": ("gristmill.worker.spool:Parcel.put_away", "the result waits for the store"),
    "before:store._link": ("gristmill.backends.store:_link", "the object is written, and has no name"),
    "after:FileStore.put_new": ("gristmill.backends.store:FileStore.put_new", "the object exists; not final"),
    "after:State.finish": ("gristmill.backends.state:State.finish", "final; not acknowledged"),
    "after:MessageQueue.ack": ("gristmill.backends.message_queue:MessageQueue.ack", "all is done"),
    # a worker that hands back: journal, state, message
    "after:Publisher.flush": ("gristmill.worker.publisher:Publisher.flush", "journalled; still running"),
    "after:State.release": ("gristmill.backends.state:State.release", "queued again; the message is claimed"),
    "after:MessageQueue.requeue": (
        "gristmill.backends.message_queue:MessageQueue.requeue",
        "the message is back",
    ),
    # a worker whose engine died
    "before:EngineClient._hand_over": (
        "gristmill.worker.engine_client:EngineClient._hand_over",
        "a new engine is ready, and has no work",
    ),
    "after:EngineClient._hand_over": (
        "gristmill.worker.engine_client:EngineClient._hand_over",
        "the new engine has the jobs",
    ),
}
"""Where a process can be told to die: before or after a call, and what is true in that moment.

The calls that end the log are told from others by their arguments: ``(done)``.
"""


BATCH_POINTS: dict[str, tuple[str, str]] = {
    "after:Batches.begin_rows": (
        "gristmill.backends.batches:Batches.begin_rows",
        "begun in their logs alone",
    ),
    "after:Batches.accept": ("gristmill.backends.batches:Batches.accept", "joined; nobody here knows"),
    "after:Batches.end_segment": ("gristmill.backends.batches:Batches.end_segment", "over; not acknowledged"),
    "after:Batches.validated": (
        "gristmill.backends.batches:Batches.validated",
        "looked at; not acknowledged",
    ),
}
"""The same in a batch. Its rows pass by ``State.publish``, too."""


def _kill_points(directory: Path) -> None:
    """Wrap every target of both. ``armed`` holds ``ID POINT NTH``; who dies makes it ``struck-PID``."""
    armed = directory / "armed"
    passed: dict[str, int] = {}

    def pass_by(side: str, label: str, args: tuple[Any, ...]) -> None:
        try:
            arm, point, nth = armed.read_text().split()
        except (FileNotFoundError, ValueError):
            return
        if label.startswith("MessageQueue.") and len(args) == 1:
            return  # no tags: nothing is said to the server
        name = f"{side}:{label}"
        done = label == "State.publish" and any('"kind":"done"' in write.event for write in args[1])
        if point not in ({f"{name}(done)"} if done else {name}):
            return
        passed[arm] = passed.get(arm, 0) + 1
        if passed[arm] >= int(nth):
            try:
                armed.rename(directory / f"struck-{os.getpid()}")
            except FileNotFoundError:
                return  # another process was first
            os.kill(os.getpid(), signal.SIGKILL)

    def wrapper_for(label: str) -> Wrapper:
        def wrapper(inner: Callable[..., Any]) -> Callable[..., Any]:
            def stopping(*args: Any, **kwargs: Any) -> Any:
                pass_by("before", label, args)
                answer = inner(*args, **kwargs)
                pass_by("after", label, args)
                return answer

            return stopping

        return wrapper

    points = POINTS | BATCH_POINTS
    for label, target in {point.partition(":")[2]: target for point, (target, _) in points.items()}.items():
        if not label.endswith("(done)"):
            wrap(target, wrapper_for(label))


# ---- the ledger: what was done, also by those who died of it


def _keep_ledger(directory: Path) -> None:
    """Write down what cannot be seen from outside once a process is dead, a line each, with ``t`` (unix s).

    An engine: ``{"add": [[id, base]]}``, base being the tokens given, prompt and output so far; and for each
    step, before anybody hears of them, ``{"step": [[id, start, count, sampled]]}``: the tokens fed to the
    model, from which place in the sequence, and how many came out. A worker: ``{"claim": job, "attempt": n}``
    once it has claimed a job, ``{"put": name}`` once it was the one who created an object, ``{"final": job}``
    once it was the one who made a job final, ``{"room": yes}`` when it begins or ceases to
    have room for another job of normal priority.
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
        def noted(runner: Any, plan: Any, *more: Any) -> Any:
            if type(plan).__name__ == "StepPlan":
                fed_now[:] = [[work.seq.id, work.seq.computed, work.count, 0] for work in plan.work]
            return inner(runner, plan, *more)

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
            classes = inner(handler)
            if said != [has := "normal" in classes]:
                said[:] = [has]
                note(room=has)
            return classes

        return noted

    wrap("gristmill.worker.handler:JobHandler.claimable", room)
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
    if points := env.get("GM_TEST_KILL_POINTS"):
        _kill_points(Path(points))
    if ledger := env.get("GM_TEST_LEDGER"):
        _keep_ledger(Path(ledger))
    if _wanted:
        sys.meta_path.insert(0, _Finder())


if __name__ == "sitecustomize":  # tests import it, too, under its long name
    _install()
