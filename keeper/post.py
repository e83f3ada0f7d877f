"""One HTTP request to a receiver: to the address that was checked, in bounded time, reading little.

Plain sockets: no proxy from the environment, no redirect, no retry and no pool stands between the check of
an address and the connection to it. Of the answer only its head is read, and never kept: what an internal
service says must not come to who may see deliveries.
"""

from __future__ import annotations

import io
import re
import socket
import ssl
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException, parse_headers
from pathlib import Path

from ..schemas.errors import Misconfigured, WebhookFailed
from .guard import Target

HEAD_BYTES = 32 * 1024
ADDRESSES_TRIED = 4
_STATUS = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])(?: [^\r\n]*)?\r?\n")
_HEAD_END = re.compile(rb"\r?\n\r?\n")


@dataclass(frozen=True, slots=True)
class Reply:
    """A receiver's answer. ``retry_after_s``: when it wants to be asked again, if it says; perhaps inf."""

    status: int
    retry_after_s: float | None = None


def tls_context(ca_file: Path | None = None) -> ssl.SSLContext:
    """Certificates and host names are checked. Raises Misconfigured for a file that cannot be used."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_file is not None:
        try:
            context.load_verify_locations(ca_file)
        except OSError as exc:  # ssl.SSLError is one
            raise Misconfigured(f"GRISTMILL_WEBHOOK_CA_FILE: {ca_file}: {exc.strerror or exc}") from exc
    return context


def post(
    target: Target, headers: Mapping[str, str], body: bytes, *, tls: ssl.SSLContext, deadline: float
) -> Reply:
    """POST ``body``. ``deadline``: by ``time.monotonic()``; nothing a receiver does makes it later.

    Raises WebhookFailed.
    """
    try:
        with _connect(target, deadline) as plain, _secured(plain, target, tls, deadline) as stream:
            _limit(stream, deadline)
            stream.sendall(_request(target, headers, body))
            reply = _parse(_read_head(stream, deadline))
            with suppress(OSError):  # it has said all we want to hear
                stream.shutdown(socket.SHUT_RDWR)
            return reply
    except TimeoutError as exc:
        raise WebhookFailed(f"{target.host} did not answer in time", "timeout") from exc
    except ssl.SSLError as exc:
        raise WebhookFailed(f"{target.host}: {exc.reason or exc.strerror or exc}", "tls") from exc
    except OSError as exc:
        raise WebhookFailed(f"{target.host}: {exc.strerror or exc}", "connection") from exc


def _connect(target: Target, deadline: float) -> socket.socket:
    """To the first address that takes a connection; the others get their share of the time."""
    addresses = target.addresses[:ADDRESSES_TRIED]
    failure: OSError | None = None
    for position, address in enumerate(addresses):
        share_s = _left(deadline) / (len(addresses) - position)
        try:
            return socket.create_connection((address, target.port), timeout=share_s)
        except OSError as exc:
            failure = exc
    assert failure is not None, "a target has an address"
    raise failure


def _secured(plain: socket.socket, target: Target, tls: ssl.SSLContext, deadline: float) -> socket.socket:
    if target.scheme != "https":
        return plain
    _limit(plain, deadline)
    return tls.wrap_socket(plain, server_hostname=target.host.rstrip("."))


def _request(target: Target, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = {
        "Host": target.authority,
        "User-Agent": "gristmill",
        "Accept": "*/*",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    head = f"POST {target.path} HTTP/1.1\r\n" + "".join(
        f"{name}: {value}\r\n" for name, value in lines.items()
    )
    return head.encode("ascii") + b"\r\n" + body


def _read_head(stream: socket.socket, deadline: float) -> bytes:
    """The head of the final answer; interim ones (1xx) are passed over. Raises OSError, WebhookFailed."""
    read = b""
    while True:
        while (end := _HEAD_END.search(read)) is None:
            if len(read) > HEAD_BYTES:
                raise WebhookFailed(
                    f"the head of its answer is larger than {HEAD_BYTES:,} bytes", "bad_answer"
                )
            _limit(stream, deadline)
            data = stream.recv(4096)
            if not data:
                raise WebhookFailed("it closed the connection without an answer", "connection")
            read += data
        head = read[: end.end()]
        if not head.startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")):
            return head
        read = read[end.end() :]


def _parse(head: bytes) -> Reply:
    status = _STATUS.match(head)
    if status is None:
        raise WebhookFailed("its answer is not HTTP", "bad_answer")
    try:
        headers = parse_headers(io.BytesIO(head[status.end() :]))
    except HTTPException as exc:
        raise WebhookFailed(f"its answer is not HTTP: {type(exc).__name__}", "bad_answer") from exc
    return Reply(int(status[1]), _retry_after_s(headers.get("Retry-After")))


def _retry_after_s(value: str | None) -> float | None:
    """Of both forms: seconds, and a date by the wall clock."""
    if value is None:
        return None
    if re.fullmatch("[0-9]+", value.strip()):
        return float(value)
    try:
        at = parsedate_to_datetime(value).timestamp()
    except (ValueError, OverflowError, TypeError):
        return None
    return max(0.0, at - time.time())


def _limit(stream: socket.socket, deadline: float) -> None:
    stream.settimeout(_left(deadline))


def _left(deadline: float) -> float:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    return left_s
