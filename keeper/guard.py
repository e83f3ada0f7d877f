"""Guard: which addresses webhooks may be sent to. Whoever may submit a job may name one: it is not trusted.

A host is looked up once, all its addresses are judged, and the connection goes to one that was judged: a name
that changes its mind in between (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from ..schemas.errors import WebhookFailed, WebhookRefused
from ..schemas.webhook import check_url

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Resolve = Callable[[str, int], Sequence[str]]
"""Host and port → addresses. Raises OSError."""

PORTS = {"https": 443, "http": 80}
GLOBAL_V6 = IPv6Network("2000::/3")
NAT64 = IPv6Network("64:ff9b::/96")
COMPATIBLE = IPv6Network("::/96")
# What Python's tables (3.11 to 3.14) call global in some version, and leads somewhere else.
NOT_PUBLIC = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # IETF protocol assignments: Teredo, benchmarking, ORCHID
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4: the embedded address may be any
            "3fff::/20",  # documentation
        ),
    )
)
NOT_PUBLIC_V4 = tuple(
    map(
        IPv4Network,
        (
            "192.0.0.0/24",  # IETF protocol assignments
            "192.88.99.0/24",  # 6to4 relays
            "168.63.129.16/32",  # Azure's metadata and DNS, a public address in name only
        ),
    )
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where a URL leads: its checked addresses, and what to say there."""

    scheme: str
    host: str
    port: int
    path: str
    addresses: tuple[str, ...]

    @property
    def authority(self) -> str:
        """For the ``Host`` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def resolve(host: str, port: int) -> Sequence[str]:
    """All addresses of a host, as the system finds them. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


class Guard:
    """``allow``: networks that are not public and may be called all the same, also without TLS."""

    def __init__(self, allow: Sequence[Network] = (), look_up: Resolve = resolve) -> None:
        self._allow, self._look_up = tuple(allow), look_up

    def check(self, url: str) -> Target:
        """Where ``url`` leads. Blocks as long as the look-up does.

        Raises WebhookRefused for an address that may not be called, WebhookFailed where none is found.
        """
        try:
            check_url(url)
        except ValueError as exc:
            raise WebhookRefused(f"its URL {exc}", final=True) from exc
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or PORTS[parts.scheme]
        try:
            addresses = self._look_up(host, port)
        except (OSError, UnicodeError) as exc:
            raise WebhookFailed(f"{host} has no address: {exc}", "dns") from exc
        if not addresses:
            raise WebhookFailed(f"{host} has no address", "dns")
        for each in addresses:
            self._judge(host, each, parts.scheme)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return Target(parts.scheme, host, port, path, tuple(addresses))

    def _judge(self, host: str, text: str, scheme: str) -> None:
        try:
            address = ip_address(text)
        except ValueError as exc:
            raise WebhookRefused(f"{host} has {text!r}, which is no address", final=False) from exc
        if any(each in network for network in self._allow for each in {address, inner(address)}):
            return
        if not public(address):
            raise WebhookRefused(
                f"{host} leads to {address}, which is not public; "
                "GRISTMILL_WEBHOOK_ALLOW lists networks that may be called all the same",
                final=host == text,
            )
        if scheme != "https":
            raise WebhookRefused(
                f"{host} is public, and http:// would show the event to everybody between; use https://",
                final=True,
            )


def inner(address: Address) -> Address:
    """The IPv4 address within one that maps or translates to it; else the address itself."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address in NAT64 or address in COMPATIBLE:
            return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def public(address: Address) -> bool:
    """Whether it leads to the open internet. What is not known to, does not."""
    address = inner(address)
    if isinstance(address, IPv6Address):
        return address in GLOBAL_V6 and address.is_global and not any(address in each for each in NOT_PUBLIC)
    return (
        address.is_global
        and not address.is_multicast
        and not address.is_reserved
        and not any(address in each for each in NOT_PUBLIC_V4)
    )
