"""Outbox: events for webhooks, from the step that makes something final to their delivery.

They are put in by the scripts that end a job or a batch (``put_event`` in ``lua/outbox.lua``), so that
nothing is final without its event. Whoever delivers takes one under a lease and says what came of it; if it
dies, the event comes again. All times are the server's.
"""

from __future__ import annotations

import heapq
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from ..schemas import keys
from ..schemas.errors import BadInput, GristmillError
from ..schemas.settings import Settings
from ..schemas.webhook import (
    DeliveryState,
    EventType,
    WebhookDelivery,
    WebhookEndpoint,
    WebhookEvent,
    WebhookTry,
    endpoint_of,
)
from .embedded import Embedded
from .outbox_script import webhook_script
from .redis import connect, redis_errors
from .script import Script, run_script
from .state import Clock, Subscription, state_url

log = logging.getLogger(__name__)

UNREADABLE = "unreadable"
PAGE = 200
REPLAY_PAGE = 500
_WHERE = "webhook outbox"
_INDEX = {
    DeliveryState.PENDING: keys.WEBHOOKS_PENDING,
    DeliveryState.DELIVERED: keys.WEBHOOKS_DELIVERED,
    DeliveryState.FAILED: keys.WEBHOOKS_FAILED,
}
PUT, CLAIM, SETTLE = map(webhook_script, ("put", "claim", "settle"))
REPLAY, ENABLE = map(webhook_script, ("replay", "enable"))


@dataclass(frozen=True, slots=True)
class Sending:
    """An event that was taken to be delivered."""

    event: WebhookEvent
    url: str
    endpoint: str
    """A name for the endpoint."""
    host: str
    """``//`` and the host's name."""
    tries: int
    """This one included."""
    step: int
    """Of the schedule: 0 at first, and again after a replay."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much may be taken at once. ``under_way``: endpoint or host, as a Sending names them → how many the
    caller has in hand already."""

    events: int
    per_host: int
    for_troubled: int
    """Events for endpoints that fail, one each."""
    under_way: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a try. ``verdict``: see ``lua/webhook_settle.lua``."""

    verdict: str
    log: WebhookTry
    again_s: float = 0.0
    hold_s: float = 0.0
    """The endpoint asked to be left alone for so long."""
    spread: float = 1.0


@dataclass(frozen=True, slots=True)
class Counts:
    """How much there is."""

    pending: int
    failed: int
    delivered: int
    troubled: int
    oldest_pending_s: float


class Outbox:
    """Thread-safe. Every method raises BrokerUnavailable while the server does not answer, and Misconfigured.

    ``clock`` replaces the server's in tests.
    """

    def __init__(
        self, client: redis.Redis, embedded: Embedded | None = None, clock: Clock | None = None
    ) -> None:
        self._client: Any = client  # as redis-py types it, every reply may be awaitable
        self._embedded, self._clock = embedded, clock

    # ---- events in

    def put(self, event_id: str, kind: EventType, url: str, data: str) -> bool:
        """Queue an event that nothing final stands behind: a test. False: it is known."""
        return bool(self._run(PUT, event_id, kind.value, url, data))

    # ---- events out

    def claim(self, limits: Limits, lease_s: float, give_up_s: float) -> tuple[list[Sending], float | None]:
        """Events that are due, and in how many seconds the next one is (None: there is none)."""
        numbers = (limits.events, limits.per_host, limits.for_troubled)
        times = (round(lease_s * 1000), round(give_up_s * 1000))
        busy = [part for pair in limits.under_way.items() for part in pair]
        wait_ms, *rows = self._run(CLAIM, *numbers, *times, *busy)
        taken: list[Sending] = []
        for row in rows:
            try:
                taken.append(_sending(*row))
            except (ValueError, TypeError, AttributeError) as exc:  # it delays none of the others
                self._set_aside(row[0].decode(), row[5], exc)
        return taken, None if wait_ms < 0 else wait_ms / 1000

    def settle(self, sending: Sending, outcome: Outcome) -> tuple[DeliveryState | None, bool]:
        """Record a try. Returns the event's state (None: it had ended before), and whether its endpoint is in
        trouble or switched off as of now."""
        state, troubled = self._run(
            SETTLE,
            sending.event.id,
            sending.tries,
            outcome.verdict,
            round(outcome.again_s * 1000),
            round(outcome.hold_s * 1000),
            outcome.log.to_json(),
            outcome.log.code or "",
            repr(outcome.spread),
        )
        return None if state is None else DeliveryState(state.decode()), bool(troubled)

    def bell(self, confirm_timeout_s: float) -> Subscription:
        """What wakes who delivers: an event that was queued, or a try that ended."""
        return Subscription(self._client, keys.WEBHOOK_BELL, confirm_timeout_s)

    # ---- for people

    def get(self, event_id: str) -> WebhookDelivery | None:
        """One event, with its tries. None: it is not known (any more)."""
        return next(iter(self._read([event_id])), None)

    def list(self, states: Sequence[DeliveryState] = tuple(DeliveryState)) -> Iterator[WebhookDelivery]:
        """Events, the newest first: pending ones by when they were queued, others by their end."""
        merged = heapq.merge(*map(self._index, states), key=lambda row: -row[0])
        page: list[str] = []
        for _, event_id in merged:
            page.append(event_id)
            if len(page) == PAGE:
                yield from self._read(page)
                page = []
        yield from self._read(page)

    def replay(self, event_ids: Sequence[str]) -> list[str]:
        """Send events again with the ids they have; those that wait are tried now. Returns those known."""
        known: list[str] = []
        for start in range(0, len(event_ids), REPLAY_PAGE):
            known += [each.decode() for each in self._run(REPLAY, *event_ids[start : start + REPLAY_PAGE])]
        return known

    def endpoints(self) -> list[WebhookEndpoint]:
        """Those in trouble, the last one first."""
        with redis_errors(_WHERE):
            ids: list[bytes] = self._client.zrevrange(keys.WEBHOOK_TROUBLED, 0, -1)
            with self._client.pipeline(transaction=False) as pipe:
                for each in ids:
                    pipe.hgetall(keys.webhook_endpoint(each.decode()))
                rows: list[dict[bytes, bytes]] = pipe.execute()
        return [_endpoint({n.decode(): v.decode() for n, v in row.items()}) for row in rows if row]

    def enable(self, url: str) -> tuple[bool, int]:
        """Forget an endpoint's troubles, and try what waits for it now. Returns whether it had any, and how
        many events had been waiting."""
        had, waiting = self._run(ENABLE, endpoint_of(url))
        return bool(had), int(waiting)

    def counts(self) -> Counts:
        """How much there is; the age of the oldest pending one is by the server's clock."""
        with redis_errors(_WHERE), self._client.pipeline(transaction=False) as pipe:
            for name in (*_INDEX.values(), keys.WEBHOOK_TROUBLED):
                pipe.zcard(name)
            pipe.zrange(keys.WEBHOOKS_PENDING, 0, 0, withscores=True)
            pipe.time()
            pending, delivered, failed, troubled, first, (seconds, _) = pipe.execute()
        age_s = max(0.0, seconds - first[0][1] / 1000) if first else 0.0
        return Counts(pending, failed, delivered, troubled, age_s)

    def close(self) -> None:
        """Close the connections, and leave the embedded server if it was opened here."""
        with redis_errors(_WHERE):
            self._client.close()
        if self._embedded is not None:
            self._embedded.close()

    # ---- inside

    def _set_aside(self, event_id: str, tries: int, exc: Exception) -> None:
        """One that nobody can send, as its record cannot be read: for a person to look at."""
        log.error("webhook.unreadable", extra={"event": event_id, "reason": type(exc).__name__})
        reason = (
            f"its record in the outbox cannot be read ({type(exc).__name__}): damaged, or of a later version"
        )
        at = time.time() if self._clock is None else self._clock()
        told = WebhookTry(n=tries, at=at, code=UNREADABLE, reason=reason).to_json()
        try:
            self._run(SETTLE, event_id, tries, "refused", 0, 0, told, UNREADABLE, "1.0")
        except GristmillError as exc:  # it is said again when its lease is over
            log.warning("webhook.not_settled", extra={"event": event_id, "code": exc.code})

    def _run(self, script: Script, *args: str | int) -> Any:
        now = "" if self._clock is None else round(self._clock() * 1000)
        with redis_errors(_WHERE):
            return run_script(self._client, script, *args, now)

    def _index(self, state: DeliveryState) -> Iterator[tuple[float, str]]:
        start = 0
        while True:
            with redis_errors(_WHERE):
                rows: list[tuple[bytes, float]] = self._client.zrevrange(
                    _INDEX[state], start, start + PAGE - 1, withscores=True
                )
            yield from ((score, event_id.decode()) for event_id, score in rows)
            if len(rows) < PAGE:
                return
            start += PAGE

    def _read(self, event_ids: Sequence[str]) -> list[WebhookDelivery]:
        with redis_errors(_WHERE), self._client.pipeline(transaction=False) as pipe:
            for event_id in event_ids:
                pipe.hgetall(keys.webhook(event_id))
            rows: list[dict[bytes, bytes]] = pipe.execute()
        return [
            _shown(event_id, {n.decode(): v.decode("utf-8", "replace") for n, v in row.items()})
            for event_id, row in zip(event_ids, rows, strict=True)
            if row
        ]


def open_outbox(settings: Settings) -> Outbox:
    """The outbox, which is where jobs' states are. Raises Misconfigured, BrokerUnavailable."""
    url = state_url(settings)
    embedded = Embedded(url.removeprefix("embedded:")).start() if url.startswith("embedded:") else None
    return Outbox(connect(embedded.url if embedded else url, settings), embedded)


def _sending(
    event_id: bytes,
    kind: bytes,
    url: bytes,
    data: bytes,
    at: bytes,
    tries: int,
    step: bytes,
    endpoint: bytes,
    host: bytes,
) -> Sending:
    event = WebhookEvent(
        id=event_id.decode(), type=kind.decode(), created_at=int(at) // 1000, data=json.loads(data)
    )
    return Sending(event, url.decode(), endpoint.decode(), host.decode(), tries, int(step))


def _shown(event_id: str, texts: Mapping[str, str]) -> WebhookDelivery:
    """As far as it can be read."""
    try:
        return _delivery(event_id, texts)
    except (ValueError, KeyError):
        known = texts.get("state") in set(DeliveryState)
        return WebhookDelivery(
            id=event_id,
            type=texts.get("type", ""),
            endpoint=endpoint_of(texts.get("url", "")),
            state=DeliveryState(texts["state"]) if known else DeliveryState.FAILED,
            created_at=0.0,
            why=UNREADABLE,
            log=tuple(_log(texts)),
        )


def _delivery(event_id: str, texts: Mapping[str, str]) -> WebhookDelivery:
    def seconds(name: str) -> float | None:
        return int(texts[name]) / 1000 if name in texts else None

    return WebhookDelivery(
        id=event_id,
        type=texts["type"],
        endpoint=endpoint_of(texts["url"]),
        state=DeliveryState(texts["state"]),
        created_at=int(texts["at"]) / 1000,
        next_at=seconds("next"),
        ended_at=seconds("ended"),
        tries=int(texts["tries"]),
        why=texts.get("why", ""),
        data=json.loads(texts["data"]),
        log=tuple(_log(texts)),
    )


def _log(texts: Mapping[str, str]) -> Iterator[WebhookTry]:
    numbered = sorted(
        (int(name.removeprefix("try")), body)
        for name, body in texts.items()
        if name.removeprefix("try").isdecimal()
    )
    for n, body in numbered:
        try:
            yield WebhookTry.from_json(body)
        except BadInput as exc:  # one that cannot be read hides none of the others
            yield WebhookTry(n=n, at=0.0, code=UNREADABLE, reason=exc.message)


def _endpoint(texts: Mapping[str, str]) -> WebhookEndpoint:
    def seconds(name: str) -> float | None:
        return int(texts[name]) / 1000 if name in texts else None

    held = [at for name in ("hold", "retry_at") if (at := seconds(name)) is not None]
    return WebhookEndpoint(
        url=texts.get("url", ""),
        failures=int(texts.get("failures", 0)),
        since=seconds("since"),
        held_until=max(held, default=None),
        disabled_at=seconds("disabled"),
        why=texts.get("why", ""),
    )
