"""Wait for something to become true, instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

LOADED_S = 30
"""What anything may take longer on a machine that has other work."""


def wait_until(predicate: Callable[[], T], timeout_s: float, what: str, poll_s: float = 0.01) -> T:
    """The first true value of ``predicate``. ``timeout_s`` is for a quiet machine, and ``LOADED_S`` on top.

    Raises AssertionError naming ``what`` after that: what must happen in time has to be measured.
    """
    deadline = time.monotonic() + timeout_s + LOADED_S
    while True:
        if value := predicate():
            return value
        assert time.monotonic() < deadline, (
            f"not within {timeout_s + LOADED_S:g} s: {what} (last value: {value!r})"
        )
        time.sleep(poll_s)
