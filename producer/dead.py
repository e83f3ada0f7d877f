"""Dead: the dead letters as users handle them: look, send again, throw away."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..backends.dead import job_of
from ..schemas.dead import DeadLetter
from ..schemas.errors import BadInput, JobNotFound, WaitTimeout
from ..schemas.job import JOB_ID_PATTERN, Job
from ..schemas.queues import dead_queue_name, queue_names
from ..schemas.result import Result
from ..schemas.wire import shown
from .link import Link


@dataclass(frozen=True, slots=True)
class DeadJob:
    """A dead letter with what became of its job."""

    letter: DeadLetter
    job: Job | None
    """None: the message cannot be read."""
    result: Result | None
    """How the job ended, with its error and attempts; None: not yet, or it is gone."""


class Dead:
    """``client.dead``. Every call raises BrokerUnavailable and Misconfigured."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def list(self, *, model: str | None = None, queue: str | None = None) -> Iterator[DeadLetter]:
        """Dead letters, the newest of each queue first: of one queue, one model, or every known model."""
        letters = self._link.dead
        for name in self._queues(model, queue):
            yield from letters.letters(name)

    def find(self, name: str, *, model: str | None = None, queue: str | None = None) -> DeadLetter:
        """One by its id or its job's. Raises JobNotFound."""
        for letter in self.list(model=model, queue=queue):
            if name in (letter.id, letter.job_id):
                return letter
        raise JobNotFound(f"no dead letter has the id {shown(name)}, nor is one of a job of that id")

    def show(self, name: str, *, model: str | None = None, queue: str | None = None) -> DeadJob:
        """One, with its job and the job's result. Raises JobNotFound."""
        letter = self.find(name, model=model, queue=queue)
        try:
            job = job_of(letter)
        except BadInput:
            job = None
        known = letter.job_id if letter.job_id is not None and _is_id(letter.job_id) else None
        body = None if known is None else self._link.result_body(known)
        return DeadJob(letter, job, None if body is None else Result.from_json(body))

    def requeue(self, letter: DeadLetter) -> Job:
        """Send its job again, as a new one with ``retry_of`` and a fresh expiry; then forget the letter.

        The new id follows from the letter, so that doing it twice, or dying in between, makes one job.
        Raises BadInput for a message without a job, WaitTimeout while the old job has no final state.
        """
        self._check_ended([letter])
        old = job_of(letter)
        now = time.time()
        job = old.model_copy(
            update={
                "id": _retry_id(letter),
                "submitted_at": now,
                "expires_at": now + self._link.settings.job_ttl_s,
                "idempotency_key": None,
                "retry_of": old.id,
            }
        )
        self._link.submit(job)
        self._link.dead.remove(letter.queue, letter.id)
        return job

    def purge(self, letters: Sequence[DeadLetter]) -> int:
        """Forget them for good; their jobs' results stay. Returns how many there were.

        Raises WaitTimeout, before anything is gone, while one of their jobs has no final state.
        """
        self._check_ended(letters)
        return sum(self._link.dead.remove(letter.queue, letter.id) for letter in letters)

    def _check_ended(self, letters: Sequence[DeadLetter]) -> None:
        """A job must have its end before its last trace goes. Its worker, or a keeper, writes it."""
        for letter in self._link.dead.awaiting(letters):
            if letter.job_id is None or not _is_id(letter.job_id):
                continue
            state = self._link.state.states([letter.job_id])[0]
            if state.final if state is not None else self._link.result_body(letter.job_id) is not None:
                continue
            raise WaitTimeout(
                f"{letter.job_id} has no final state yet; a keeper gives it one within seconds. "
                "Is there a worker, or a `gristmill-keeper`? `gristmill-keeper --once` does it now"
            )

    def _queues(self, model: str | None, queue: str | None) -> Sequence[str]:
        if queue is not None:
            return (queue,)
        names = (model,) if model is not None else sorted(self._link.state.models())
        return [queue for name in names for queue in (*queue_names(name), dead_queue_name(name))]


def _is_id(name: str) -> bool:
    return re.fullmatch(JOB_ID_PATTERN, name) is not None


def _retry_id(letter: DeadLetter) -> str:
    return "job_" + hashlib.sha256(f"dead\0{letter.queue}\0{letter.id}".encode()).hexdigest()[:32]
