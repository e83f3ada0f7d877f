"""Wait for something to become true, instead of sleeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(predicate: Callable[[], T], timeout_s: float, what: str, poll_s: float = 0.01) -> T:
    """The first true value of ``predicate``. Raises AssertionError naming ``what`` after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        if value := predicate():
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what} (last value: {value!r})"
        time.sleep(poll_s)
