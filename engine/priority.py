"""Who waits for whom on cores that an engine shares with its consumer."""

from __future__ import annotations

import os
from contextlib import suppress


def step_aside() -> None:
    """From now on this process takes no core from another when it wakes, but waits its turn (SCHED_BATCH).

    For a consumer on the engine's cores: the engine's threads wait for each other some hundred times a step,
    so that one that is pushed away for a millisecond costs all of them that.
    """
    _schedule("SCHED_OTHER", "SCHED_BATCH")


def step_forward() -> None:
    """Undo it: for the engine, which inherits it."""
    _schedule("SCHED_BATCH", "SCHED_OTHER")


def _schedule(before: str, after: str) -> None:
    with suppress(AttributeError, OSError):  # not Linux, or not allowed: slower, not wrong
        if os.sched_getscheduler(0) == getattr(os, before):
            os.sched_setscheduler(0, getattr(os, after), os.sched_param(0))
