"""The queues of a model on SQS: create them, say what they hold, and drain the dead-letter queue."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from ..schemas.errors import Misconfigured
from ..schemas.queues import TENANT_HEADER, dead_queue_name, queue_names
from ..schemas.settings import Settings
from .sqs_queues import BATCH, SqsMessage, SqsQueues, whole_seconds

RETENTION_S = 14 * 86_400
"""As long as SQS keeps a message; a job's default time to live."""
MAX_RECEIVES = 1000
"""As many as SQS allows: claims that were handed back count too, and are no fault of the message."""
DRAIN_LEASE_S = 60.0


@dataclass(frozen=True, slots=True)
class Created:
    """One queue, and whether it is new."""

    name: str
    url: str
    created: bool


@dataclass(frozen=True, slots=True)
class DeadMessage:
    """A message that SQS gave up on. ``job_id`` and ``tenant`` are None where it cannot be read.

    ``queue`` is the dead-letter queue it lies in; ``message_id`` is SQS's own, and stays the same.
    """

    queue: str
    message_id: str
    body: str
    receives: int
    job_id: str | None
    tenant: str | None
    _queues: SqsQueues
    _message: SqsMessage

    def delete(self) -> None:
        """Take it out of SQS, once it is recorded elsewhere. Raises BrokerUnavailable."""
        self._queues.delete([self._message])


def create_queues(settings: Settings, model: str, *, max_receives: int = MAX_RECEIVES) -> list[Created]:
    """The model's three queues and the dead-letter queue behind them, with our attributes. Idempotent.

    Raises Misconfigured, BrokerUnavailable.
    """
    queues = SqsQueues(settings)
    try:
        dead = _create(queues, dead_queue_name(model), {"MessageRetentionPeriod": str(RETENTION_S)})
        with queues.errors(dead.name):
            attributes = queues.client().get_queue_attributes(QueueUrl=dead.url, AttributeNames=["QueueArn"])
        redrive = {
            "deadLetterTargetArn": attributes["Attributes"]["QueueArn"],
            "maxReceiveCount": str(max_receives),
        }
        wanted = {
            "MessageRetentionPeriod": str(RETENTION_S),
            # A receive names its own lease; this is for consumers that do not.
            "VisibilityTimeout": str(whole_seconds(settings.visibility_timeout_s)),
            "ReceiveMessageWaitTimeSeconds": "20",
            "RedrivePolicy": json.dumps(redrive),
        }
        return [*(_create(queues, name, wanted) for name in queue_names(model)), dead]
    finally:
        queues.close()


def drain_dead(settings: Settings, model: str) -> Iterator[DeadMessage]:
    """What lies in the model's dead-letter queue. Record each elsewhere, then ``delete`` it.

    One that is not deleted within ``DRAIN_LEASE_S`` comes again. A queue that does not exist holds nothing.
    Raises BrokerUnavailable, Misconfigured.
    """
    queue = dead_queue_name(model)
    queues = SqsQueues(settings)
    try:
        if queues.find(queue) is None:
            return
        while messages := queues.receive(queue, count=BATCH, lease_s=DRAIN_LEASE_S, wait_s=1):
            for message in messages:
                job_id, tenant = _whose(message.body)
                yield DeadMessage(
                    queue=queue,
                    message_id=message.message_id,
                    body=message.body,
                    receives=message.receives,
                    job_id=job_id,
                    tenant=tenant,
                    _queues=queues,
                    _message=message,
                )
    finally:
        queues.close()


def _create(queues: SqsQueues, queue: str, attributes: dict[str, str]) -> Created:
    if queue in queues.configured:
        raise Misconfigured(
            f"GRISTMILL_SQS_QUEUES names the URL of {queue}: it is managed elsewhere; "
            "remove it there to have it created by name"
        )
    url, name = queues.find(queue), queues.name(queue)
    fresh = url is None
    with queues.errors(queue):
        if url is None:
            url = str(queues.client().create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])
        else:
            queues.client().set_queue_attributes(QueueUrl=url, Attributes=attributes)
    return Created(name, url, fresh)


def _whose(body: str) -> tuple[str | None, str | None]:
    """The job's id and its tenant, out of the headers that kombu wrote."""
    try:
        message: Any = json.loads(body)
    except ValueError:
        return None, None
    headers = cast("dict[str, Any]", message).get("headers") if isinstance(message, dict) else None
    if not isinstance(headers, dict):
        return None, None
    job_id, tenant = (cast("dict[str, Any]", headers).get(name) for name in ("id", TENANT_HEADER))
    return (job_id if isinstance(job_id, str) else None, tenant if isinstance(tenant, str) else None)
