"""Webhooks: the events that receivers are sent, how they are signed, and what is remembered of deliveries.

The form is OpenAI's and the signatures are those of Standard Webhooks 1.0.0, so that `openai`'s
``client.webhooks.unwrap`` and `standardwebhooks` check what we send.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, IPv6Network
from typing import Annotated, Any, Literal
from urllib.parse import SplitResult, urlsplit

from pydantic import AfterValidator, Field

from .wire import Answer, Float, Int

URL_CHARS = 2048
DATA_BYTES = 16_000
"""An event's data beyond it is cut: a receiver should be able to count on small bodies."""
SECRET_PREFIX = "whsec_"  # noqa: S105 - no secret: what secrets begin with
SECRET_BYTES = range(24, 65)
"""How long a secret may be, as Standard Webhooks has it."""
TOLERANCE_S = 300.0
"""A receiver takes no signature that is older, or from so far ahead."""

EMBEDDING = {
    "IPv4-compatible": IPv6Network("::/96"),
    "IPv4-mapped": IPv6Network("::ffff:0:0/96"),
    "IPv4-translated": IPv6Network("::ffff:0:0:0/96"),
    "NAT64": IPv6Network("64:ff9b::/96"),
    "local NAT64": IPv6Network("64:ff9b:1::/48"),
    "Teredo": IPv6Network("2001::/32"),
    "6to4": IPv6Network("2002::/16"),
}
"""Networks of addresses that stand for an IPv4 address."""

_UNSAFE = re.compile(r"[^!-~]|[\"<>\\^`{|}]")
_NAME = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*\.?")
_AUTHORITY = re.compile(r"([A-Za-z]+)://([^/?#]*)")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")


class EventType(StrEnum):
    """What happened. The names of batches' four ends are OpenAI's."""

    JOB_COMPLETED = "job.completed"
    JOB_FAILED = "job.failed"
    JOB_CANCELLED = "job.cancelled"
    JOB_EXPIRED = "job.expired"
    BATCH_IN_PROGRESS = "batch.in_progress"
    BATCH_PROGRESS = "batch.progress"
    BATCH_COMPLETED = "batch.completed"
    BATCH_FAILED = "batch.failed"
    BATCH_EXPIRED = "batch.expired"
    BATCH_CANCELLED = "batch.cancelled"
    TEST = "webhook.test"


class DeliveryState(StrEnum):
    """Where an event stands."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


# ---- addresses


def check_url(url: str) -> str:
    """The URL, if it can be a receiver's; whether its address may be called is decided when it is.

    Raises ValueError. Numbers in other forms than ``1.2.3.4`` and ``[::1]`` are refused: resolvers read
    ``2130706433``, ``0x7f.1`` and ``127.1`` as addresses that nobody meant to write. So are IPv6 addresses
    that stand for an IPv4 one, and may lead there: nobody who means ``10.0.0.1`` writes ``[::ffff:a00:1]``.
    """
    if len(url) > URL_CHARS:
        raise ValueError(f"is {len(url):,} characters long and may have {URL_CHARS:,}")
    if (found := _UNSAFE.search(url)) is not None:
        raise ValueError(f"character {found[0]!r} must be percent-encoded (a host name: punycode)")
    parts, host = _split(url)
    if parts.scheme not in {"https", "http"}:
        raise ValueError("must begin with https:// or http://")
    if parts.username is not None or parts.password is not None:
        raise ValueError("must have no user or password; a secret belongs in GRISTMILL_WEBHOOK_SECRET")
    if parts.fragment:
        raise ValueError("must have no #fragment")
    _check_host(host)
    return url


def _split(url: str) -> tuple[SplitResult, str]:
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
    except ValueError as exc:
        raise ValueError(f"is no URL: {exc}") from exc
    if port == 0 or parts.netloc.endswith(":"):
        raise ValueError("names no port")
    return parts, host


def _check_host(host: str) -> None:
    if ":" in host:
        address = IPv6Address(host)
        if "%" in host:
            raise ValueError("names a network interface")
        if int(address) > 1 and (
            kind := next((kind for kind, net in EMBEDDING.items() if address in net), None)
        ):
            raise ValueError(f"[{host}] hides an IPv4 address ({kind}); write that one, or a name")
    elif _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
        IPv4Address(host)
    elif _NAME.fullmatch(host) is None or len(host) > 253:
        raise ValueError("names no host" if not host else f"{host[:80]!r} is no host name")


def normal_url(url: str) -> str:
    """As every spelling of it is written here: names in lower case, no default port, a path. What is no URL
    stays as it is. ``lua/outbox.lua`` does the same."""
    if (parts := _AUTHORITY.match(url)) is None:
        return url
    scheme, authority = parts[1].lower(), parts[2].lower()
    authority = re.sub(":0*443$" if scheme == "https" else ":0*80$", "", authority)
    authority = re.sub(r"\.(:[0-9]*)?$", r"\1", authority)
    rest = url[parts.end() :]
    return f"{scheme}://{authority}{'' if rest.startswith('/') else '/'}{rest}"


def endpoint_of(url: str) -> str:
    """A URL up to its query, which often names the job: what fails and recovers as one."""
    return re.split("[?#]", normal_url(url), maxsplit=1)[0]


WebhookUrl = Annotated[str, Field(min_length=1), AfterValidator(check_url)]


# ---- events


class WebhookEvent(Answer):
    """What a receiver is sent."""

    id: str
    object: Literal["event"] = "event"
    type: str
    created_at: Int
    """Unix seconds; ``timestamp`` says the same as Standard Webhooks wants it."""
    data: dict[str, Any]

    def body(self) -> bytes:
        """As it is sent: the same bytes every time."""
        at = datetime.fromtimestamp(self.created_at, UTC).isoformat().replace("+00:00", "Z")
        told = {
            "id": self.id,
            "object": self.object,
            "type": self.type,
            "created_at": self.created_at,
            "timestamp": at,
            "data": self.data,
        }
        return json.dumps(told, ensure_ascii=False, separators=(",", ":")).encode()


def event_data(required: Mapping[str, Any], optional: Mapping[str, Any]) -> str:
    """An event's data as JSON, without what is None, and what of ``optional`` is empty or too large."""
    data = {name: value for name, value in required.items() if value is not None}
    for name, value in optional.items():
        if value and len(_json(data | {name: value}).encode()) <= DATA_BYTES:
            data[name] = value
    return _json(data)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# ---- signatures


def new_secret() -> str:
    """A fresh secret of 32 random bytes."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def secret_key(secret: str) -> bytes:
    """The key in ``whsec_…``. Raises ValueError, which does not quote it."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise ValueError("a secret is whsec_ and base64; `gristmill webhooks secret` makes one") from exc
    if not secret.startswith(SECRET_PREFIX) or len(key) not in SECRET_BYTES:
        raise ValueError(
            "a secret is whsec_ and 24 to 64 bytes in base64; `gristmill webhooks secret` makes one"
        )
    return key


def signature(keys: Sequence[bytes], event: str, timestamp: int, body: bytes) -> str:
    """The header ``webhook-signature``: one for each key, while an old one is being replaced."""
    signed = f"{event}.{timestamp}.".encode() + body
    return " ".join(
        "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode() for key in keys
    )


def signed_headers(keys: Sequence[bytes], event: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The three headers of Standard Webhooks."""
    return {
        "webhook-id": event,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signature(keys, event, timestamp, body),
    }


def verify(keys: Sequence[bytes], headers: Mapping[str, str], body: bytes, now: float) -> bool:
    """Whether a delivery was signed with one of ``keys``, about now. ``headers``: names in lower case."""
    event, stamp, given = (headers.get(f"webhook-{name}", "") for name in ("id", "timestamp", "signature"))
    if not re.fullmatch("[0-9]{1,12}", stamp) or abs(now - int(stamp)) > TOLERANCE_S:
        return False
    good = signature(keys, event, int(stamp), body).split()
    return any(hmac.compare_digest(one.encode(), each.encode()) for one in given.split() for each in good)


# ---- deliveries


class WebhookTry(Answer):
    """One attempt to deliver an event."""

    n: Int
    at: Float
    """Unix seconds by the state server's clock."""
    ms: Int = 0
    """How long it took."""
    status: Int | None = None
    """What the receiver answered; None: it did not."""
    code: str | None = None
    """Why it counts as failed: ``status``, ``redirect``, ``timeout``, ``connection``, ``tls``, ``dns``,
    ``refused`` (not an address we may call), ``no_secret``, ``bad_answer``, ``unreadable`` (our own record);
    None: delivered."""
    reason: str = ""


class WebhookDelivery(Answer):
    """An event in the outbox, and what became of it. Times are unix seconds by the state server's clock."""

    id: str
    type: str
    endpoint: str
    """Its URL up to the query, which may hold a secret."""
    state: DeliveryState
    created_at: Float
    next_at: Float | None = None
    """The next try; None: there is none."""
    ended_at: Float | None = None
    tries: Int = 0
    why: str = ""
    """Code of the last failure; ``gave_up``, ``endpoint_disabled``, ``unreadable``."""
    data: dict[str, Any] = Field(default_factory=dict[str, Any])
    log: tuple[WebhookTry, ...] = ()
    """The last tries whose end is known; one that its keeper did not survive is missing."""


class WebhookEndpoint(Answer):
    """A receiver in trouble."""

    url: str
    failures: Int = 0
    """Tries that failed in a row. None need have: a URL of it may be switched off."""
    since: Float | None = None
    held_until: Float | None = None
    """Not tried before; unix seconds."""
    disabled_at: Float | None = None
    """When it last answered 410. What is switched off is the one URL that did, its query included."""
    why: str = ""
