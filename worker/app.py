"""WorkerApp: builds the worker out of its parts and runs it. START HERE for how they hang together.

Celery consumer ─► EnginePool thread ─► JobHandler.handle ─► EngineClient ═ engine process
      ▲ claims only when                     │ waits               │ every step
      │ claimable()                          ▼                     ▼
      └──────── ack ◄───── ResultSink ◄── journal complete ◄── Publisher
"""

# Celery carries no types that strict checking could use.
# pyright: basic
from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from celery import Celery
from celery.worker import state as celery_state

from ..backends import broker, models
from ..backends.lease import LeaseRenewer
from ..backends.progress import LoggedProgress
from ..backends.sink import ResultSink
from ..backends.state import State, open_state
from ..backends.store import ResultStore, open_store
from ..engine.messages import EngineInfo
from ..engine.tokenizer import Tokenizer
from ..keeper.keeper import ID_PREFIX, keep
from ..keeper.settings import shared_settings
from ..schemas import queues
from ..schemas.errors import GristmillError
from . import spool
from .capacity import max_places
from .engine_client import EngineClient
from .fingerprint import fingerprint
from .handler import JobHandler
from .health import HealthServer
from .lifecycle import Lifecycle
from .metrics import Metrics
from .pool import EnginePool, EngineRequest
from .settings import WorkerSettings

log = logging.getLogger(__name__)

LOOP_SLOW_S, LOOP_HUNG_S = 10.0, 120.0
"""It turns every second. After an outage kombu may take half a minute to connect again."""


class WorkerApp:
    """One model, one engine, one consumer."""

    def __init__(self, settings: WorkerSettings) -> None:
        self.settings = settings
        self.model_name = settings.model_name
        self.queues = queues.queue_names(self.model_name)
        self.worker_id = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.metrics = Metrics(self.model_name)
        self._gate = broker.Gate()

    def run(self) -> int:
        """Serve until told to stop. Returns the exit code. Raises GristmillError if it cannot start."""
        started = time.monotonic()
        shared_settings(self.settings)  # its keeper's: what is wrong there is said now, and not in a log line
        model_dir = self._model_dir()
        spool.remove_dead(self.settings.home)
        state, store = open_state(self.settings), open_store(self.settings.results, self.settings)
        handler = self._handler(state, store, model_dir)
        handler.attach(
            EngineClient(
                self.settings.engine(model_dir),
                handler.listener,
                start_timeout_s=self.settings.engine_start_s,
                stall_s=self.settings.engine_stall_s,
                restarts=self.settings.engine_restarts,
            )
        )
        handler.engine.launch()  # torch loads in the child while Celery and the rest load here
        try:
            store.check()
            state.ping()
            app = self._celery(handler)
            self._waiting(
                app
            )  # a queue that is missing, or not ours to read, is found before the engine is up
            info = handler.engine.wait_ready()
            handler.fingerprint = fingerprint(model_dir, self.settings, info.dtype)
            self._started(info, started)
            return self._serve(app, state, handler)
        finally:
            handler.engine.stop()
            handler.committer.spool.close()
            state.close()

    def _model_dir(self) -> Path:
        assert self.settings.model is not None, "model_name has refused this"
        name, revision = self.settings.model, self.settings.revision
        return models.ensure(name, revision, LoggedProgress("model.fetch", model=name), self.settings)

    def _handler(self, state: State, store: ResultStore, model_dir: Path) -> JobHandler:
        return JobHandler(
            self.settings,
            self.worker_id,
            state=state,
            sink=ResultSink(state, store, inline_bytes=self.settings.inline_result_bytes),
            tokenizer=Tokenizer(model_dir),
            metrics=self.metrics,
            on_capacity=self._gate.poke,
            on_gone=lambda reason: self._lifecycle.give_up(reason),
        )

    def _celery(self, handler: JobHandler) -> Celery:
        app = broker.make_app(self.settings, gate=self._gate, queue_names=self.queues)
        broker.claims_of(app).on_overdue = handler.give_back
        app.steps["consumer"].add(LeaseRenewer)  # pyright: ignore[reportOptionalSubscript] - a dict of sets

        def generate(task: Any, body: str) -> str:
            return handler.handle(task.request.id, body).value

        app.task(generate, bind=True, name=queues.TASK, Request=EngineRequest, acks_late=True)
        return app

    def _started(self, info: EngineInfo, started: float) -> None:
        self.metrics.on_ready(info)
        log.info(
            "worker.engine_ready",
            extra={
                "model": self.model_name,
                "dtype": info.dtype,
                "attention": info.attention,
                "max_model_len": info.max_model_len,
                "kv_tokens": info.num_blocks * info.block_size,
                "start_s": round(time.monotonic() - started, 2),
            },
        )

    def _serve(self, app: Celery, state: State, handler: JobHandler) -> int:
        self._lifecycle = lifecycle = Lifecycle(
            self.settings,
            self.worker_id,
            state=state,
            handler=handler,
            queues=self.queues,
            waiting=lambda: self._waiting(app),
            exit_loop=self._exit_loop,
        )
        self._gate.claimable = lambda: self._claimable(lifecycle, handler)
        controller = self._controller(app, handler)
        health = self._health(app, state, handler)
        leave = threading.Event()
        handler.publisher.start()
        health.start()
        lifecycle.install_signal_handlers()
        threading.excepthook = lifecycle.on_thread_died
        lifecycle.start()
        if self.settings.keeper:
            args = (self.settings, f"{ID_PREFIX}{self.worker_id}", leave)
            threading.Thread(target=keep, args=args, name="keeper", daemon=True).start()
        address = f"{self.settings.health_host}:{health.port}"
        log.info("worker.ready", extra={"worker": self.worker_id, "queues": self.queues, "health": address})
        try:
            controller.start()
        finally:
            leave.set()
            lifecycle.finish(int(controller.exitcode or 0))
            health.stop()
            handler.publisher.stop()
        return lifecycle.exit_code

    def _controller(self, app: Celery, handler: JobHandler) -> Any:
        """Celery's worker, which claims and waits in as many threads as there can be deliveries."""
        places = len(self.queues) * max_places(
            handler.engine.info, most=self.settings.max_concurrent_requests
        )
        return app.WorkController(
            pool_cls=EnginePool,
            # A thread for each job that runs, was evicted or waits to be stored: more than are let in.
            concurrency=places + 16 + self.settings.spool_max_results,
            queues=self.queues,
            hostname=self.worker_id,
            without_mingle=True,
            without_gossip=True,
            without_heartbeat=True,
            loglevel="WARNING",
        )

    def _health(self, app: Celery, state: State, handler: JobHandler) -> HealthServer:
        return HealthServer(
            self.settings.health_host,
            self.settings.health_port,
            self.metrics.registry,
            live=lambda: self._dead(handler, app),
            ready=lambda: self._not_ready(state, handler),
        )

    def _claimable(self, lifecycle: Lifecycle, handler: JobHandler) -> list[str]:
        """The queues of those classes that have room, the most urgent first."""
        if lifecycle.draining:
            return []
        return [queues.queue_name(self.model_name, priority) for priority in handler.claimable()]

    def _waiting(self, app: Celery) -> int:
        """Messages that nobody has claimed, in all our queues."""
        waiting = {queue: broker.depth(app, queue) for queue in self.queues}
        for queue, messages in waiting.items():
            self.metrics.on_queue_depth(queue, "ready", messages)
        return sum(waiting.values())

    def _not_ready(self, state: State, handler: JobHandler) -> str | None:
        """Why this worker should not count on getting work, or None."""
        if self._lifecycle.draining:
            return "draining"
        if not handler.engine.ready:
            return "the engine is starting"
        if (still_s := self._gate.still_s()) > LOOP_SLOW_S:
            return f"the consumer's loop has not turned for {still_s:.0f} s"
        try:
            state.ping()
        except GristmillError as exc:
            return exc.message
        return handler.trouble

    def _dead(self, handler: JobHandler, app: Celery) -> str | None:
        """Why only a restart can help, or None. A loop that reconnects stands still, too, and needs none."""
        if not handler.engine.alive:
            return "the engine process is gone"
        still_s = self._gate.still_s()
        if still_s > LOOP_HUNG_S and not broker.claims_of(app).troubled:
            return f"the consumer's loop has not turned for {still_s:.0f} s although the broker answers"
        return None

    def _exit_loop(self) -> None:
        """Make Celery's loop end by itself: it looks at this flag on each turn."""
        celery_state.should_stop = 0
        self._gate.poke()
