"""What Celery makes of our requests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from celery.utils.saferepr import saferepr
from celery.worker.request import create_request_cls
from gristmill.worker.disposition import Disposition
from gristmill.worker.pool import EngineRequest


@pytest.mark.parametrize(
    ("returned", "done"),
    [(Disposition.ACK, ["ack"]), (Disposition.REQUEUE, ["requeue"]), (Disposition.DROP, ["leave"])],
)
def test_only_what_a_delivery_returned_decides_over_its_message(
    returned: Disposition, done: list[str]
) -> None:
    """Celery acknowledged whatever was returned: every job that a drain handed back was lost."""
    done_with: list[str] = []

    class Request(EngineRequest):
        id = "job-1"

        def __init__(self) -> None:
            """Without a message."""

        def acknowledge(self) -> None:
            done_with.append("ack")

        def reject(self, requeue: bool = False) -> None:
            done_with.append("requeue" if requeue else "reject")

        def _leave(self) -> None:
            done_with.append("leave")

    task = SimpleNamespace(time_limit=None, soft_time_limit=None, acks_late=True)
    pool = SimpleNamespace(apply_async=None)
    derived = create_request_cls(
        Request, task, pool, "host", None, trace=print, task_ready=lambda *_, **__: None
    )
    derived().on_success((False, saferepr(returned.value), 0.1))
    assert done_with == done
