"""Time that a test moves: given to State, it is the server's."""

from __future__ import annotations

import time


class Clock:
    """Unix seconds; begins at the real time, since keys expire by the server's real clock."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds
