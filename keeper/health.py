"""HealthPage: /health and /metrics of a keeper, without the libraries that a worker brings."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ..schemas.errors import Misconfigured
from .keeper import Keeper

SILENT_S = 60.0
"""Rounds fail for so long before a probe hears of it."""
CLIENT_TIMEOUT_S = 10.0


class HealthPage:
    """Answers GET /health (200, or 503 while its rounds fail) and /metrics. Loopback by default."""

    def __init__(self, host: str, port: int, keeper: Keeper) -> None:
        try:
            self._server = _Server((host, port), keeper)
        except OSError as exc:
            raise Misconfigured(
                f"cannot listen on {host}:{port} for health and metrics ({exc.strerror or exc}); "
                "choose another with --health-port, or 0 for any free one"
            ) from exc
        self.port: int = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="health", daemon=True).start()

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], keeper: Keeper) -> None:
        self.keeper = keeper
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_TIMEOUT_S
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]  # it is one of ours

    def do_GET(self) -> None:
        keeper = self.server.keeper
        silent_s = time.monotonic() - keeper.heard_at
        if self.path == "/metrics":
            self._send(200, "text/plain; version=0.0.4", metrics(keeper, silent_s))
        elif self.path.startswith("/health"):
            body = {"ok": silent_s < SILENT_S, "leads": keeper.leads, "silent_s": round(silent_s, 1)}
            self._send(200 if body["ok"] else 503, "application/json", json.dumps(body))
        else:
            self._send(404, "text/plain", "there are /health and /metrics\n")

    def _send(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name in the standard library
        """Nothing: a probe every few seconds is no event."""


def metrics(keeper: Keeper, silent_s: float) -> str:
    """In Prometheus' text format."""
    totals = keeper.totals
    counters = {
        "jobs_ended": totals.ended,
        "dead_drained": totals.drained,
        "claims_swept": totals.swept,
        "messages_pruned": totals.pruned,
    }
    gauges = {"leads": int(keeper.leads), "silent_seconds": round(silent_s, 3)}
    lines = [
        line
        for kind, values in (("counter", counters), ("gauge", gauges))
        for name, value in values.items()
        for full in [f"gristmill_keeper_{name}{'_total' if kind == 'counter' else ''}"]
        for line in (f"# TYPE {full} {kind}", f"{full} {value}")
    ]
    return "\n".join(lines) + "\n"
