"""AdapterDesk: sequences with an adapter wait here until its weights are in memory, then go to the scheduler.

Loading happens on a thread, one adapter at a time; the engine asks between steps what has come of it.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from ...schemas.errors import AdapterInvalid, GristmillError
from ..memory import is_out_of_memory
from ..sequence import Sequence
from .pool import AdapterPool

B = TypeVar("B")
A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Files(Generic[B, A]):
    """How adapters are read: ``survey`` checks and measures, ``load`` reads, ``digest`` tells them apart."""

    find: Callable[[str], Path]
    survey: Callable[[str], tuple[B, int]]
    """Raises AdapterNotFound, AdapterInvalid. Gives what ``load`` wants, and the bytes it will take."""
    load: Callable[[B], A]
    digest: Callable[[A], str]


@dataclass(slots=True)
class Turn:
    """What became of sequences since the last turn."""

    ready: list[Sequence] = field(default_factory=list[Sequence])
    """Their adapters are loaded and pinned: to the scheduler with them."""
    withdrawn: list[Sequence] = field(default_factory=list[Sequence])
    """They have to leave the scheduler for a higher class whose adapter has no room; they wait here again."""
    failed: list[tuple[Sequence, GristmillError]] = field(
        default_factory=list[tuple[Sequence, GristmillError]]
    )
    """Their adapter cannot be used."""


@dataclass(slots=True)
class _Job(Generic[B, A]):
    """One adapter on its way in: surveyed, then waiting for room, then loaded."""

    name: str
    surveyed: Future[tuple[B, int]]
    loaded: Future[A] | None = None
    blocked_at: int | None = None
    """Set while pinned adapters leave no room: sequences that came later than this do not overtake."""


class AdapterDesk(Generic[B, A]):
    """Every sequence with an adapter is here or in the scheduler, and there it holds a pin on its adapter.

    Whoever waits is served by rank. Sequences whose adapter is loaded already go ahead of one that waits
    for room, as long as they were here before it began to wait; so it waits for those in hand, and no longer.
    A higher class does not even wait for them: lower ones give up their place, and their adapter.
    """

    def __init__(self, files: Files[B, A], pool: AdapterPool) -> None:
        self._files, self.pool = files, pool
        self.loaded: dict[str, A] = {}
        self.waiting: list[Sequence] = []
        self.loads = 0
        self._scheduled: dict[str, set[Sequence]] = {}
        self._digests: dict[str, str] = {}
        self._job: _Job[B, A] | None = None
        self._newest = -1
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters")

    def add(self, seq: Sequence) -> bool:
        """Take a sequence in. True: it may be scheduled at once. False: it waits here.

        Raises AdapterNotFound.
        """
        name = _name(seq)
        self._files.find(name)
        self._newest = max(self._newest, seq.number)
        if name in self.loaded and self._may_pass(seq):
            self._pin(seq)
            return True
        insort(self.waiting, seq, key=_rank)
        return False

    def remove(self, seq: Sequence) -> bool:
        """Forget a sequence. True: it waited here. False: it is the scheduler's, and its pin is gone now."""
        if seq in self.waiting:
            self.waiting.remove(seq)
            return True
        self._unpin(seq)
        return False

    def turn(self) -> Turn:
        """Look at what the thread has done, give it the next thing to do, and say what follows from it."""
        turn = Turn()
        if not self.waiting and self._job is None:
            return turn
        self._take_in(turn)
        for seq in list(self.waiting):
            if _name(seq) in self.loaded and self._may_pass(seq):
                self.waiting.remove(seq)
                self._pin(seq)
                turn.ready.append(seq)
        self._choose()
        self._make_room(turn)
        return turn

    def wait(self, timeout_s: float) -> None:
        """Until the thread has done something, at most so long."""
        job = self._job
        if job is not None:
            with suppress(TimeoutError, CancelledError):
                (job.loaded or job.surveyed).exception(timeout_s)

    def check(self) -> None:
        """Raise AssertionError unless the books balance."""
        self.pool.check()
        for name, seqs in self._scheduled.items():
            assert self.pool.pinned(name) == len(seqs) > 0, f"{name}: {len(seqs)} scheduled"
        assert self.waiting == sorted(self.waiting, key=_rank), "the desk lost its order"
        coming = {self._job.name} if self._job and self._job.loaded else set[str]()
        assert self.loaded.keys() | coming == self.pool.names, "held in memory and in the books differ"

    @property
    def scheduled(self) -> set[Sequence]:
        """Those that were let through and have not ended."""
        return {seq for seqs in self._scheduled.values() for seq in seqs}

    # ---- a turn's parts

    def _take_in(self, turn: Turn) -> None:
        """A load that has ended, well or not."""
        job = self._job
        if job is None:
            return
        if not job.surveyed.done() or (job.loaded is not None and not job.loaded.done()):
            return
        failure = _failure(job.loaded or job.surveyed, job.name)
        if failure is None and job.loaded is not None:
            failure = self._same_as_before(job.name, self._files.digest(job.loaded.result()))
        if failure is not None:
            self._fail(job.name, failure, turn)
        elif job.loaded is not None:
            self.loaded[job.name] = job.loaded.result()
            self.loads += 1
            self._job = None

    def _choose(self) -> None:
        """Begin with the adapter of whoever waits in front; a job that has not begun to load gives way."""
        wanted = next((name for seq in self.waiting if (name := _name(seq)) not in self.loaded), None)
        job = self._job
        if job is not None and (job.loaded is not None or job.name == wanted):
            return
        self._job = None
        if wanted is not None:
            self._job = _Job(wanted, self._thread.submit(self._files.survey, wanted))

    def _make_room(self, turn: Turn) -> None:
        """Once the size is known: give up others and load, or wait for the sequences that pin them."""
        job = self._job
        if job is None or job.loaded is not None or not job.surveyed.done() or job.surveyed.exception():
            return
        blueprint, size = job.surveyed.result()
        if size > self.pool.capacity:
            self._fail(job.name, _too_large(job.name, size, self.pool.capacity), turn)
            return
        given_up = self.pool.take(job.name, size)
        if given_up is None and self._withdraw(job.name, size, turn):
            given_up = self.pool.take(job.name, size)
        if given_up is None:
            job.blocked_at = self._newest if job.blocked_at is None else job.blocked_at
            return
        for name in given_up:
            del self.loaded[name]
        job.blocked_at = None
        job.loaded = self._thread.submit(self._files.load, blueprint)

    def _withdraw(self, name: str, size: int, turn: Turn) -> bool:
        """Take adapters from the lowest classes, if that makes room for the first that waits for ``name``."""
        urgency = next(seq for seq in self.waiting if _name(seq) == name).request.priority
        most_urgent = {
            other: min(seq.request.priority for seq in seqs) for other, seqs in self._scheduled.items()
        }
        lower = sorted(
            (other for other in most_urgent if most_urgent[other] > urgency), key=most_urgent.__getitem__
        )
        kept = self.pool.pinned_bytes(other for other in self._scheduled if other not in lower)
        if kept + size > self.pool.capacity:
            return False
        while lower and self.pool.pinned_bytes(self._scheduled) + size > self.pool.capacity:
            for seq in list(self._scheduled[lower.pop()]):
                self._unpin(seq)
                insort(self.waiting, seq, key=_rank)
                turn.withdrawn.append(seq)
        return True

    # ---- smaller things

    def _may_pass(self, seq: Sequence) -> bool:
        """Whether nobody waits for room who ranks before ``seq`` and has waited since before it came."""
        job = self._job
        if job is None or job.blocked_at is None or seq.number <= job.blocked_at:
            return True
        first = next((other for other in self.waiting if _name(other) == job.name), None)
        return first is None or seq.rank < first.rank

    def _fail(self, name: str, failure: GristmillError, turn: Turn) -> None:
        """Whoever waits for it ends; who asks for it later tries again."""
        if name in self.pool:
            self.pool.drop(name)
        turn.failed += [(seq, failure) for seq in self.waiting if _name(seq) == name]
        self.waiting = [seq for seq in self.waiting if _name(seq) != name]
        self._job = None

    def _same_as_before(self, name: str, digest: str) -> GristmillError | None:
        """Keys and values in the prefix cache were made with the first contents that a name had."""
        if self._digests.setdefault(name, digest) == digest:
            return None
        return AdapterInvalid(
            f"adapter {name!r} has changed on disk since it was first loaded; give the new one another name, "
            "or restart the worker"
        )

    def _pin(self, seq: Sequence) -> None:
        self.pool.pin(_name(seq))
        self._scheduled.setdefault(_name(seq), set()).add(seq)

    def _unpin(self, seq: Sequence) -> None:
        name = _name(seq)
        self.pool.unpin(name)
        self._scheduled[name].remove(seq)
        if not self._scheduled[name]:
            del self._scheduled[name]


def _name(seq: Sequence) -> str:
    assert seq.request.adapter is not None, f"{seq.id} has no adapter"
    return seq.request.adapter


def _rank(seq: Sequence) -> tuple[int, float, int]:
    return seq.rank


def _failure(future: Future[tuple[B, int]] | Future[A], name: str) -> GristmillError | None:
    """What the thread raised, as an error of the jobs that want this adapter. Raises what is our mistake."""
    exc = future.exception()
    if exc is None or isinstance(exc, GristmillError):
        return exc
    if isinstance(exc, Exception) and is_out_of_memory(exc):
        return AdapterInvalid(f"memory ran out while adapter {name!r} was loaded; lower lora_memory_mib")
    raise exc


def _too_large(name: str, size: int, capacity: int) -> AdapterInvalid:
    return AdapterInvalid(
        f"adapter {name!r} takes {size / 2**20:.1f} MiB and lora_memory_mib is {capacity / 2**20:g}; "
        "raise that"
    )
