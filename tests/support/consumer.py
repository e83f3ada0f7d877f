"""A Celery worker without an engine, as a process of its own: it notes each delivery and sleeps.

A body that is a disposition is what becomes of its first delivery; everything else is acknowledged.
Run as ``python consumer.py URL FILE LEASE_S JOB_S QUEUE…``; each event is a line of JSON in FILE.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def main(url: str, notes: str, lease_s: str, job_s: str, *queues: str) -> None:
    from gristmill.backends import broker
    from gristmill.backends.lease import LeaseRenewer
    from gristmill.schemas.queues import TASK
    from gristmill.schemas.settings import Settings
    from gristmill.worker.disposition import Disposition
    from gristmill.worker.pool import EngineRequest

    lease = float(lease_s)
    out = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(event: str, **fields: Any) -> None:
        os.write(
            out,
            (json.dumps({"event": event, "at": time.time(), "pid": os.getpid(), **fields}) + "\n").encode(),
        )

    settings = Settings(
        broker_url=url, visibility_timeout_s=lease, lease_renew_every_s=lease / 3, command_timeout_s=2
    )

    def claimable() -> tuple[str, ...]:
        if not ready:
            ready.append(True)
            note("ready")
        return queues

    ready: list[bool] = []
    gate = broker.Gate(claimable)
    app = broker.make_app(settings, gate=gate, queue_names=queues)
    logging.getLogger("gristmill.backends.claim_book").addFilter(
        lambda record: record.getMessage() != "claim.lost" or note("lost", tag=record.__dict__["tag"])
    )
    app.steps["consumer"].add(LeaseRenewer)

    def generate(task: Any, body: str) -> str:
        properties = task.request.properties
        tag = properties["delivery_tag"]
        note("start", job=task.request.id, tag=tag, n=properties["delivery_count"], body=body)
        time.sleep(float(job_s))
        note("end", job=task.request.id, tag=tag)
        first = properties["delivery_count"] == 1
        return body if first and body in set(Disposition) else Disposition.ACK.value

    app.task(generate, bind=True, name=TASK, Request=EngineRequest, acks_late=True)
    app.worker_main(
        [
            "worker",
            "-P",
            "threads",
            "-c",
            "16",
            "--without-gossip",
            "--without-mingle",
            "--without-heartbeat",
            "-l",
            "WARNING",
        ]
    )


class Consumers:
    """Starts consumers and reads their notes."""

    def __init__(
        self, url: str, directory: Path, *, lease_s: float, job_s: float, queues: tuple[str, ...]
    ) -> None:
        self._file = directory / "notes.jsonl"
        self._log = directory / "consumer.log"
        self._command = [sys.executable, __file__, url, str(self._file), str(lease_s), str(job_s), *queues]
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(self._command, stdout=log, stderr=log)
        self.running.append(process)
        return process

    def notes(self, event: str, pid: int | None = None) -> list[dict[str, Any]]:
        if not self._file.exists():
            return []
        notes = [json.loads(line) for line in self._file.read_text().splitlines()]
        return [note for note in notes if note["event"] == event and pid in (None, note["pid"])]

    def jobs(self, event: str) -> list[str]:
        return [note["job"] for note in self.notes(event)]


@contextmanager
def consumers(
    url: str, directory: Path, *, lease_s: float, job_s: float, queues: tuple[str, ...] = ("q",)
) -> Iterator[Consumers]:
    """Consumers that are gone, by kill if need be, when the block ends."""
    crowd = Consumers(url, directory, lease_s=lease_s, job_s=job_s, queues=queues)
    try:
        yield crowd
    finally:
        for process in crowd.running:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
