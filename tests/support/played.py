"""A delivery handler whose engine the test plays: real state and store, no model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends.sink import ResultSink
from gristmill.backends.state import State
from gristmill.backends.store import FileStore
from gristmill.engine.messages import EngineInfo, Output, Request, Stats
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas import keys
from gristmill.schemas.job import Job
from gristmill.schemas.result import Result
from gristmill.worker.disposition import Disposition
from gristmill.worker.handler import JobHandler
from gristmill.worker.metrics import Metrics
from gristmill.worker.settings import WorkerSettings

from .waiting import wait_until

STATS = Stats(running=1, waiting=0, free_blocks=9, total_blocks=10, preemptions=0, step_s=0.01, tokens=1)


class PlayedEngine:
    """What the handler needs of an EngineClient. Makes no token by itself."""

    ready = True
    on_trial = False
    stats = None
    info = EngineInfo(
        vocab_size=49_152,
        max_model_len=2048,
        num_blocks=100,
        block_size=16,
        max_num_seqs=16,
        step_tokens=512,
        dtype="float32",
        attention="torch",
        eos_token_ids=[0],
        load_s={},
    )

    def __init__(self) -> None:
        self.submitted: dict[str, Request] = {}
        self.aborted: list[str] = []
        self.suspects: set[str] = set()

    def submit(self, *requests: Request, suspect: bool = False) -> None:
        job_id = requests[0].id.partition("@")[0]
        self.submitted[job_id] = requests[0]
        if suspect:
            self.suspects.add(job_id)

    def submit_all(self, attempts: Sequence[tuple[Sequence[Request], bool]]) -> None:
        for requests, suspect in attempts:
            self.submit(*requests, suspect=suspect)

    def abort(self, request_id: str) -> None:
        self.aborted.append(request_id)


class Played:
    """A handler whose deliveries run on threads, as Celery's would."""

    def __init__(self, state: State, root: Path, tokenizer: Tokenizer, **knobs: Any) -> None:
        self.store = FileStore(root)
        self.engine = PlayedEngine()
        self.handler = JobHandler(
            WorkerSettings(model="m", home=root.parent / "home", **knobs),
            "w1",
            state=state,
            sink=ResultSink(state, self.store, inline_bytes=65_536),
            tokenizer=tokenizer,
            metrics=Metrics("m"),
            on_capacity=lambda: None,
            on_gone=lambda _reason: None,
        )
        self.handler.attach(self.engine)  # type: ignore[arg-type]
        self.threads = ThreadPoolExecutor(48)

    def deliver(self, job: Job) -> Future[Disposition]:
        return self.threads.submit(self.handler.handle, job.id, job.to_json())

    def running(self, job: Job) -> Request:
        return wait_until(lambda: self.engine.submitted.get(job.id), 5, "the engine has the job")

    def step(self, job: Job, token: int, **more: Any) -> None:
        request = self.engine.submitted[job.id]
        self.handler.listener.on_step([Output(id=request.id, token_ids=[token], **more)], STATS, time.time())

    def result(self, job_id: str) -> Result:
        body = self.store.get(keys.result_object(job_id))
        assert body is not None
        return Result.from_json(body)

    def close(self) -> None:
        self.handler.hand_back(flush_s=0.1)
        self.threads.shutdown()
        self.handler.publisher.stop()


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Tokenizer:
    """The real model's."""
    return Tokenizer(smollm2)


@pytest.fixture
def played(state: State, tmp_path: Path, tokenizer: Tokenizer) -> Iterator[Played]:
    """Its publisher runs."""
    played = Played(state, tmp_path, tokenizer)
    played.handler.publisher.start()
    yield played
    played.close()
