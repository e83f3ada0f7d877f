"""Link: what a client is connected to. Broker, state and result store, each opened when first needed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from ..schemas import keys
from ..schemas.batch import row_of
from ..schemas.job import Job
from ..schemas.queues import queue_name
from ..schemas.settings import Settings
from ..schemas.status import JobStatus

EMBEDDED = "embedded:"

if TYPE_CHECKING:
    from celery import Celery  # pyright: ignore[reportMissingTypeStubs]  # celery ships none

    from ..backends.dead import DeadLetters
    from ..backends.embedded import Endpoint
    from ..backends.outbox import Outbox
    from ..backends.state import State
    from ..backends.store import ResultStore


def shown(url: str) -> str:
    """A broker's or store's URL as it may be said: without passwords."""
    from ..backends.redis import redact

    return url if url.startswith(EMBEDDED) else redact(url)


class Link:
    """Thread-safe. Opens lazily, for the imports: Celery and boto3 take longer to load than a job to send."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.RLock()
        self._state: State | None = None
        self._store: ResultStore | None = None
        self._dead: DeadLetters | None = None
        self._outbox: Outbox | None = None
        self._app: Celery | None = None

    @property
    def state(self) -> State:
        """Raises BrokerUnavailable (an embedded one that does not start), Misconfigured."""
        from ..backends.state import open_state

        with self._lock:
            self._state = self._state or open_state(self.settings)
            return self._state

    @property
    def store(self) -> ResultStore:
        """Raises Misconfigured."""
        from ..backends.store import open_store

        with self._lock:
            self._store = self._store or open_store(self.settings.results, self.settings)
            return self._store

    @property
    def dead(self) -> DeadLetters:
        """Raises BrokerUnavailable (an embedded one that does not start), Misconfigured."""
        from ..backends.dead import open_dead

        with self._lock:
            self._dead = self._dead or open_dead(self.settings)
            return self._dead

    @property
    def outbox(self) -> Outbox:
        """Raises BrokerUnavailable (an embedded one that does not start), Misconfigured."""
        from ..backends.outbox import open_outbox

        with self._lock:
            self._outbox = self._outbox or open_outbox(self.settings)
            return self._outbox

    @property
    def app(self) -> Celery:
        """The Celery application that messages go out by."""
        from ..backends.broker import make_app

        with self._lock:
            self._app = self._app or make_app(self.settings)
            return self._app

    def submit(self, job: Job) -> bool:
        """Record the job, then put its message into the broker: when this returns, the job is accepted.

        False: it was known already. The message is sent all the same, since the first may never have arrived;
        a claim tells twins apart. Raises BrokerUnavailable, IdempotencyConflict.
        """
        from ..backends.broker import publish

        fresh = self.state.submit(job)
        queue = queue_name(job.model, job.priority)
        publish(self.app, queue, job.to_json(), job.id, job.tenant, job.priority)
        return fresh

    def queue_is_paused(self, status: JobStatus) -> bool:
        """Whether the queue of a waiting job is paused; False if its status does not say which that is."""
        from ..backends import broker

        if status.model is None or status.priority is None:
            return False
        return broker.paused(self.app, queue_name(status.model, status.priority))

    def result_body(self, job_id: str) -> str | bytes | None:
        """A finished job's result as JSON: the copy in Redis, else the store's object. None: not there."""
        return self.state.result(job_id) or self.stored_body(job_id)

    def stored_body(self, job_id: str) -> str | bytes | None:
        """The same of the store alone; of a batch's row, from the object that has its line."""
        from ..backends.row_results import row_result

        body = self.store.get(keys.result_object(job_id))
        if body is not None or row_of(job_id) is None:
            return body
        row = row_result(self.state.batches, self.store, job_id)
        return None if row is None else row.to_json()

    def embedded_endpoint(self) -> Endpoint | None:
        """Where the embedded broker listens; None if the broker is a real one, or does not run."""
        from ..backends.embedded import read_endpoint

        if not self.settings.broker.startswith(EMBEDDED):
            return None
        return read_endpoint(Path(self.settings.broker.removeprefix(EMBEDDED)).expanduser().absolute())

    def close(self) -> None:
        """Let go of what was opened. It opens again when it is used again."""
        with self._lock:
            app, state, dead, outbox = self._app, self._state, self._dead, self._outbox
            self._app = self._state = self._store = self._dead = self._outbox = None
        if app is not None:
            from ..backends import broker

            broker.close(app)
        for opened in (state, dead, outbox):
            if opened is not None:
                opened.close()
