"""botocore's exceptions as ours, for S3 and SQS alike."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from typing import Any, TypeVar

from ..schemas.errors import BrokerUnavailable, DownloadFailed, Misconfigured, StoreUnavailable

T = TypeVar("T")

TRIES = 6
FIRST_PAUSE_S = 0.2
BUSY = {
    "OverLimit",
    "RequestThrottled",
    "RequestTimeTooSkewed",
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}
"""Error codes of a service that may well answer when asked again."""

_RETRY_STATUS = 429


def patiently(
    ask: Callable[[], T],
    errors: Callable[[], AbstractContextManager[None]],
    away: type[StoreUnavailable | DownloadFailed],
) -> T:
    """Ask again, after a while, what a network may have swallowed: hours of a transfer hang on it.

    ``errors`` raises ``away`` for that; it is raised after the last try, as is everything else at once.
    """
    for attempt in range(TRIES):
        try:
            with errors():
                return ask()
        except away:
            if attempt == TRIES - 1:
                raise
        time.sleep(random.uniform(0.5, 1.0) * FIRST_PAUSE_S * 2**attempt)
    raise AssertionError("unreachable")


@contextmanager
def botocore_errors(
    where: str,
    *,
    away: type[BrokerUnavailable | StoreUnavailable | DownloadFailed],
    missing: Callable[[str], Misconfigured | None],
    rights: str,
    settings: str,
    endpoint: str,
) -> Generator[None]:
    """Raise ``away`` for what network or service may mend unasked, Misconfigured for everything else.

    where: what was talked to, for the message. missing: the error of a code that means: no such queue, or
    bucket. rights, settings: what to do about a refusal, and about a client that has not all it needs.
    endpoint: the variable with the service's URL.
    """
    bx: Any = import_module("botocore.exceptions")
    try:
        yield
    except bx.ClientError as exc:
        code, status = code_and_status(exc)
        if (error := missing(code)) is not None:
            raise error from exc
        if status >= 500 or status == _RETRY_STATUS or code in BUSY:
            raise away(f"{where}: {code} ({status})") from exc
        raise Misconfigured(f"{where}: {code} ({status}); {rights}") from exc
    except (bx.HTTPClientError, bx.ConnectionError, bx.IncompleteReadError, OSError) as exc:
        raise away(f"{where}: {exc}") from exc
    except (bx.MetadataRetrievalError, bx.CredentialRetrievalError, bx.TokenRetrievalError) as exc:
        raise away(f"{where}: credentials cannot be fetched: {exc}") from exc
    except bx.BotoCoreError as exc:
        raise Misconfigured(f"{where}: {exc}; {settings}") from exc
    except ValueError as exc:  # an endpoint that is no URL
        raise Misconfigured(f"{endpoint}: {exc}") from exc


def code_and_status(exc: Any) -> tuple[str, int]:
    """Of a botocore ClientError: the service's error code, without a namespace, and the HTTP status."""
    response = exc.response
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code", "")).rpartition(".")[2], int(status)
