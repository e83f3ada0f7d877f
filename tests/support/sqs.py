"""SQS over HTTP: moto's server in this process, and ministack as a process of its own, both on loopback."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from gristmill.backends.sqs_admin import create_queues
from gristmill.schemas.queues import dead_queue_name, queue_names
from gristmill.schemas.settings import Settings

from .valkey import Valkey
from .waiting import wait_until


class SqsServer:
    """One emulator. ``url`` is a broker URL; each test has a model, and so queues, of its own."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.model = f"m{secrets.token_hex(4)}"
        self.queues = queue_names(self.model)
        self.dead = dead_queue_name(self.model)
        self.client: Any = boto3.client(
            "sqs",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )

    @property
    def url(self) -> str:
        return f"sqs://test:test@{self.endpoint.removeprefix('http://')}?region=us-east-1"

    def settings(self, valkey: Valkey, directory: Path, **fields: Any) -> Settings:
        (directory / "results").mkdir(exist_ok=True)
        return Settings(
            **{
                "broker_url": self.url,
                "state_url": valkey.url,
                "results_url": f"file://{directory}/results",
                "model": self.model,
                "visibility_timeout_s": 3,
                "lease_renew_every_s": 1,
                **fields,
            }
        )

    def create(self, settings: Settings, **options: Any) -> None:
        create_queues(settings, self.model, **options)

    def counts(self, queue: str) -> tuple[int, int]:
        """Visible and in flight."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        got = self.client.get_queue_attributes(QueueUrl=self.queue_url(queue), AttributeNames=names)
        return tuple(int(got["Attributes"][name]) for name in names)  # type: ignore[return-value]

    def queue_url(self, queue: str) -> str:
        return self.client.get_queue_url(QueueName=queue)["QueueUrl"]


@pytest.fixture(scope="session")
def ministack_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One process for the whole run."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    directory = tmp_path_factory.mktemp("ministack")
    environment = os.environ | {
        "GATEWAY_PORT": str(port),
        "BIND_HOST": "127.0.0.1",
        "SERVICES": "sqs",
        "TMPDIR": str(directory),
        "PERSIST_STATE": "0",
    }
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ministack"], env=environment, cwd=directory, stdout=log, stderr=log
        )

    def answers() -> bool:
        assert process.poll() is None, (directory / "log").read_text()[-3000:]
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            return False
        return True

    try:
        wait_until(answers, 60, "ministack answers", poll_s=0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def moto_sqs(moto_client: Any) -> SqsServer:
    """moto's, which is strict."""
    return SqsServer(moto_client.meta.endpoint_url)


@pytest.fixture(params=["moto", "ministack"])
def sqs(request: pytest.FixtureRequest) -> SqsServer:
    """Each of the two in turn."""
    if request.param == "moto":
        return request.getfixturevalue("moto_sqs")
    return SqsServer(request.getfixturevalue("ministack_endpoint"))
