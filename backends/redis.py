"""Redis and Valkey clients with explicit limits, and their exceptions as ours: both in this one place.

redis-py's own defaults turned one GET on a frozen server into 73 s; here a command fails after
``command_timeout_s``, and only a connection that the server had closed is tried again, once.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
import redis.asyncio
from redis import exceptions as rx
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from ..schemas.errors import BrokerUnavailable, GristmillError, Misconfigured
from ..schemas.settings import Settings

MAX_CONNECTIONS = 1024
RETRY_WAIT_S = 0.05
HEALTH_CHECK_S = 15

# redis-py raises these; not all of them descend from RedisError.
REDIS_ERRORS: tuple[type[Exception], ...] = (
    rx.RedisError,
    rx.RedisClusterException,
    rx.ChildDeadlockedError,
    rx.IncorrectPolicyType,
    OSError,
)

# The nearest ancestor decides. What waiting or a restart mends is BrokerUnavailable; what only a change of
# settings mends is Misconfigured; what no server could have caused is our own mistake.
TRANSLATION: dict[type[Exception], type[GristmillError]] = {
    OSError: BrokerUnavailable,
    rx.RedisError: BrokerUnavailable,  # a class newer than this table; the test of it names the class
    rx.ConnectionError: BrokerUnavailable,
    rx.TimeoutError: BrokerUnavailable,
    rx.ResponseError: BrokerUnavailable,  # OOM, READONLY, MISCONF, NOREPLICAS, LOADING, BUSY, ...
    rx.InvalidResponse: BrokerUnavailable,
    rx.ClusterError: BrokerUnavailable,
    rx.RedisClusterException: BrokerUnavailable,
    rx.ExternalAuthProviderError: BrokerUnavailable,
    rx.AuthenticationError: Misconfigured,
    rx.AuthenticationWrongNumberOfArgsError: Misconfigured,
    rx.AuthorizationError: Misconfigured,
    rx.NoPermissionError: Misconfigured,
    rx.ModuleError: Misconfigured,
    rx.CrossSlotTransactionError: Misconfigured,
    rx.ClusterCrossSlotError: Misconfigured,
    rx.DataError: GristmillError,
    rx.PubSubError: GristmillError,
    rx.WatchError: GristmillError,
    rx.LockError: GristmillError,
    rx.InvalidPipelineStack: GristmillError,
    rx.ChildDeadlockedError: GristmillError,
    rx.IncorrectPolicyType: GristmillError,
}

_NEXT_STEP: dict[type[GristmillError], str] = {
    BrokerUnavailable: "is the server up, and may we write to it?",
    Misconfigured: "check the user, the password and the ACL in GRISTMILL_BROKER_URL / GRISTMILL_STATE_URL",
    GristmillError: "this is a bug in gristmill",
}


def translate(exc: Exception, where: str) -> GristmillError:
    """Our error for one of redis-py's. ``where`` names the server or the operation, without secrets."""
    for ancestor in type(exc).__mro__:
        if (ours := TRANSLATION.get(ancestor)) is not None:
            return ours(f"{where}: {exc or type(exc).__name__}; {_NEXT_STEP[ours]}")
    raise AssertionError(f"not an exception of Redis: {type(exc).__qualname__}") from exc


@contextmanager
def redis_errors(where: str, *, always_transient: bool = False) -> Generator[None]:
    """Raise ours ``from`` theirs. ``always_transient`` is for writes of a running job: whatever the server
    answers, its tokens are kept and written later, so that even a revoked password is BrokerUnavailable.
    """
    try:
        yield
    except REDIS_ERRORS as exc:
        ours = translate(exc, where)
        if always_transient and not isinstance(ours, BrokerUnavailable):
            ours = BrokerUnavailable(ours.message)
        raise ours from exc


def connect(url: str, settings: Settings) -> redis.Redis:
    """A client with a bounded pool; nothing is sent before the first command. Raises Misconfigured."""
    retry = Retry(ConstantBackoff(RETRY_WAIT_S), 1, supported_errors=(rx.ConnectionError,))
    return _from_url(redis.Redis, url, settings, retry)


def connect_async(url: str, settings: Settings) -> redis.asyncio.Redis:
    """``connect`` for asyncio. The client belongs to the loop that first uses it."""
    retry = AsyncRetry(ConstantBackoff(RETRY_WAIT_S), 1, supported_errors=(rx.ConnectionError,))
    return _from_url(redis.asyncio.Redis, url, settings, retry)


def _from_url(cls: Any, url: str, settings: Settings, retry: object) -> Any:
    address = normalise(url)
    options = {} if address.startswith("unix:") else {"socket_keepalive": True}
    try:
        client = cls.from_url(
            address,
            protocol=2,  # the same shape of reply from every server
            socket_timeout=settings.command_timeout_s,
            socket_connect_timeout=settings.connect_timeout_s,
            health_check_interval=HEALTH_CHECK_S,
            max_connections=MAX_CONNECTIONS,
            client_name="gristmill",
            retry=retry,
            **options,
        )
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # an unknown option in the URL shows here, not later
    except (ValueError, TypeError, rx.RedisError) as exc:
        raise Misconfigured(f"{redact(url)} cannot be used: {_without(url, str(exc))}") from exc
    return client


def normalise(url: str) -> str:
    """The URL as redis-py takes it: kombu's ``redis+socket://`` and ``virtual_host`` are understood too.

    Raises Misconfigured for a scheme that is no Redis.
    """
    scheme, colon, rest = url.partition(":")
    if scheme not in {"redis", "rediss", "unix", "redis+socket"} or not colon:
        raise Misconfigured(f"{redact(url)} is not a Redis: use redis://, rediss:// or unix://")
    if scheme == "redis+socket":
        url = f"unix:{rest}"
    parts = urlsplit(url)
    options: list[tuple[str, str]] = []
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if name == "virtual_host":
            options.append(("db", value.strip("/") or "0"))
        elif name == "ssl_cert_reqs":
            options.append((name, value.lower().removeprefix("cert_")))
        else:
            options.append((name, value))
    if parts.scheme == "unix" and not parts.path:
        raise Misconfigured(f"{redact(url)} names no socket: write unix:///path/to/socket")
    return f"{parts.scheme}://{parts.netloc}{parts.path}" + (f"?{urlencode(options)}" if options else "")


def redact(url: str) -> str:
    """The URL without user, password and secret options, for messages and logs."""
    parts = urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    query = re.sub(r"(?i)((?:password|secret|token|key)[^=&]*=)[^&]*", r"\1***", parts.query)
    slashes = "//" if parts.netloc or url.startswith(f"{parts.scheme}://") else ""
    return (
        f"{parts.scheme}:{slashes}{'***@' if at else ''}{host}{parts.path}" + (f"?{query}" if query else "")
        if parts.scheme
        else "(no URL)"
    )


def _without(url: str, text: str) -> str:
    """``text`` with the URL's secrets cut out, should a library have quoted them."""
    secret = urlsplit(url).password
    return text.replace(secret, "***") if secret else text
