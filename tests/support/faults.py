"""Faults inside workers and engines: what to put into a process's environment. See ``faultpoints/``."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from .faultpoints.sitecustomize import BATCH_POINTS, POINTS
from .waiting import wait_until

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

    ``how``: kill, kill_worker, segfault, exit, raise, oom, hang. ``times``: so often, over all workers with
    the same ``notes``, where each time becomes a line, ``PID HOW``, before it happens.
    """
    env = fault_env(POISON_TOKEN=token, POISON_HOW=how)
    if times is not None:
        env |= fault_env(POISON_TIMES=times)
    return env if notes is None else env | fault_env(POISON_NOTES=notes)


class KillPoints:
    """Arms one point at a time for all processes that were started with ``env``."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.env = fault_env(KILL_POINTS=directory)

    def arm(self, point: str, nth: int = 1) -> None:
        """Whoever comes there for the ``nth`` time from now on, counted in each process, is killed."""
        known = POINTS | BATCH_POINTS
        assert point in known, f"no such point: {point}; there are {', '.join(known)}"
        for struck in self._directory.glob("struck-*"):
            struck.unlink()
        aside = self._directory / "aside"
        aside.write_text(f"{secrets.token_hex(4)} {point} {nth}")
        aside.rename(self._directory / "armed")

    def wait_struck(self, timeout_s: float = 60) -> int:
        """The process id of who died there."""
        (struck,) = wait_until(
            lambda: [*self._directory.glob("struck-*")], timeout_s, "somebody comes to the armed point"
        )
        return int(struck.name.partition("-")[2])
