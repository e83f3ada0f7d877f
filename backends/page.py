"""Page: GET over HTTP for probes and Prometheus, on a thread of its own."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from ..schemas.errors import Misconfigured

log = logging.getLogger(__name__)

Answer = Callable[[str, str], tuple[int, str, bytes]]
"""Path (no query, no slash at its end) and Accept header → status, content type and body. Must not raise."""

CLIENT_TIMEOUT_S = 10.0


class Page:
    """Listens at once, and answers from ``start`` on: until then connections wait. ``port`` 0: any free one.

    Raises Misconfigured for a port that cannot be had.
    """

    def __init__(self, host: str, port: int, answer: Answer) -> None:
        try:
            self._server = _Server((host, port), answer)
        except OSError as exc:
            raise Misconfigured(
                f"cannot listen on {host}:{port} for health and metrics ({exc.strerror or exc}); "
                "choose another with --health-port, or 0 for any free one"
            ) from exc
        self.port: int = self._server.server_port
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="health", daemon=True
        )

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port. Requests in flight may be cut short."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], answer: Answer) -> None:
        self.answer = answer
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """A probe that hung up is not worth a trace on stderr."""
        log.debug("health.request_failed", exc_info=True)  # noqa: LOG014 - called from an except block


class _Handler(BaseHTTPRequestHandler):
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride] - the class attribute is typed BaseServer
    server_version, sys_version = "gristmill", ""
    timeout = CLIENT_TIMEOUT_S  # else a silent client would hold its thread for ever

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        path = urlsplit(self.path).path.rstrip("/")
        status, content_type, body = self.server.answer(path, self.headers.get("Accept", ""))
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name for it
        """Probes come every few seconds and are nobody's news."""
