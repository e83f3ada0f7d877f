"""LargeRequests: requests that are too large for a message, kept as objects of the result store.

The object ``jobs/<id>.json`` is written before the message that names it is sent, and taken away after that
message was acknowledged. Not in the state server: its loss must lose no job, and a long prompt would lie in
its memory until a worker has room.
"""

# A kombu message is a dictionary of anything.
# pyright: basic
from __future__ import annotations

import base64
import json
import logging
import threading
from typing import Any

from ..schemas import keys
from ..schemas.errors import GristmillError
from ..schemas.settings import Settings
from .store import ResultStore, open_store

log = logging.getLogger(__name__)

INLINE_BYTES = 64 * 1024
"""Messages up to this size carry their request themselves. SQS takes 256 KiB or 1 MiB."""
HEADER = "gm_request"


class LargeRequests:
    """Thread-safe. The store is opened when the first large request comes."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._store: ResultStore | None = None

    def text(self, message: dict[str, Any]) -> str:
        """The message as it is sent, its request put into the store if that is what it takes.

        Raises StoreUnavailable, Misconfigured: then nothing is to be sent.
        """
        text = json.dumps(message, separators=(",", ":"))
        if len(text) <= INLINE_BYTES:
            return text
        (request, *rest), *options = _task(message["body"])
        name = keys.request_object(message["headers"]["id"])
        self.store.put_new(name, request.encode())
        headers, body = message["headers"] | {HEADER: name}, _body([["", *rest], *options])
        return json.dumps(message | {"headers": headers, "body": body}, separators=(",", ":"))

    def fill_in(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message as it was before ``text``. Raises StoreUnavailable, Misconfigured.

        Where the object is gone, because a twin of this message has ended the job, the request stays empty.
        """
        name = self.name_in(message)
        if name is None:
            return message
        request = self.store.get(name)
        if request is None:
            log.warning("request.gone", extra={"object": name})
            return message
        (_, *rest), *options = _task(message["body"])
        return message | {"body": _body([[request.decode(), *rest], *options])}

    def name_in(self, message: dict[str, Any]) -> str | None:
        """The object that has the message's request; only ever one of the names that we write."""
        headers = message["headers"]
        name = headers.get(HEADER)
        return name if name is not None and name == keys.request_object(str(headers.get("id"))) else None

    def remove(self, name: str) -> None:
        """Take an object away. If that fails, a rule of the bucket has to: it harms nobody."""
        try:
            self.store.remove(name)
        except GristmillError as exc:
            log.warning("request.not_removed", extra={"object": name, "reason": exc.message})

    @property
    def store(self) -> ResultStore:
        """Raises Misconfigured."""
        with self._lock:
            if self._store is None:
                self._store = open_store(self._settings.results, self._settings)
            return self._store


def _task(body: str) -> list[Any]:
    """Celery's ``[args, kwargs, embed]``, as kombu encodes it."""
    return json.loads(base64.b64decode(body))


def _body(task: list[Any]) -> str:
    return base64.b64encode(json.dumps(task, separators=(",", ":")).encode()).decode()
