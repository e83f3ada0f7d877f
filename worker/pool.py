"""Celery's side of a delivery: a thread per job in hand, and a request that carries out dispositions."""

# Celery carries no types that strict checking could use.
# pyright: basic
from __future__ import annotations

import logging
from typing import Any

from celery.concurrency.thread import TaskPool
from celery.utils.saferepr import saferepr
from celery.worker.request import Request
from celery.worker.state import task_ready

from .disposition import MAX_ATTEMPTS, Disposition

log = logging.getLogger(__name__)

RETURNED = {saferepr(each.value): each for each in Disposition}
"""Celery hands over what a task returned as its repr."""


class EnginePool(TaskPool):
    """Threads that wait for the engine. More of them than the engine has places: never the limit."""

    def on_stop(self) -> None:
        """Do not wait for threads: the worker has handed back or finished whatever ran in them."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        self._state = self.TERMINATE


class EngineRequest(Request):
    """Acknowledges on ``ACK`` only, hands back on ``REQUEUE`` only, buries on ``BURY``, else touches nothing.

    Stock Celery acknowledges or rejects on every ordinary way out, failures and timeouts included: a bug of
    ours would then lose jobs. Here it costs a redelivery when the lease runs out.
    """

    def __init_subclass__(cls) -> None:
        """Celery derives a class for each task, whose ``on_success`` acknowledges whatever was returned."""
        cls.on_success = EngineRequest.on_success

    def revoked(self) -> bool:
        """Remote ``revoke`` would acknowledge a job that has no result: see ``terminate``."""
        return False

    def on_success(self, failed__retval__runtime: tuple[bool, Any, float], **_: Any) -> None:
        """Carry out what the task returned."""
        task_ready(self)
        failed, returned, runtime = failed__retval__runtime
        try:
            self._carry_out(failed, returned if failed else RETURNED.get(returned, returned), runtime)
        except Exception:  # the pool would swallow it, and the claim be renewed for ever
            log.critical("delivery.crashed", exc_info=True, extra={"job_id": self.id})
            self._leave()

    def _carry_out(self, failed: bool, value: Any, _runtime: float) -> None:
        match None if failed else value:
            case Disposition.ACK:
                self.acknowledge()
            case Disposition.REQUEUE:
                self.reject(requeue=True)
            case Disposition.BURY:
                self._bury()
            case Disposition.DROP:
                self._leave()
            case _:
                log.error("task.crashed", extra={"job_id": self.id, "reason": repr(value)})
                self._leave()

    def on_failure(self, exc_info: Any, *_: Any, **__: Any) -> None:
        """A crash of the task itself, never of a job: the message comes back with its lease."""
        log.error("task.crashed", extra={"job_id": self.id, "reason": repr(exc_info)})
        task_ready(self)
        self._leave()

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """No time limits are set: deadlines are the job's own and end in a result."""

    def terminate(self, pool: Any, signal: Any = None) -> None:
        """Remote ``revoke(terminate=True)``: not the way to cancel; the state's cancel flag is."""

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """Cold shutdown: whatever still runs comes back with its lease."""

    def _bury(self) -> None:
        """To the dead letters, once."""
        if not self.acknowledged:
            self.acknowledged = True
            self.message.channel.qos.bury(self.message.delivery_tag, MAX_ATTEMPTS)

    def _leave(self) -> None:
        """Stop renewing; acknowledge nothing."""
        channel = self.message.channel
        if channel is not None:
            channel.qos.leave(self.message.delivery_tag)
