"""Listener: a receiver of webhooks for trying them out. It checks signatures and hands events on."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..schemas.errors import Misconfigured
from ..schemas.webhook import verify

BODY_BYTES = 1 << 20
CLIENT_TIMEOUT_S = 10.0
UNAUTHORIZED = 401


@dataclass(frozen=True, slots=True)
class Received:
    """A request that came. ``event`` is None unless its signature is good."""

    path: str
    event: dict[str, Any] | None
    why: str = ""


class Listener:
    """Answers 401 to what is not signed with one of ``keys``, else ``status``. ``port`` 0: any free one.

    Raises Misconfigured for a port that cannot be had.
    """

    def __init__(
        self,
        host: str,
        port: int,
        keys: Sequence[bytes],
        on_received: Callable[[Received], None],
        status: int = 204,
    ) -> None:
        self.keys, self.on_received, self.status = keys, on_received, status
        try:
            self._server = _Server((host, port), self)
        except OSError as exc:
            raise Misconfigured(
                f"cannot listen on {host}:{port} ({exc.strerror or exc}); choose another --port, or 0"
            ) from exc
        self.port: int = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def take(self, path: str, headers: dict[str, str], body: bytes) -> int:
        """Judge a request; returns the status to answer with."""
        if not verify(self.keys, headers, body, time.time()):
            self.on_received(Received(path, None, "its signature is not by our secret, or too old"))
            return UNAUTHORIZED
        try:
            event = json.loads(body)
        except ValueError:
            event = {"body": body.decode("utf-8", "replace")}
        self.on_received(Received(path, event))
        return self.status


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], listener: Listener) -> None:
        self.listener = listener
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride] - the class attribute is typed BaseServer
    server_version, sys_version = "gristmill", ""
    timeout = CLIENT_TIMEOUT_S

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > BODY_BYTES:
            self._answer(413)
            return
        body = self.rfile.read(int(length))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self._answer(self.server.listener.take(self.path, headers, body))

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name for it
        """What came is told by ``on_received``."""
