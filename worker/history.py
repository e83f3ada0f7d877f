"""History: what a job's log says of the attempts that ended without a result. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from ..schemas.events import Candidate, Crashed, Delta, Done, Event, Released, Started, Trial
from ..schemas.result import Crash

LOSSES_BEFORE_TRIAL = 2
"""Workers are killed for many reasons: only a job that two in a row did not survive is tried alone."""
KEPT = 20
"""Crashes that are remembered one by one."""


class History:
    """Folds a log into three answers: ``strikes``, ``doubtful`` and ``crashes``.

    An attempt without a token and without ``Released`` that was followed by another one was lost: its worker
    died, or stood still for longer than its lease. A lost one that was running alone counts as a strike, and
    so does each crash of an engine that ran this job alone.
    """

    def __init__(self, log: Iterable[Event] = ()) -> None:
        self.crashes: list[Crash] = []
        self.strikes = 0
        self._losses = 0
        self._crashed = False  # since the last token
        self._attempt: Started | None = None
        self._quiet = False  # no token and no last word from this attempt so far
        self._alone = False
        self._tokens: dict[int, int] = {}  # of each choice
        for event in log:
            self.take(event)
        self._close()

    @property
    def doubtful(self) -> bool:
        """It should run alone first: it may be what killed those before."""
        return self._crashed or self.strikes > 0 or self._losses >= LOSSES_BEFORE_TRIAL

    def take(self, event: Event) -> None:
        """The next entry."""
        match event:
            case Started():
                self._close()
                self._attempt, self._quiet, self._alone = event, True, False
            case Delta() | Candidate() | Done():
                self._quiet = self._alone = self._crashed = False
                self._losses = 0
                if not isinstance(event, Done):
                    ends = event.offset + len(event.ids)
                    self._tokens[event.choice] = max(self._tokens.get(event.choice, 0), ends)
            case Released():
                self._quiet = self._alone = False
            case Trial():
                self._alone = True
            case Crashed():
                self._alone = False
                self._crashed = True
                self._remember(Crash(**event.model_dump(exclude={"kind"})))
            case _:
                return

    def _close(self) -> None:
        """The attempt read so far is over: another one began, or the log ends."""
        if self._attempt is None or not self._quiet:
            return
        self._quiet = False
        self._losses += 1
        self._remember(
            Crash(
                code="worker_lost",
                worker=self._attempt.worker,
                alone=self._alone,
                tokens=sum(self._tokens.values()),
                at=self._attempt.at,
            )
        )

    def _remember(self, crash: Crash) -> None:
        self.strikes += crash.alone
        self.crashes = [*self.crashes, crash][-KEPT:]
