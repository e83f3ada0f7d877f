"""SqsDead: what SQS gave up on, taken out of the models' dead-letter queues into our dead letters.

Recorded first, deleted second. A request that lay in the result store is put back into its message, so that
a dead letter can be sent again as it is; its object goes once the job has ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

from ..schemas.dead import DeadLetter
from ..schemas.job import DEFAULT_TENANT
from ..schemas.queues import TENANT_HEADER, dead_queue_name
from ..schemas.settings import Settings
from .dead import DeadLetters
from .sqs_queues import BATCH, SqsMessage, SqsQueues
from .sqs_requests import LargeRequests

EVERY_S = 60.0
"""Each look at a queue is a request that AWS counts."""
AT_ONCE = 50
"""Messages that one ``drain`` takes out: a queue of thousands must not hold up what else its caller does."""
LEASE_S = 60.0
"""What was not deleted by then comes again."""


class SqsDead:
    """Keeps its connections. Thread-safe, but for two drains of one model at a time.

    Raises BrokerUnavailable (SQS or the letters' server), StoreUnavailable, Misconfigured.
    """

    def __init__(
        self, settings: Settings, letters: DeadLetters, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._queues, self._requests = SqsQueues(settings), LargeRequests(settings)
        self._letters, self._clock = letters, clock
        self._look_at: dict[str, float] = {}

    def due(self, models: Iterable[str]) -> list[str]:
        """Those whose queue has not been looked at for ``EVERY_S``, the longest first."""
        now = self._clock()
        due = [model for model in models if self._look_at.get(model, now) <= now]
        return sorted(due, key=lambda model: self._look_at.get(model, float("-inf")))

    def drain(self, model: str) -> bool:
        """Record and delete up to ``AT_ONCE`` messages. True: there may be more.

        A queue that does not exist holds nothing.
        """
        self._look_at[model] = self._clock() + EVERY_S
        queue = dead_queue_name(model)
        if self._queues.find(queue) is None:
            return False
        for _ in range(AT_ONCE // BATCH):
            messages = self._queues.receive(queue, count=BATCH, lease_s=LEASE_S, wait_s=1)
            if not messages:
                return False
            for message in messages:
                self._record(message)
            self._queues.delete(messages)
        self._look_at[model] = self._clock()
        return True

    def forget(self, letter: DeadLetter) -> None:
        """Its job has ended: the object that had its request, if there was one, may go."""
        message = _read(letter.payload)
        if message is not None and (name := self._requests.name_in(message)) is not None:
            self._requests.remove(name)

    def close(self) -> None:
        """Close the connections."""
        self._queues.close()

    def _record(self, received: SqsMessage) -> None:
        message = _read(received.body)
        headers: dict[str, Any] = {} if message is None else message["headers"]
        payload = received.body if message is None else self._filled_in(message) or received.body
        job_id, tenant = headers.get("id"), headers.get(TENANT_HEADER)
        self._letters.add(
            received.queue,
            received.message_id,
            payload,
            tenant=tenant if isinstance(tenant, str) else DEFAULT_TENANT,
            reason=f"received {received.receives:,} times",
            job_id=job_id if isinstance(job_id, str) else None,
        )

    def _filled_in(self, message: dict[str, Any]) -> str | None:
        """None: its request does not lie elsewhere, or nobody can tell where."""
        if self._requests.name_in(message) is None:
            return None
        try:
            return json.dumps(self._requests.fill_in(message), separators=(",", ":"))
        except (ValueError, KeyError, TypeError):
            return None


def _read(text: str) -> dict[str, Any] | None:
    """A message as kombu wrote it; None: it is none."""
    try:
        message: Any = json.loads(text)
    except ValueError:
        return None
    known = isinstance(message, dict) and isinstance(cast("dict[str, Any]", message).get("headers"), dict)
    return cast("dict[str, Any]", message) if known else None
