"""Slots: the jobs that a worker has in hand."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..schemas.job import Job
from . import capacity
from .disposition import Disposition
from .generation import CHOICE_MARK, Generation


@dataclass(slots=True, eq=False)
class Slot:
    """A job in hand: ``ended`` wakes its thread, ``disposition`` answers a second delivery."""

    job: Job
    generation: Generation | None = None
    expires_at: float = math.inf
    """By this machine's monotonic clock: the server said how long it has."""
    ended: threading.Event = field(default_factory=threading.Event)
    how: Disposition | None = None
    """Set with ``ended``: DROP (fenced) or REQUEUE (handed back). None: the log is complete."""
    disposition: Future[Disposition] = field(default_factory=Future[Disposition])

    def complete(self) -> None:
        """Its log is complete: wake its thread."""
        self.ended.set()

    def end(self, how: Disposition) -> None:
        """Wake its thread, which lets go of the job. Too late once the job has ended by itself."""
        if not self.ended.is_set():
            self.how = how
            self.ended.set()

    def held(self) -> capacity.Held:
        """For the question what else could run beside it."""
        generation, rank = self.generation, self.job.priority.rank
        if generation is None:
            return capacity.Held(rank, tokens=0, started=False, sequences=self.job.sampling.choices)
        started = generation.first_token_at is not None
        return capacity.Held(
            rank,
            tokens=0 if started else len(generation.prompt_ids),
            started=started,
            sequences=sum(one.done is None for one in generation.completions),
        )


@dataclass(slots=True, eq=False)
class RowSlot(Slot):
    """A row in hand. No thread waits for it: ``on_end`` is told instead, once, on whatever thread."""

    on_end: Callable[[RowSlot], None] = field(kw_only=True)

    def complete(self) -> None:
        """See Slot."""
        if not self.ended.is_set():
            self.ended.set()
            self.on_end(self)

    def end(self, how: Disposition) -> None:
        """See Slot."""
        if not self.ended.is_set():
            self.how = how
            self.ended.set()
            self.on_end(self)


class Slots:
    """One for each job, however often it was delivered. Thread-safe."""

    def __init__(self) -> None:
        self._slots: dict[str, Slot] = {}
        self._lock = threading.Lock()

    def take(self, slot: Slot) -> Slot:
        """Take a job in hand. Returns ``slot``, or the one that has it already."""
        with self._lock:
            return self._slots.setdefault(slot.job.id, slot)

    def drop(self, slot: Slot) -> None:
        """Let go of it."""
        with self._lock:
            del self._slots[slot.job.id]

    def get(self, job_id: str) -> Slot | None:
        """None: it is not in hand."""
        return self._slots.get(job_id)

    def of(self, generation: Generation) -> Slot | None:
        """None: that attempt was let go of, and the job may be here again by another."""
        slot = self._slots.get(generation.job.id)
        return slot if slot is not None and slot.generation is generation else None

    def generation(self, request_id: str) -> Generation | None:
        """The attempt that this is the name of, or a choice of; None: nobody waits for it any more."""
        attempt = request_id.partition(CHOICE_MARK)[0]
        slot = self._slots.get(attempt.rpartition("@")[0])
        generation = slot.generation if slot else None
        return generation if generation is not None and generation.request_id == attempt else None

    def all(self) -> list[Slot]:
        """As of now, rows included."""
        with self._lock:
            return list(self._slots.values())

    def jobs(self) -> list[Slot]:
        """Those that have a delivery of their own."""
        return [slot for slot in self.all() if not isinstance(slot, RowSlot)]

    def __len__(self) -> int:
        return len(self._slots)
