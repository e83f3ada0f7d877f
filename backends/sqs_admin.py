"""The queues of a model on SQS: create them, as they have to be."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..schemas.errors import Misconfigured
from ..schemas.queues import dead_queue_name, queue_names
from ..schemas.settings import Settings
from .sqs_queues import SqsQueues, whole_seconds

RETENTION_S = 14 * 86_400
"""As long as SQS keeps a message; a job's default time to live."""
MAX_RECEIVES = 1000
"""As many as SQS allows: claims that were handed back count too, and are no fault of the message."""


@dataclass(frozen=True, slots=True)
class Created:
    """One queue, and whether it is new."""

    name: str
    url: str
    created: bool


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
