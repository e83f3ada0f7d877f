"""Patience: repeats a call until the other side answers, however long an outage lasts."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

from ..schemas.errors import Misconfigured, Transient

log = logging.getLogger(__name__)

T = TypeVar("T")
FIRST_S, MAX_S = 0.05, 5.0


class Patience:
    """Thread-safe. ``waiting``: how many threads wait in it for an outage to end."""

    def __init__(self, closing: threading.Event) -> None:
        self._closing = closing
        self._troubled: list[str] = []  # an item for each thread that waits

    def __call__(self, call: Callable[[], T]) -> T | None:
        """What ``call`` returns. None: we are closing, and it could not be carried out."""
        pause_s = FIRST_S
        troubled = False
        try:
            while True:
                try:
                    return call()
                except (Transient, Misconfigured) as exc:  # a bucket or a password that is gone may come back
                    if not troubled:
                        log.warning("backend.unavailable", extra={"code": exc.code, "reason": exc.message})
                        troubled = True
                        self._troubled.append(exc.code)
                    if self._closing.wait(pause_s):
                        return None
                    pause_s = min(2 * pause_s, MAX_S)
        finally:
            if troubled:
                self._troubled.pop()

    @property
    def waiting(self) -> int:
        """Threads that wait."""
        return len(self._troubled)
