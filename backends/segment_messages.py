"""Messages of segments: what tells workers that rows of a batch are theirs to validate or to run."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ..schemas.batch import Batch, Phase, Segment
from ..schemas.job import Priority
from ..schemas.queues import queue_name
from ..schemas.settings import Settings

if TYPE_CHECKING:
    from celery import Celery  # pyright: ignore[reportMissingTypeStubs]  # celery ships none


def send_segment(app: Celery, batch: Batch, segment_id: str, phase: Phase) -> None:
    """Have the broker accept it. A second message of a segment does no harm. Raises BrokerUnavailable."""
    from .broker import publish

    body = Segment(id=segment_id, phase=phase).to_json()
    queue = queue_name(batch.model, Priority.BATCH)
    publish(app, queue, body, segment_id, batch.tenant, Priority.BATCH)


def lacking(app: Celery, batch: Batch, segments: Collection[str]) -> set[str]:
    """Those segments that plainly have no message, waiting or claimed. Raises BrokerUnavailable."""
    from . import broker

    return broker.lacking(app, queue_name(batch.model, Priority.BATCH), batch.tenant, segments)


class SegmentSender:
    """Both with a connection of their own, made when it is first needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app: Celery | None = None

    def __call__(self, batch: Batch, segment_id: str, phase: Phase) -> None:
        """See ``send_segment``."""
        send_segment(self._connected(), batch, segment_id, phase)

    def lacking(self, batch: Batch, segments: Collection[str]) -> set[str]:
        """See above."""
        return lacking(self._connected(), batch, segments)

    def _connected(self) -> Celery:
        from .broker import make_app

        self._app = self._app or make_app(self._settings)
        return self._app

    def close(self) -> None:
        """Let go of it."""
        from .broker import close

        if self._app is not None:
            close(self._app)
            self._app = None
