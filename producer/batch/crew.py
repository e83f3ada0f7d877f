"""Workers of a run's own: started if nobody serves the model, watched, ended with the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from ...schemas.errors import EngineUnavailable, Transient
from .. import core
from ..link import Link
from ..settings import ProducerSettings
from ..stack import Workers, lives, make_workers

LOOK_EVERY_S = 2.0
POLL_S = 0.1
DRAIN_S = "1"
"""Rows that would take longer are handed back with what they have; the next run continues them."""


class Crew:
    """A context manager. ``model``: as our own workers would load it; None: workers are somewhere else."""

    def __init__(
        self,
        link: Link,
        settings: ProducerSettings,
        name: str,
        model: str | None,
        knobs: Sequence[str],
        count: int,
        warn: Callable[[str], None],
    ) -> None:
        self._link, self._settings, self._name, self._warn = link, settings, name, warn
        self._knobs = list(knobs)
        self._workers: Workers | None = None
        if model is not None:
            self._workers = make_workers(
                settings,
                model,
                [*knobs, "--drain-s", DRAIN_S],
                count=count,
                logs=settings.home / "logs",
                max_failures=settings.worker_restarts,
                stop_s=settings.worker_stop_s,
            )
        self._started = self._told = False
        self._looked_at = 0.0

    def ready(self, stopping: Callable[[], bool]) -> bool:
        """Wait until somebody serves the model, our own workers if there is nobody. False: ``stopping``.

        Workers elsewhere are not waited for. Raises EngineUnavailable, Misconfigured: they do not start.
        """
        deadline = time.monotonic() + self._settings.worker_start_s
        while not stopping():
            if self._somebody():
                if not self._started and self._knobs:
                    self._warn(
                        f"workers that are there already serve {self._name}: what was said of the engine "
                        f"({' '.join(self._knobs)}) and --workers have no effect"
                    )
                return True
            if self._workers is None:
                self._warn(core.nobody_alive(self._name, self._settings))
                return True
            if not self._started:
                self._workers.start()
                self._started = True
            self._check()
            if time.monotonic() > deadline:
                raise EngineUnavailable(
                    f"the worker was not ready after {self._settings.worker_start_s:g} s; "
                    f"its log: {self.logs[0]}"
                )
            time.sleep(POLL_S)
        return False

    def watch(self, progressed: bool) -> None:
        """Now and then: restart ours if they die, say so if those elsewhere are in trouble.

        ``progressed``: rows ended since. Raises EngineUnavailable, Misconfigured.
        """
        if self._started and self._workers is not None:
            if progressed:
                self._workers.progressed()
            self._check()
        now = time.monotonic()
        if not self._told and now - self._looked_at >= core.SAY_AFTER_S:
            self._looked_at = now
            with suppress(Transient):
                sentence = core.in_trouble(self._link.state.alive(self._name))
                if sentence is not None:
                    self._told = True
                    self._warn(sentence)

    @property
    def logs(self) -> list[str]:
        """Log files of the workers that ran."""
        started = self._workers.workers if self._workers is not None and self._started else []
        return [str(worker.log) for worker in started if worker.log is not None]

    def stop(self) -> None:
        """Wait until they have handed back what they run."""
        if self._workers is not None:
            self._workers.stop()

    def kill(self) -> None:
        """End the workers without waiting."""
        if self._workers is not None:
            self._workers.kill()

    def _check(self) -> None:
        assert self._workers is not None
        for sentence in self._workers.check():
            self._warn(sentence)

    def _somebody(self) -> bool:
        with suppress(Transient):
            return any(lives(info) for info in self._link.state.alive(self._name))
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
