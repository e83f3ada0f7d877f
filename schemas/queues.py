"""Task and queue names, and Celery's settings as plain data: both sides agree by import."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from .job import Priority

TASK = "gristmill.generate"
TENANT_HEADER = "gm_tenant"


def queue_name(model: str, priority: Priority) -> str:
    """``gm-<model>-<class>``, valid on Redis and SQS (80 characters of ``[A-Za-z0-9_-]``).

    A name that had to be changed or cut carries eight digits of its hash, so two models never share a queue.
    """
    return f"{_stem(model)}-{priority.value}"


def queue_names(model: str) -> list[str]:
    """The queues of a model, most urgent first."""
    return [queue_name(model, priority) for priority in Priority]


def dead_queue_name(model: str) -> str:
    """Where SQS puts messages of all three that were received too often."""
    return f"{_stem(model)}-dead"


def _stem(model: str) -> str:
    slug = re.sub(r"[^a-z0-9_-]+", "-", model.lower())[:48]
    if slug != model:
        slug += "-" + hashlib.sha256(model.encode()).hexdigest()[:8]
    return f"gm-{slug}"


CELERY: dict[str, Any] = {
    "task_serializer": "json",
    "accept_content": ["json"],
    "task_acks_late": True,
    "task_acks_on_timeout": True,
    "task_acks_on_failure_or_timeout": True,
    "task_ignore_result": True,  # Gristmill owns results
    "task_store_errors_even_if_ignored": False,
    "worker_prefetch_multiplier": 1,
    "worker_enable_prefetch_count_reduction": False,
    "worker_cancel_long_running_tasks_on_connection_loss": False,
    "worker_hijack_root_logger": False,
    "worker_redirect_stdouts": False,
    "broker_connection_retry_on_startup": True,
    "broker_connection_max_retries": None,
    "task_create_missing_queues": True,
}
