"""A lock between the processes of one machine, for what they share on its disk."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from ..schemas.errors import WaitTimeout

LOCK_TIMEOUT_S = 4 * 3600.0
"""As long as the slowest download that is worth waiting for."""
LOCK_POLL_S = 0.1


@contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Generator[None]:
    """Hold an exclusive lock on the file. The kernel drops it with its owner: a kill leaves nothing behind.

    ``waiting`` is called once if somebody else has it. Raises WaitTimeout.
    """
    deadline_s = time.monotonic() + LOCK_TIMEOUT_S
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        told = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if time.monotonic() > deadline_s:
                    raise WaitTimeout(
                        f"{path}: another process has held the lock for {LOCK_TIMEOUT_S:.0f} s; see what it "
                        "does (fuser), end it, and try again"
                    ) from exc
            if not told:
                waiting()
                told = True
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        os.close(descriptor)
