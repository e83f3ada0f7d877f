"""A broker, a state server and a store without a worker; and keepers. Time is the test's."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from celery import Celery
from gristmill.backends import broker
from gristmill.backends.dead import DeadLetters
from gristmill.backends.message_queue import ClaimedMessage, MessageQueue
from gristmill.backends.redis import connect
from gristmill.backends.segment_messages import lacking, send_segment
from gristmill.backends.sink import ResultSink
from gristmill.backends.state import State
from gristmill.backends.store import FileStore
from gristmill.keeper.batch_rounds import BatchRounds
from gristmill.keeper.finisher import Finisher
from gristmill.keeper.keeper import Keeper
from gristmill.keeper.settings import KeeperSettings
from gristmill.schemas import keys
from gristmill.schemas.job import Job, JobState
from gristmill.schemas.queues import queue_names
from gristmill.schemas.result import Result
from gristmill.schemas.settings import Settings
from gristmill.schemas.status import WorkerInfo

from .clock import Clock
from .valkey import Valkey

QUEUE = queue_names("tiny")[1]
WORKER = WorkerInfo(models=("tiny",), queues=tuple(queue_names("tiny")), host="here", pid=1, version="0")


class Fleet:
    """A broker, a state server and a store without a worker."""

    def __init__(self, valkey: Valkey, settings: Settings, root: Path) -> None:
        self.clock = Clock()
        self.valkey, self.settings = valkey, settings
        self.state = State(connect(valkey.url, settings), settings, clock=self.clock)
        self.store = FileStore(root)
        self.queue = MessageQueue(valkey.client(), lease_s=3)
        self.app: Celery = broker.make_app(settings)

    def keeper(self, name: str = "k1", **settings: Any) -> Keeper:
        return Keeper(
            KeeperSettings(keeper_every_s=0.1, keeper_threads=4, **settings),
            name,
            state=self.state,
            sink=ResultSink(self.state, self.store, inline_bytes=65_536),
            dead=DeadLetters(self.valkey.client()),
            queue=self.queue,
            prunes=True,
            batches=self.batch_rounds(name),
            check_store=self.store.check,
        )

    def batch_rounds(self, name: str = "k1", hold_s: float = 30.0) -> BatchRounds:
        finisher = Finisher(self.state.batches, self.store, name, hold_s)
        send, look = functools.partial(send_segment, self.app), functools.partial(lacking, self.app)
        return BatchRounds(self.state.batches, finisher, send, look, keeper_id=name, hold_s=hold_s)

    def submit(self, job: Job) -> Job:
        self.state.submit(job)
        broker.publish(self.app, QUEUE, job.to_json(), job.id, job.tenant)
        return job

    def claim(self) -> ClaimedMessage:
        message = self.queue.claim([QUEUE])
        assert isinstance(message, ClaimedMessage)
        return message

    def result(self, job: Job) -> Result | None:
        body = self.store.get(keys.result_object(job.id))
        return None if body is None else Result.from_json(body)

    def states(self, *jobs: Job) -> list[JobState | None]:
        return self.state.states([job.id for job in jobs])

    def close(self) -> None:
        broker.close(self.app)
        self.state.close()
