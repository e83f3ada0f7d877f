"""EngineListener: what the engine reports, into the running jobs' Generations."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

from ..engine.messages import Output, Request, Stats
from ..schemas.events import Crashed, Trial
from . import intake
from .engine_client import EngineClient, attempt_of
from .failures import condemn, crashed
from .generation import Generation
from .metrics import Metrics
from .publisher import Publisher
from .slots import Slots
from .trials import Verdict

log = logging.getLogger(__name__)


class EngineListener:
    """``EngineClient``'s Listener. Does no I/O: whatever comes out of it the publisher writes."""

    engine: EngineClient
    """Set by ``JobHandler.attach``: both are built around each other."""

    def __init__(
        self,
        worker_id: str,
        max_attempts: int,
        *,
        slots: Slots,
        publisher: Publisher,
        metrics: Metrics,
        on_capacity: Callable[[], None],
        on_gone: Callable[[str], None],
    ) -> None:
        self._worker_id, self._max_attempts = worker_id, max_attempts
        self._slots, self._publisher, self._metrics = slots, publisher, metrics
        self._on_capacity, self._on_gone = on_capacity, on_gone

    def on_step(self, outputs: list[Output], stats: Stats, now: float) -> None:
        """Tokens of one step: into their Generations, and the publisher is told when they are due."""
        aborts: list[str] = []
        due_at = math.inf
        with self._publisher.lock:
            for output in outputs:
                generation = self._slots.generation(output.id)
                if generation is None or generation.done is not None:  # nobody waits for it any more
                    if output.finish is None:  # it was submitted just as it was cancelled, say
                        aborts.append(output.id)
                    continue
                first = generation.first_token_at is None
                if over := self._push(generation, output, now):
                    aborts.append(over)
                if first and generation.first_token_at is not None:
                    self._metrics.on_first_token(now - generation.job.submitted_at)
                if (at := generation.due_at()) is not None and at < due_at:
                    due_at = at
            self._publisher.wake(due_at)
        for request_id in aborts:
            self.engine.abort(request_id)
        self._metrics.on_step(stats)
        self._on_capacity()

    def _push(self, generation: Generation, output: Output, now: float) -> str | None:
        """Its tokens into one Generation. Returns what ended by them, and the engine must be told."""
        try:
            return generation.push(output, now)
        except BaseException as exc:  # noqa: BLE001 - the panic of a Rust library is no Exception
            crashed(generation, exc, now)
            return generation.request_id

    def on_crash(self, reason: str, verdict: Verdict, now: float) -> set[str]:
        """The engine died: put it on record for the suspects. Returns those that are given up for it."""
        self._metrics.on_engine_restart()
        code, _, message = reason.partition(": ")
        given_up: set[str] = set()
        with self._publisher.lock:
            for attempt in verdict.suspects:
                generation = self._slots.generation(attempt)
                if generation is None or generation.done is not None:
                    continue
                alone, tokens = attempt == verdict.alone, generation.tokens
                generation.note(
                    Crashed(
                        code=code, message=message, worker=self._worker_id, alone=alone, tokens=tokens, at=now
                    )
                )
                if generation.history.strikes >= self._max_attempts:
                    condemn(generation, now)
                    given_up.add(attempt)
            self._publisher.wake()
        return given_up

    def arm(self, attempt: str) -> bool:
        """It is to run alone: should this worker die of it, the next one finds that in the log."""
        with self._publisher.lock:
            generation = self._slots.generation(attempt)
            if generation is None or generation.done is not None:
                return False
            generation.note(Trial(at=time.time()))
            self._publisher.wake()
            return True

    def awaits_record(self, attempt: str) -> bool:
        """It ran alone and lived: a worker that dies now must not leave a log that blames it."""
        with self._publisher.lock:
            generation = self._slots.generation(attempt)
            if generation is None or not generation.on_trial:
                return False
            slot = self._slots.of(generation)
            return slot is not None and not slot.ended.is_set()

    def on_trial_recorded(self, generation: Generation) -> None:
        """The publisher's answer to ``arm`` and to ``awaits_record``."""
        if generation.on_trial:
            log.info("job.tried_alone", extra={"job_id": generation.job.id, "attempt": generation.attempt})
            self.engine.armed(generation.request_id)
        else:
            self.engine.recorded()

    def resume(self, request_ids: set[str]) -> list[Request]:
        """What the engine has to continue of these, tokens so far included."""
        with self._publisher.lock:
            attempts = {attempt_of(request_id) for request_id in request_ids}
            running = [g for i in attempts if (g := self._slots.generation(i)) is not None]
            found = [request for g in running for request in intake.engine_requests(g)]
            return [request for request in found if request.id in request_ids]

    def on_engine_gone(self, reason: str) -> None:
        """No engine any more: let the worker end, which hands everything back."""
        self._on_gone(reason)
