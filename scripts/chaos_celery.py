"""Stock Celery on stock kombu's Redis transport, under the same faults: what the same jobs cost without us.

The task generates with our engine, in the worker's own process, and writes its result into a directory. The
settings are those that Celery's documentation gives for not losing tasks: ``acks_late``,
``reject_on_worker_lost``, a prefetch of one for each thread, a visibility timeout (the run's lease),
keepalives and health checks of the connection, retries of publishing. There is no renewal of leases in it, no
journal and no fence.

Run by ``celery -A chaos_celery worker``; what it needs comes through ``GM_CHAOS_…`` variables.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kombu.exceptions
import redis
from celery import Celery
from celery.signals import worker_init
from chaos_jobs import Asked
from chaos_stacks import Outcome, worker_env
from gristmill.engine.engine import Engine
from gristmill.engine.settings import EngineSettings
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.errors import BrokerUnavailable
from gristmill.schemas.job import Job
from gristmill.worker import intake
from gristmill.worker.generation import Generation

from tests.support.stack import Worker
from tests.support.valkey import Valkey

TASK, QUEUE, THREADS = "chaos.generate", "celery", 32
PUBLISH_RETRY = {"max_retries": 10, "interval_start": 0.2, "interval_step": 0.2, "interval_max": 1.0}


def make_app(socket: str, lease_s: float) -> Celery:
    """The same for the client and the workers."""
    app = Celery("chaos", broker=f"redis+socket://{socket}", set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={
            "visibility_timeout": lease_s,
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "retry_on_timeout": True,
            "health_check_interval": 5,
        },
        task_publish_retry=True,
        task_publish_retry_policy=PUBLISH_RETRY,
    )
    return app


# ---- the worker


@dataclass
class Running:
    """One task's generation; its thread waits for ``ended``."""

    generation: Generation
    ended: threading.Event = field(default_factory=threading.Event)


class EngineThread(threading.Thread):
    """The only thread that touches the engine."""

    def __init__(self, model: Path) -> None:
        super().__init__(daemon=True)
        settings = EngineSettings(
            model=str(model), dtype="float32", num_threads=1, max_num_seqs=64, max_total_tokens=1024
        )
        self.engine, self.tokenizer = Engine(settings), Tokenizer(model)
        self._inbox: queue.SimpleQueue[Running] = queue.SimpleQueue()
        self._running: dict[str, Running] = {}
        self._attempt = time.time_ns()

    def generate(self, job: Job) -> Generation:
        self._attempt += 1
        generation = Generation(job, self._attempt, 1, 0.0, self.tokenizer)
        prompt_ids = intake.encode(job, self.tokenizer, self.engine.info.vocab_size)
        generation.admit(prompt_ids, job.sampling.max_tokens or 0, 0.0)
        running = Running(generation)
        self._inbox.put(running)
        running.ended.wait()
        return generation

    def run(self) -> None:
        while True:
            self._take()
            for output in self.engine.step():
                running = self._running[output.id]
                if running.generation.push(output, 0.0):
                    self.engine.abort(output.id)
                if running.generation.done is not None:
                    del self._running[output.id]
                    running.ended.set()

    def _take(self) -> None:
        while not self._inbox.empty() or not self.engine.has_work:
            running = self._inbox.get()
            self._running[running.generation.request_id] = running
            self.engine.add(*intake.engine_requests(running.generation))


def worker_app() -> Celery:
    """What ``celery -A chaos_celery`` finds."""
    directory = Path(os.environ["GM_CHAOS_DIR"])
    app = make_app(os.environ["GM_CHAOS_SOCKET"], float(os.environ["GM_CHAOS_LEASE_S"]))
    engines: list[EngineThread] = []
    ledger = os.open(
        directory / "ledger" / f"{os.getpid()}.tasks.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND
    )

    def note(**what: Any) -> None:
        os.write(ledger, (json.dumps({"t": time.time(), **what}) + "\n").encode())

    def start(**_: Any) -> None:
        engines.append(EngineThread(Path(os.environ["GM_CHAOS_MODEL"])))
        engines[0].start()

    worker_init.connect(start, weak=False)

    def generate(task: Any, body: str) -> None:
        job = Job.from_json(body)
        note(claim=job.id, attempt=1)
        generation = engines[0].generate(job)
        path = directory / "results" / f"{job.id}.json"
        aside = path.with_name(f".{task.request.id}.{os.getpid()}.{time.time_ns()}")
        (one,) = generation.completions
        aside.write_text(json.dumps({"text": one.text, "ids": one.ids}))
        aside.rename(path)
        note(put=path.name)
        note(final=job.id)

    app.task(generate, bind=True, name=TASK, acks_late=True, reject_on_worker_lost=True)
    return app


# ---- the run


class StockCelery:
    """The side of a chaos run: see ``chaos_stacks.Side``."""

    ready_word = " ready."

    def __init__(self, broker: Valkey, directory: Path, model: Path, *, lease_s: float, small: bool) -> None:
        assert small, "the comparison is for the tiny model"
        self.model, self._directory, self._lease_s = model, directory, lease_s
        self._socket = str(broker.socket)
        self._app = make_app(self._socket, lease_s)
        self._redis = broker.client()

    def launch(self, number: int) -> Worker:
        argv = [sys.executable, "-m", "celery", "-A", "chaos_celery:app", "worker", "-P", "threads"]
        argv += ["-c", str(THREADS), "-n", f"w{number}@chaos", "-l", "INFO", "-Q", QUEUE]
        env = worker_env(
            self._directory,
            GM_CHAOS_DIR=self._directory,
            GM_CHAOS_SOCKET=self._socket,
            GM_CHAOS_LEASE_S=self._lease_s,
            GM_CHAOS_MODEL=self.model,
        )
        here = Path(__file__).resolve().parent
        env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(here), str(here.parent)])
        return Worker(number, argv, env, self._directory / "logs" / f"worker-{number}.log")

    def submit(self, one: Asked) -> None:
        """Raises BrokerUnavailable."""
        job = one.job().model_copy(update={"stream": False})
        try:
            self._app.send_task(TASK, args=[job.to_json()], task_id=job.id, queue=QUEUE)
        except (kombu.exceptions.OperationalError, redis.RedisError, OSError) as exc:
            raise BrokerUnavailable(f"stock Celery: {exc!r}") from exc

    def count_ended(self) -> int:
        return sum(not path.name.startswith(".") for path in (self._directory / "results").iterdir())

    def settled(self, _asked: Sequence[Asked]) -> bool:
        """Nothing waits, nothing is unacknowledged."""
        return self._redis.llen(QUEUE) == 0 and self._redis.hlen("unacked") == 0

    def outcome(self, one: Asked) -> Outcome:
        path = self._directory / "results" / f"{one.job_id}.json"
        if not path.exists():
            return Outcome(None, "unknown")
        result = json.loads(path.read_text())
        return Outcome(result["text"], "succeeded", result["ids"])

    def close(self) -> None:
        self._app.pool.force_close_all()
        self._app.close()


if "GM_CHAOS_DIR" in os.environ:
    app = worker_app()
