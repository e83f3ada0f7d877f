"""Gate: which queues a worker may claim from now, and the way to say that this has changed."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence


class Waker:
    """Makes a poller that watches ``fileno()`` return. ``set``: from any thread, even after ``close``."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        with self._lock:  # once closed, the number may belong to somebody else
            if not self._closed:
                os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        with self._lock:
            if not self._closed:
                try:
                    os.eventfd_read(self._fd)
                except BlockingIOError:
                    return

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._fd)


class Gate:
    """Asked before each claim. ``claimable`` names the queues to try, in strict order; none: claim nothing.

    It is called in the consumer's loop and must not wait. ``poke`` has it asked again at once; without a
    poke that happens within a second.
    """

    def __init__(self, claimable: Callable[[], Sequence[str]] = lambda: ()) -> None:
        self.claimable = claimable
        self._wakers: set[Waker] = set()
        self._lock = threading.Lock()
        self._turned_at: float | None = None

    def turn(self) -> None:
        """The consumer's loop lives: it says so on each turn, at least every second."""
        self._turned_at = time.monotonic()

    def still_s(self) -> float:
        """Seconds since its last turn; 0 before the first one."""
        turned_at = self._turned_at
        return 0.0 if turned_at is None else time.monotonic() - turned_at

    def poke(self) -> None:
        """Capacity may have come free. Cheap; any thread."""
        with self._lock:
            wakers = tuple(self._wakers)
        for waker in wakers:
            waker.set()

    def attach(self, waker: Waker) -> None:
        with self._lock:
            self._wakers.add(waker)

    def detach(self, waker: Waker) -> None:
        with self._lock:
            self._wakers.discard(waker)
