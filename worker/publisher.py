"""Publisher: running jobs' tokens into the journal, all of them in one call, off the engine's step path."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

from ..backends.state import State, Write
from ..schemas.errors import BrokerUnavailable
from .generation import Generation

log = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_MAX_S = 0.05, 2.0


class Publisher:
    """One thread that writes what is due. ``lock`` guards every Generation: hold it to touch one.

    While the state server is away tokens stay in their Generations, ``healthy`` is False (intake stops),
    and the same entries are written again until they are confirmed.
    """

    def __init__(
        self,
        state: State,
        *,
        on_complete: Callable[[Generation], None],
        on_fenced: Callable[[Generation], None],
        on_trial_recorded: Callable[[Generation], None],
    ) -> None:
        self._state = state
        self._on_complete, self._on_fenced = on_complete, on_fenced
        self._on_trial_recorded = on_trial_recorded
        self.lock = threading.Condition()
        self._live: dict[str, Generation] = {}
        self._closing = False
        self._flushing = False
        self._due_at = 0.0
        """In unix time; nothing need be written before. Infinite: nothing at all."""
        self.healthy = True
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        """Begin writing."""
        self._thread.start()

    def add(self, *generations: Generation) -> None:
        """Watch jobs from now on, each until its log is complete or it is fenced."""
        with self.lock:
            for generation in generations:
                self._live[generation.job.id] = generation
            self.wake()

    def discard(self, *generations: Generation) -> None:
        """Stop watching: nothing more of these attempts is written."""
        with self.lock:
            for generation in generations:
                if self._live.get(generation.job.id) is generation:
                    del self._live[generation.job.id]
            if not self._live:  # nothing is left to find out with whether the server is back
                self.healthy = True

    def wake(self, due_at: float = 0.0) -> None:
        """Something is due then, in unix time; it may be now. The caller holds ``lock``."""
        if due_at < self._due_at:
            self._due_at = due_at
            self.lock.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Write every watched job's tokens now. False: not confirmed within ``timeout_s``."""
        with self.lock:
            self._flushing = True
            self.lock.notify_all()
            return self.lock.wait_for(lambda: not self._flushing, timeout_s)

    def stop(self) -> None:
        """End the thread. What is not written stays unwritten: the journal is ahead of any reader."""
        with self.lock:
            self._closing = True
            self.lock.notify_all()
        self._thread.join(timeout=5.0)

    # ---- the thread

    def _run(self) -> None:
        pause_s = RETRY_FIRST_S
        while True:
            with self.lock:
                self._due_at = self._next_due_at()
                while not (self._closing or self._flushing) and (left_s := self._due_at - time.time()) > 0:
                    self.lock.wait(None if left_s == math.inf else left_s)
                if self._closing:
                    return
                flushing = self._flushing
                batch = self._take(math.inf if flushing else time.time())
            if self._write(batch):
                pause_s = RETRY_FIRST_S
                if flushing:
                    self._flushed()
            else:
                with self.lock:
                    self.lock.wait_for(lambda: self._closing, pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)

    def _flushed(self) -> None:
        with self.lock:
            self._flushing = False
            self.lock.notify_all()

    def _next_due_at(self) -> float:
        return min((at for g in self._live.values() if (at := g.due_at()) is not None), default=math.inf)

    def _take(self, until: float) -> list[tuple[Generation, list[Write]]]:
        now = time.time()
        batch: list[tuple[Generation, list[Write]]] = []
        for generation in self._live.values():
            due_at = generation.due_at()
            if due_at is None or due_at > until:
                continue
            job_id, attempt, owner = generation.job.id, generation.attempt, generation.owner
            entries = generation.take_entries(now)
            writes = [Write(job_id, attempt, e.seq, e.event.to_json(), owner) for e in entries]
            batch.append((generation, writes))
        return batch

    def _write(self, batch: list[tuple[Generation, list[Write]]]) -> bool:
        """Write one batch. False: the server did not confirm; the same entries come again."""
        if not batch:
            return True
        try:
            fenced = self._state.publish([w for _, writes in batch for w in writes])
        except BrokerUnavailable as exc:
            if self.healthy:
                log.warning("journal.unavailable", extra={"code": exc.code, "reason": exc.message})
            self.healthy = False
            return False
        self.healthy = True
        for generation, _ in batch:
            self._settle(generation, generation.job.id in fenced)
        return True

    def _settle(self, generation: Generation, fenced: bool) -> None:
        with self.lock:
            trial_recorded = generation.confirm()
            finished = fenced or generation.complete
            if self._live.get(generation.job.id) is not generation:  # it was let go of meanwhile
                return
            if finished:
                del self._live[generation.job.id]
        if fenced:
            self._on_fenced(generation)
            return
        if finished:
            self._on_complete(generation)
        if trial_recorded:
            self._on_trial_recorded(generation)
