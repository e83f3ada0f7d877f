"""HealthPage: /health and /metrics of a keeper, without the libraries that a worker brings."""

from __future__ import annotations

import json
import time

from ..backends.page import Page
from .courier import Courier
from .keeper import Keeper

SILENT_S = 60.0
"""Rounds fail for so long before a probe hears of it."""


class HealthPage(Page):
    """Answers GET /health (200, or 503 while its rounds fail) and /metrics. Loopback by default."""

    def __init__(self, host: str, port: int, keeper: Keeper) -> None:
        self._keeper = keeper
        super().__init__(host, port, self.answer)
        self.start()

    def answer(self, path: str, _accept: str) -> tuple[int, str, bytes]:
        """Status, content type and body for a path."""
        keeper = self._keeper
        silent_s = time.monotonic() - keeper.heard_at
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4", metrics(keeper, silent_s).encode()
        if path.startswith("/health"):
            body = {"ok": silent_s < SILENT_S, "leads": keeper.leads, "silent_s": round(silent_s, 1)}
            return 200 if body["ok"] else 503, "application/json", json.dumps(body).encode()
        return 404, "text/plain", b"there are /health and /metrics\n"


def metrics(keeper: Keeper, silent_s: float) -> str:
    """In Prometheus' text format."""
    totals = keeper.totals
    counters = {
        "jobs_ended": totals.ended,
        "dead_drained": totals.drained,
        "claims_swept": totals.swept,
        "messages_pruned": totals.pruned,
        "segments_sent": totals.sent,
        "batches_finished": keeper.batches_finished,
    }
    gauges = {"leads": int(keeper.leads), "silent_seconds": round(silent_s, 3)}
    lines = [
        line
        for kind, values in (("counter", counters), ("gauge", gauges))
        for name, value in values.items()
        for full in [f"gristmill_keeper_{name}{'_total' if kind == 'counter' else ''}"]
        for line in (f"# TYPE {full} {kind}", f"{full} {value}")
    ]
    return "\n".join(lines + _webhooks(keeper.courier)) + "\n"


def _webhooks(courier: Courier | None) -> list[str]:
    """Tries by result, of this keeper; and what stands in the outbox, from the one that leads."""
    if courier is None:
        return []
    name = "gristmill_webhook_deliveries_total"
    lines = [f"# TYPE {name} counter"]
    lines += [f'{name}{{result="{result}"}} {count}' for result, count in sorted(courier.totals.items())]
    counts = courier.counts
    if counts is not None:
        gauges = {
            "pending": counts.pending,
            "oldest_pending_seconds": round(counts.oldest_pending_s, 3),
            "failed": counts.failed,
            "endpoints_in_trouble": counts.troubled,
        }
        for gauge, value in gauges.items():
            lines += [f"# TYPE gristmill_webhooks_{gauge} gauge", f"gristmill_webhooks_{gauge} {value}"]
    return lines
