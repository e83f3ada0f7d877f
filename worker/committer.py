"""Committer: finished jobs' results into the store, however long that takes.

While the store is away results wait in the spool. One of their threads tries again with a growing pause; once
it succeeds, all go. A state server that is away is waited for in the same way, but then intake stops at once:
without it no job could be claimed.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from ..backends.sink import ResultSink
from ..schemas.errors import BrokerUnavailable, GristmillError, Misconfigured, Transient
from ..schemas.result import Result
from .metrics import Metrics
from .spool import Parcel, Spool

log = logging.getLogger(__name__)

PAUSE_FIRST_S, PAUSE_MAX_S = 0.05, 5.0
SAY_EVERY_S = 10.0
"""A store that fails every other time is not worth two lines each time."""
AT_ONCE = 32
"""Commits under way together: as many as the store's client has connections."""


class Committer:
    """Thread-safe. Law: a result leaves only when it is durable and its job final, or when we close."""

    def __init__(
        self,
        sink: ResultSink,
        metrics: Metrics,
        *,
        home: Path,
        worker_id: str,
        max_results: int,
        max_bytes: int,
        pause_max_s: float = PAUSE_MAX_S,
    ) -> None:
        self._sink, self._pause_max_s = sink, pause_max_s
        self.spool = Spool(
            home, worker_id, max_results=max_results, max_bytes=max_bytes, on_change=metrics.on_spool
        )
        self._changed = threading.Condition()
        self._closing = False
        self._under_way = 0
        self._failure: GristmillError | None = None  # the last one of an outage
        self._failing_since, self._said_at = 0.0, -SAY_EVERY_S
        self._prober: Parcel | None = None
        self._pause_s, self._retry_at = PAUSE_FIRST_S, 0.0

    def take(self, result: Result) -> Parcel:
        """Count a finished job's result in; ``commit`` it. The caller need not keep it."""
        return self.spool.add(result)

    def commit(self, parcel: Parcel) -> tuple[Result, bool] | None:
        """Wait until the result is durable and its job final; see ResultSink.commit. None: we are closing.

        Blocks as long as an outage lasts. Raises what is no outage.
        """
        try:
            if self._failure is not None or self._under_way >= AT_ONCE:
                parcel.put_away()
            while self._turn(parcel):
                if (committed := self._try(parcel)) is not None:
                    return committed
                parcel.put_away()
            return None
        finally:
            parcel.drop()

    def close(self) -> None:
        """Wait for no outage any more. While there is none, commits go on."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Finished jobs whose result is not durable."""
        return self.spool.results

    @property
    def failure(self) -> GristmillError | None:
        """Why results wait; None: they do not."""
        return self._failure

    @property
    def waits_for(self) -> str | None:
        """What finished jobs wait for, in words; None while they do not."""
        failure = self._failure
        if failure is None or not self.waiting:
            return None
        return f"results waiting to be stored: {self.waiting:,}; {failure.message}"

    @property
    def trouble(self) -> str | None:
        """Why no more jobs should be taken, in words; None while there is room for their results."""
        failure, full = self._failure, self.spool.full
        if isinstance(failure, BrokerUnavailable):
            return f"{self.waiting:,} finished jobs wait for the state server: {failure.message}"
        if full is not None:
            return f"{full}: {failure.message}" if failure else full
        return None

    # ---- turns

    def _turn(self, parcel: Parcel) -> bool:
        """Wait until ``parcel`` may be tried. False: we are closing, and there is an outage."""
        with self._changed:
            while not (self._closing and self._failure):
                if self._failure is None:
                    if self._under_way < AT_ONCE:
                        self._under_way += 1
                        return True
                    self._changed.wait()
                elif self._prober in (None, parcel):
                    self._prober = parcel
                    pause_s = self._retry_at - time.monotonic()
                    if pause_s <= 0:
                        self._under_way += 1
                        return True
                    self._changed.wait(pause_s)
                else:
                    self._changed.wait()
            return False

    def _try(self, parcel: Parcel) -> tuple[Result, bool] | None:
        """None: the other side is away."""
        failure: GristmillError | None = None
        try:
            ours = parcel.result()
            result, fresh = self._sink.commit(ours)
            return result, fresh or result == ours  # the answer to an earlier try may have been lost
        except (Transient, Misconfigured) as exc:  # a bucket or a password that is gone may come back
            failure = exc
            return None
        finally:
            self._tried(parcel, failure)

    def _tried(self, parcel: Parcel, failure: GristmillError | None) -> None:
        with self._changed:
            self._under_way -= 1
            if failure is None:
                self._recovered()
            else:
                self._failed(parcel, failure)

    def _failed(self, parcel: Parcel, failure: GristmillError) -> None:
        known, self._failure = self._failure, failure
        if self._closing:  # nobody waits for its end, nor for a place
            self._changed.notify_all()
        if known is None:
            self._failing_since, self._pause_s = time.monotonic(), PAUSE_FIRST_S
        elif self._prober is parcel:
            self._pause_s = min(2 * self._pause_s, self._pause_max_s)
        else:
            return  # it was under way when the outage began
        now = time.monotonic()
        self._retry_at = now + self._pause_s
        if now - self._said_at >= SAY_EVERY_S and (known is None or known.code != failure.code):
            self._said_at = now
            log.warning(
                "results.waiting",
                extra={"code": failure.code, "reason": failure.message, "results": self.waiting},
            )

    def _recovered(self) -> None:
        if self._failure is None:
            self._changed.notify()
            return
        self._failure = self._prober = None
        if self._said_at >= self._failing_since:
            outage_s = round(time.monotonic() - self._failing_since, 1)
            log.info("results.flow_again", extra={"outage_s": outage_s, "results": self.waiting})
        self._changed.notify(AT_ONCE)
