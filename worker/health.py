"""HealthServer: /metrics and /health for probes and Prometheus, on a thread of its own."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from ..schemas.errors import Misconfigured

log = logging.getLogger(__name__)

Check = Callable[[], str | None]
"""None: all is well. Otherwise the reason, in words. Must not block or raise."""

CLIENT_TIMEOUT_S = 10.0


class HealthServer:
    """Answers GET /health/live, /health/ready, /health (both of them) and /metrics.

    ``live`` fails when only a restart of the process can help, ``ready`` while it takes no jobs.
    Loopback unless told otherwise: metrics tell model names and traffic. ``port`` 0 picks a free one.
    """

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, *, live: Check, ready: Check
    ) -> None:
        self._checks: dict[str, tuple[Check, ...]] = {
            "/health": (live, ready),
            "/health/live": (live,),
            "/health/ready": (ready,),
        }
        self._registry = registry
        try:
            self._server = _Server((host, port), self)
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
        """Begin to answer. Before this, connections wait in the listen queue."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port. Requests in flight may be cut short."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def answer(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """Status, content type and body for a path."""
        if path == "/metrics":
            encode, content_type = choose_encoder(accept)
            return 200, content_type, encode(self._registry)
        checks = self._checks.get(path)
        if checks is None:
            return 404, "application/json", _body("not_found", f"try /metrics or {', '.join(self._checks)}")
        reason = next((reason for check in checks if (reason := check()) is not None), None)
        status, word = (200, "ok") if reason is None else (503, "unavailable")
        return status, "application/json", _body(word, reason)


def _body(status: str, reason: str | None) -> bytes:
    return json.dumps({"status": status, "reason": reason}).encode() + b"\n"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], owner: HealthServer) -> None:
        self.owner = owner
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
        status, content_type, body = self.server.owner.answer(path, self.headers.get("Accept", ""))
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name for it
        """Probes come every few seconds and are nobody's news."""
