"""HealthServer: /metrics and /health for probes and Prometheus, on a thread of its own."""

from __future__ import annotations

import json
from collections.abc import Callable

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from ..backends.page import Page

Check = Callable[[], str | None]
"""None: all is well. Otherwise the reason, in words. Must not block or raise."""


class HealthServer(Page):
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
        super().__init__(host, port, self.answer)

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
