"""The Celery bootstep that keeps a worker's claims: from the first one to the end of the process."""

# kombu and Celery carry no types that strict checking could use.
# pyright: basic
from __future__ import annotations

from typing import Any

from celery import bootsteps

from .broker import claims_of
from .claim_book import Renewer


class LeaseRenewer(bootsteps.StartStopStep):
    """Add it to ``app.steps["consumer"]``.

    Reconnecting stops and starts every step of the consumer, and a warm shutdown stops them while jobs
    still run: the renewal goes on through both. What was claimed and never started is handed back at the
    very end.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        self.claims = claims_of(consumer.app)
        self.renewer: Renewer | None = None

    def start(self, _consumer: Any) -> None:
        if self.renewer is None:
            self.renewer = Renewer(self.claims)
            self.renewer.start()

    def stop(self, _consumer: Any) -> None:
        """Nothing: see the class."""

    def shutdown(self, _consumer: Any) -> None:
        if self.renewer is not None:
            self.renewer.stop()
        try:
            self.claims.hand_back()
        except self.claims.errors:
            return  # the leases bring the messages back
