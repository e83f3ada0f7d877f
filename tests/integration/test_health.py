"""The health port, asked over real HTTP."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from gristmill.schemas.errors import Misconfigured
from gristmill.worker.health import HealthServer
from gristmill.worker.metrics import Metrics


class Worker:
    """What the two checks read."""

    trouble: str | None = None
    """Why it should be restarted."""
    busy: str | None = None
    """Why it takes no jobs."""

    def __init__(self) -> None:
        self.metrics = Metrics("tiny")
        self.server = HealthServer(
            "127.0.0.1", 0, self.metrics.registry, live=lambda: self.trouble, ready=lambda: self.busy
        )

    def get(self, path: str, method: str = "GET") -> tuple[int, str, str]:
        """Status, content type, body."""
        url = f"http://127.0.0.1:{self.server.port}{path}"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=5) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read().decode()
        except urllib.error.HTTPError as answer:
            with answer:
                return answer.code, answer.headers["Content-Type"], answer.read().decode()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    worker.server.start()
    yield worker
    worker.server.stop()


@pytest.mark.parametrize("path", ["/health", "/health/live", "/health/ready", "/health/ready/?probe=1"])
def test_a_healthy_worker_answers_200(worker: Worker, path: str) -> None:
    status, content_type, body = worker.get(path)
    assert (status, content_type) == (200, "application/json")
    assert json.loads(body) == {"status": "ok", "reason": None}


def test_a_worker_that_drains_is_alive_and_not_ready_and_says_why(worker: Worker) -> None:
    worker.busy = "draining after SIGTERM"
    assert worker.get("/health/live")[0] == 200
    for path in ("/health/ready", "/health"):
        status, _, body = worker.get(path)
        assert status == 503
        assert json.loads(body) == {"status": "unavailable", "reason": "draining after SIGTERM"}


def test_a_worker_without_an_engine_is_not_alive(worker: Worker) -> None:
    worker.trouble = "the engine died 4 times without a token"
    assert worker.get("/health/live")[0] == 503
    assert worker.get("/health")[0] == 503


def test_metrics_are_served_in_the_format_prometheus_reads(worker: Worker) -> None:
    worker.metrics.on_redelivered()
    status, content_type, body = worker.get("/metrics")
    assert status == 200
    assert content_type.startswith("text/plain; version=")
    assert 'gristmill_redelivered_total{model_name="tiny"} 1.0' in body.splitlines()


def test_an_unknown_path_is_a_404_that_names_the_known_ones(worker: Worker) -> None:
    status, _, body = worker.get("/generate")
    assert status == 404
    assert "/metrics" in json.loads(body)["reason"]


def test_head_answers_without_a_body(worker: Worker) -> None:
    status, _, body = worker.get("/health/live", method="HEAD")
    assert (status, body) == (200, "")


def test_a_client_that_hangs_up_or_says_nothing_stops_nobody_else(worker: Worker) -> None:
    silent = socket.create_connection(("127.0.0.1", worker.server.port), timeout=5)
    with socket.create_connection(("127.0.0.1", worker.server.port), timeout=5) as rude:
        rude.sendall(b"GET /metrics HTTP/1.1\r\n")
    assert worker.get("/health/live")[0] == 200
    silent.close()


def test_it_listens_on_loopback_only(worker: Worker) -> None:
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", worker.server.port), timeout=5).close()


def test_a_taken_port_is_an_error_that_names_the_flag(worker: Worker) -> None:
    with pytest.raises(Misconfigured, match=rf"127\.0\.0\.1:{worker.server.port} .*--health-port"):
        HealthServer(
            "127.0.0.1", worker.server.port, worker.metrics.registry, live=lambda: None, ready=lambda: None
        )


def test_after_stop_the_port_is_closed() -> None:
    worker = Worker()
    worker.server.start()
    worker.server.stop()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", worker.server.port), timeout=5).close()


def test_stopping_a_server_that_was_never_started_closes_its_port() -> None:
    worker = Worker()
    worker.server.stop()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", worker.server.port), timeout=5).close()
