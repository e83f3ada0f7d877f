"""Stopwatch: how long something took that a step does in several places."""

from __future__ import annotations

import time


class Stopwatch:
    """Adds up the seconds spent inside ``with``. One thread only, and not one inside another."""

    def __init__(self) -> None:
        self._since = self._seconds = 0.0

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        self._seconds += time.monotonic() - self._since

    def take(self) -> float:
        """The seconds so far; it begins again at zero."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds
