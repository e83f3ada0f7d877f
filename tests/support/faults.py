"""Faults inside workers and engines: what to put into a process's environment. See ``faultpoints/``."""

from __future__ import annotations

import os
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parent / "faultpoints"


def fault_env(**variables: str | int | Path) -> dict[str, str]:
    """``PYTHONPATH``, and the given variables with ``GM_TEST_`` in front."""
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(DIRECTORY), *([inherited] if inherited else [])])
    return {"PYTHONPATH": path} | {f"GM_TEST_{name}": str(value) for name, value in variables.items()}


def poison(
    token: int, how: str = "kill", *, times: int | None = None, notes: Path | None = None
) -> dict[str, str]:
    """For ``stack.worker(env=…)``: its engine goes wrong in a step that feeds ``token`` to the model.

    ``how``: kill, segfault, exit, raise, oom, hang. ``times``: so often, over all workers with the
    same ``notes``, where each time becomes a line, ``PID HOW``, before it happens.
    """
    env = fault_env(POISON_TOKEN=token, POISON_HOW=how)
    if times is not None:
        env |= fault_env(POISON_TIMES=times)
    return env if notes is None else env | fault_env(POISON_NOTES=notes)
