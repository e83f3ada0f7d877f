"""The broker as producers and workers use it: a Celery app over our transport, publish, depth.

The URL decides between two transports: ``transport.py`` for Redis and Valkey, ``sqs_transport.py`` for SQS.
Nobody above this module knows which it is.
"""

# kombu and Celery carry no types that strict checking could use.
# pyright: basic
from __future__ import annotations

import time
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import kombu.exceptions
from celery import Celery
from kombu.entity import Exchange, Queue

from ..schemas.errors import BrokerUnavailable, GristmillError, Misconfigured, NotReplicated
from ..schemas.job import DEFAULT_TENANT, Priority
from ..schemas.queues import CELERY, TASK, TENANT_HEADER
from ..schemas.settings import Settings
from .claim_book import ClaimBook
from .claims import Claims
from .embedded import Embedded
from .gate import Gate
from .message_queue import MessageQueue
from .redis import REDIS_ERRORS, normalise, redact, translate
from .transport import SCHEME, sweep_period_s

if TYPE_CHECKING:
    from .sqs_transport import Sqs

__all__ = [
    "Gate",
    "broker_errors",
    "claims_of",
    "close",
    "counts",
    "depth",
    "lacking",
    "make_app",
    "pause",
    "paused",
    "publish",
    "queues_of",
]

PUBLISH_TIMEOUT_S = 5.0
RETRY_WAIT_S = 0.2
_WHERE = "broker"

# The nearest ancestor decides, as in redis.TRANSLATION.
KOMBU_ERRORS: dict[type, type[GristmillError]] = {
    kombu.exceptions.KombuError: GristmillError,
    kombu.exceptions.OperationalError: BrokerUnavailable,
    kombu.exceptions.LimitExceeded: BrokerUnavailable,
    kombu.exceptions.VersionMismatch: Misconfigured,
}


def make_app(settings: Settings, *, gate: Gate | None = None, queue_names: Sequence[str] = ()) -> Celery:
    """A Celery app on ``settings.broker``: JSON only, no result backend. Joins or starts an embedded one.

    ``gate``: what a worker may claim, asked before each claim; None: all of ``queue_names``.
    Raises Misconfigured for a URL that cannot be used, BrokerUnavailable for an embedded one that does not
    start.
    """
    if settings.broker.startswith("sqs:"):
        from . import sqs_transport

        url, options = f"{sqs_transport.SCHEME}://sqs", sqs_transport.transport_options(settings, gate)
    else:
        url, options = _redis(settings, gate)
    app = Celery("gristmill", set_as_current=False)
    app.conf.update(
        CELERY,
        broker_url=url,
        broker_transport_options=options,
        broker_connection_timeout=settings.connect_timeout_s,
        # A server that refuses to write (a failover, a full disk) mends: reconnect, do not die.
        broker_channel_error_retry=True,
        task_queues=[_queue(name) for name in queue_names],
        task_publish_retry=False,
    )
    return app


def _redis(settings: Settings, gate: Gate | None) -> tuple[str, dict[str, Any]]:
    """kombu's URL and our options for a Redis. Joins or starts an embedded one."""
    embedded: Embedded | None = None
    url = settings.broker
    if url.startswith("embedded:"):
        embedded = Embedded(url.removeprefix("embedded:")).start()
        url = embedded.url
    lease_s = settings.visibility_timeout_s
    return kombu_url(url), {
        "visibility_timeout": lease_s,
        "claims": Claims(lease_s=lease_s, renew_every_s=settings.lease_renew_every_s),
        "gate": gate,
        "replicas": settings.broker_replicas,
        "embedded": embedded,  # held as long as the app
        "socket_timeout": settings.command_timeout_s,
        "socket_connect_timeout": settings.connect_timeout_s,
        "socket_keepalive": True,
        "health_check_interval": 10,
        "client_name": "gristmill",
        "unacked_restore_interval": sweep_period_s(lease_s),
        "unacked_restore_throttle": 1,
        # Connecting, for producers: publish() has its own patience. A worker's consumer retries for ever.
        "max_retries": 0,
        "interval_start": 0,
        "interval_step": 0.1,
        "interval_max": 0.1,
    }


def close(app: Celery) -> None:
    """Close the app's connections, and leave the embedded broker."""
    claims_of(app).close()
    app.pool.force_close_all()
    app.close()
    embedded: Embedded | None = app.conf.broker_transport_options.get("embedded")
    if embedded is not None:
        embedded.close()


def claims_of(app: Celery) -> ClaimBook:
    """What this process holds: its hook ``on_overdue`` is set there."""
    return app.conf.broker_transport_options["claims"]


def publish(
    app: Celery,
    queue: str,
    job_json: str,
    job_id: str,
    tenant: str = DEFAULT_TENANT,
    priority: Priority | None = None,
) -> None:
    """Have the broker accept a job. On return it is as durable as the broker.

    Tries for ``PUBLISH_TIMEOUT_S``, then raises BrokerUnavailable (NotReplicated: at once); the job
    may have been accepted all the same, and may be accepted twice: whoever claims it recognises it by
    ``job_id``. Its text appears in no header and no log.
    """
    headers = {TENANT_HEADER: tenant} | ({"gm_class": priority.value} if priority else {})
    deadline = time.monotonic() + PUBLISH_TIMEOUT_S
    while True:
        try:
            with broker_errors():
                app.send_task(
                    TASK,
                    args=[job_json],
                    task_id=job_id,
                    queue=_queue(queue),
                    headers=headers,
                    argsrepr="-",
                    kwargsrepr="-",
                    ignore_result=True,
                    retry=False,
                    declare=[],
                )
            return
        except NotReplicated:  # it is there: sending it again would make two of it
            raise
        except BrokerUnavailable:
            if time.monotonic() + RETRY_WAIT_S >= deadline:
                raise
            time.sleep(RETRY_WAIT_S)


def depth(app: Celery, queue: str) -> int:
    """Messages that wait in a queue, claimed ones not included; on SQS about as many.

    Raises BrokerUnavailable, and Misconfigured for an SQS queue that does not exist or may not be read.
    """
    with broker_errors(), queues_of(app) as queues:
        return queues.depth(queue)


def counts(app: Celery, queue: str) -> tuple[int, int]:
    """``depth``, and how many are claimed."""
    with broker_errors(), queues_of(app) as queues:
        return queues.counts(queue)


def lacking(app: Celery, queue: str, tenant: str, ids: Collection[str]) -> set[str]:
    """Those tasks of ``ids`` that plainly have no message, waiting or claimed."""
    with broker_errors(), queues_of(app) as queues:
        return queues.lacking(queue, tenant, ids)


def pause(app: Celery, queue: str, *, paused: bool) -> None:
    """Stop all claims from a queue, or let them go on. What runs is not touched."""
    with broker_errors(), queues_of(app) as queues:
        queues.pause(queue, paused=paused)


def paused(app: Celery, queue: str) -> bool:
    """Whether claims from it are stopped."""
    with broker_errors(), queues_of(app) as queues:
        return queues.paused(queue)


@contextmanager
def queues_of(app: Celery) -> Generator[MessageQueue | Sqs]:
    """The queues themselves, to pause, purge, count. Raises redis-py's own, or on SQS ours: see
    ``broker_errors``."""
    with app.connection_or_acquire() as connection:
        yield connection.default_channel.producer_queue


@contextmanager
def broker_errors() -> Generator[None]:
    """Raise ours ``from`` whatever kombu, Celery and redis-py raise about the broker."""
    try:
        yield
    except GristmillError:
        raise
    except kombu.exceptions.KombuError as exc:
        if isinstance(exc.__cause__, REDIS_ERRORS):  # kombu wraps whatever happens while connecting
            raise translate(exc.__cause__, _WHERE) from exc
        ours = next(KOMBU_ERRORS[kind] for kind in type(exc).__mro__ if kind in KOMBU_ERRORS)
        raise ours(f"{_WHERE}: {exc!r}") from exc
    except REDIS_ERRORS as exc:
        raise translate(exc, _WHERE) from exc


def kombu_url(url: str) -> str:
    """The URL of our transport for one that redis-py takes. Raises Misconfigured."""
    parts = urlsplit(normalise(url))
    options = dict(parse_qsl(parts.query))
    db = options.pop("db", "") or (parts.path.strip("/") if parts.scheme != "unix" else "") or "0"
    if not db.isdigit():
        raise Misconfigured(f"{redact(url)}: the database is a number, not {db!r}")
    if parts.scheme == "unix":
        return (
            f"{SCHEME}+socket://{parts.netloc}{quote(unquote(parts.path))}?{urlencode({'virtual_host': db})}"
        )
    if parts.scheme == "rediss":
        options.setdefault("ssl_cert_reqs", "required")
    if unknown := [name for name in options if not name.startswith("ssl_")]:
        raise Misconfigured(f"{redact(url)}: the broker does not know the option {unknown[0]}; remove it")
    if parts.scheme == "redis" and options:
        raise Misconfigured(f"{redact(url)}: TLS options need rediss://")
    return f"{SCHEME}://{parts.netloc}/{db}" + (f"?{urlencode(options)}" if options else "")


def _queue(name: str) -> Queue:
    """On the default exchange: nothing to declare, nothing to look up when publishing."""
    return Queue(name, Exchange("", type="direct"), routing_key=name)
