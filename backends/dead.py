"""DeadLetters: the messages that nobody will deliver again, each with its reason.

They stand in the broker, if that is a Redis, or else in the state server: ``open_dead`` knows. Messages of
our own transport come there by ``MessageQueue.bury``, in the step that ends the claim; others by ``add``.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from typing import Any, cast

import redis

from ..schemas import keys
from ..schemas.dead import DeadLetter
from ..schemas.errors import BadInput
from ..schemas.job import Job
from ..schemas.settings import Settings
from ..schemas.wire import loads
from .embedded import Embedded
from .message_queue import DEAD_LIMIT, DEAD_TTL_S, load_script
from .redis import connect, redis_errors
from .script import run_script

PAGE = 100
_WHERE = "dead letters"
LAY_OUT = load_script("lay_out")


class DeadLetters:
    """Every method raises BrokerUnavailable while the server does not answer, and Misconfigured.

    ``now_ms`` replaces the server's clock in tests.
    """

    def __init__(
        self, client: redis.Redis, embedded: Embedded | None = None, now_ms: int | None = None
    ) -> None:
        self.client: Any = client  # as redis-py types it, every reply may be awaitable
        self._embedded, self.now_ms = embedded, now_ms

    def add(
        self, queue: str, message_id: str, payload: str, *, tenant: str, reason: str, job_id: str | None
    ) -> bool:
        """Keep a message of a broker that is not this server; then take it out there.

        ``payload``: the job's JSON, or the message as kombu wrote it. False: it is here already.
        """
        now = "" if self.now_ms is None else self.now_ms
        args = (now, queue, message_id, job_id or "", tenant, reason, payload, DEAD_LIMIT, DEAD_TTL_S * 1000)
        with redis_errors(_WHERE):
            return bool(run_script(self.client, LAY_OUT, *args))

    def undrained(self, limit: int) -> list[DeadLetter]:
        """Letters that nobody has drained yet, in no order: their jobs may still need an end."""
        with redis_errors(_WHERE):
            members: list[bytes] = self.client.srandmember(keys.DEAD_NEW, limit) or []
        letters: list[DeadLetter] = []
        for member in members:
            queue, _, message_id = member.decode("utf-8", "replace").partition("\n")
            if (letter := self.get(queue, message_id)) is not None:
                letters.append(letter)
            else:
                self.drained(queue, message_id)
        return letters

    def awaiting(self, letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        """Those that nobody has drained yet."""
        if not letters:
            return []
        members = [f"{letter.queue}\n{letter.id}" for letter in letters]
        with redis_errors(_WHERE):
            flags: list[int] = self.client.smismember(keys.DEAD_NEW, members)
        return [letter for letter, flag in zip(letters, flags, strict=True) if flag]

    def drained(self, queue: str, message_id: str) -> None:
        """Its job, if it has one, has ended."""
        with redis_errors(_WHERE):
            self.client.srem(keys.DEAD_NEW, f"{queue}\n{message_id}")

    def count(self, queue: str) -> int:
        """How many a queue has."""
        with redis_errors(_WHERE):
            return int(self.client.zcard(keys.queue_dead_at(queue)))

    def letters(self, queue: str) -> Iterator[DeadLetter]:
        """A queue's dead letters, the newest first, read page by page."""
        start = 0
        while True:
            with redis_errors(_WHERE):
                ids: list[bytes] = self.client.zrevrange(keys.queue_dead_at(queue), start, start + PAGE - 1)
                bodies: list[Any] = self.client.hmget(keys.queue_dead(queue), ids) if ids else []
            for message_id, body in zip(ids, bodies, strict=True):
                if body is not None:  # taken out since
                    yield _read(queue, message_id, body)
            if len(ids) < PAGE:
                return
            start += PAGE

    def get(self, queue: str, message_id: str) -> DeadLetter | None:
        """One by its id."""
        with redis_errors(_WHERE):
            body = self.client.hget(keys.queue_dead(queue), message_id)
        return None if body is None else _read(queue, message_id.encode(), body)

    def remove(self, queue: str, *message_ids: str) -> int:
        """Forget them. Returns how many of them were still there."""
        if not message_ids:
            return 0
        with redis_errors(_WHERE), self.client.pipeline() as pipe:
            pipe.hdel(keys.queue_dead(queue), *message_ids)
            pipe.zrem(keys.queue_dead_at(queue), *message_ids)
            pipe.srem(keys.DEAD_NEW, *(f"{queue}\n{message_id}" for message_id in message_ids))
            return int(pipe.execute()[0])

    def close(self) -> None:
        """Close the connections, and leave the embedded server if it was opened here."""
        with redis_errors(_WHERE):
            self.client.close()
        if self._embedded is not None:
            self._embedded.close()


def open_dead(settings: Settings) -> DeadLetters:
    """The dead letters of ``settings.broker``. Raises Misconfigured, BrokerUnavailable."""
    url = settings.broker
    if url.startswith("sqs:"):
        from .state import state_url

        url = state_url(settings)
    embedded = Embedded(url.removeprefix("embedded:")).start() if url.startswith("embedded:") else None
    return DeadLetters(connect(embedded.url if embedded else url, settings), embedded)


def job_of(letter: DeadLetter) -> Job:
    """The job in a dead letter, if it can be read. Raises BadInput: a person has to look at the payload."""
    return Job.from_json(_job_json(letter.payload))


def _job_json(payload: str) -> str:
    """The first argument of the one task, out of a kombu message; anything else is taken for the job."""
    message = loads(payload)
    body = cast("dict[str, Any]", message).get("body") if isinstance(message, dict) else None
    if not isinstance(body, str):
        return payload
    try:
        task = loads(base64.b64decode(body, validate=True))
    except binascii.Error:
        task = loads(body)
    match task:
        case [[str(job), *_], *_]:
            return job
        case _:
            raise BadInput("the message holds no job")


def _read(queue: str, message_id: bytes, body: bytes) -> DeadLetter:
    """A record that cannot be read is shown as it is: nothing among the dead may hide the others."""
    text = body.decode("utf-8", "replace")
    try:
        return DeadLetter.from_json(text)
    except BadInput as exc:
        return DeadLetter(
            id=message_id.decode("utf-8", "replace"),
            queue=queue,
            tenant="",
            reason=f"an unreadable record: {exc.message}",
            at=0.0,
            payload=text,
        )
