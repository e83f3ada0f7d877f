"""Depth: how many messages wait for a worker, asked on a thread of its own: a broker may take its time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from ..schemas.errors import GristmillError, Misconfigured, Transient

log = logging.getLogger(__name__)


class Depth:
    """Counts every ``every_s``, and sooner when somebody has to know. ``count`` may raise GristmillError."""

    def __init__(self, count: Callable[[], int], every_s: float) -> None:
        self._count, self._every_s = count, every_s
        self._asked_at, self._waiting = float("-inf"), 0
        self._wanted = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="depth", daemon=True)

    def start(self) -> None:
        """Begin counting."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Wait that long, at most, for a count that is under way."""
        self._stopped = True
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def was_none(self, since: float) -> bool:
        """Whether nothing waited at some moment after ``since``, by ``time.monotonic``. Never waits.

        False also means: not known yet. Then it is counted now; ask again.
        """
        if self._asked_at >= since and self._waiting == 0:
            return True
        self._wanted.set()
        return False

    def _run(self) -> None:
        failing = False
        while True:
            self._wanted.wait(self._every_s)
            self._wanted.clear()
            if self._stopped:
                return
            asked_at = time.monotonic()
            try:
                waiting = self._count()
            except (Transient, Misconfigured) as exc:
                failing = failing or self._say(exc)
            else:
                self._waiting, self._asked_at, failing = waiting, asked_at, False

    def _say(self, exc: GristmillError) -> bool:
        log.warning("queues.not_counted", extra={"code": exc.code, "reason": exc.message})
        return True
