"""Pause and resume, idempotency under contention, and what SQS gave up on: no worker, real servers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gristmill.backends import broker
from gristmill.backends.message_queue import ClaimedMessage, MessageQueue
from gristmill.backends.state import State, open_state
from gristmill.keeper.keeper import open_keeper
from gristmill.keeper.settings import KeeperSettings
from gristmill.producer import AsyncClient, Client
from gristmill.producer.cli import cli
from gristmill.producer.console import run_guarded
from gristmill.schemas.errors import IdempotencyConflict
from gristmill.schemas.job import JobState, Priority, idempotent_job_id
from gristmill.schemas.queues import queue_name, queue_names
from gristmill.schemas.settings import Settings
from gristmill.schemas.status import WorkerInfo

from ..support.journal import make_job
from ..support.sqs import SqsServer
from ..support.valkey import Valkey

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def settings(valkey: Valkey, tmp_path: Path) -> Settings:
    (tmp_path / "results").mkdir()
    return Settings(broker_url=valkey.url, results_url=f"file://{tmp_path}/results")


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with open_state(settings) as state, Client(settings) as opened:
        state.announce("tiny", queue_names("tiny"))
        yield opened


@pytest.fixture
def queue(valkey: Valkey) -> MessageQueue:
    return MessageQueue(valkey.client(), lease_s=60)


@pytest.fixture
def run(
    client: Client,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Run:
    monkeypatch.setenv("GRISTMILL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("GRISTMILL_BROKER_URL", settings.broker_url)
    monkeypatch.setenv("GRISTMILL_RESULTS_URL", settings.results_url)
    monkeypatch.delenv("GRISTMILL_MODEL", raising=False)

    def run_it(*args: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_guarded(cli, [str(arg) for arg in args])
        return code, *capfd.readouterr()

    return run_it


def test_a_paused_queue_is_claimed_from_by_nobody_until_it_is_resumed(
    run: Run, client: Client, queue: MessageQueue
) -> None:
    batch, normal = (client.submit("x", priority=priority) for priority in ("batch", "normal"))
    assert run("queues", "pause", "--class", "batch")[:2] == (0, "gm-tiny-batch  paused\n")
    claimed = queue.claim(queue_names("tiny"))
    assert isinstance(claimed, ClaimedMessage)
    assert claimed.queue == queue_name("tiny", Priority.NORMAL)
    assert isinstance(queue.claim(queue_names("tiny")), str), "nothing else, though one waits"
    assert "paused" in run("queues", "list")[1].splitlines()[2]

    assert "queues resume" in run("status", batch.id)[2]
    assert run("status", normal.id)[2] == ""
    assert "paused: gm-tiny-batch" in "".join(run("doctor")[1:])

    _, out, _ = run("queues", "resume", "--model", "tiny", "--json")
    assert [json.loads(line)["paused"] for line in out.splitlines()] == [False] * 3
    assert isinstance(queue.claim(queue_names("tiny")), ClaimedMessage)


async def test_who_awaits_hears_of_a_paused_queue_as_well(run: Run, settings: Settings) -> None:
    run("queues", "pause", "--class", "batch")
    async with AsyncClient(settings) as client:
        batch, normal = [await client.submit("x", priority=priority) for priority in ("batch", "normal")]
        assert await client.queue_is_paused(await batch.status())
        assert not await client.queue_is_paused(await normal.status())
        lost = (await batch.status()).model_copy(update={"priority": None})
        assert not await client.queue_is_paused(lost), "a record that was lost does not say which it was"


def test_workers_are_listed_with_what_they_do_and_what_is_wrong(run: Run, state: State) -> None:
    code, out, err = run("workers")
    assert (code, out) == (0, "")
    assert "start one: gristmill-worker run --model MODEL" in err
    busy = WorkerInfo(
        models=("tiny",), host="h", pid=7, version="0", in_hand=3, running=2, waiting=1, seen_at=time.time()
    )
    odd = {"models": ("\x1b[2J",), "state": "draining", "trouble": "no such bucket", "seen_at": None}
    state.register("h-7-aaa", busy, 60)
    state.register("h-8-bbb", busy.model_copy(update=odd), 60)
    _, out, err = run("workers")
    first, second, trouble = out.splitlines()
    assert first.split()[:9] == ["h-7-aaa", "ready", "tiny", "3", "jobs:", "2", "running,", "1", "waiting"]
    assert re.search(r"heard of \d+ s ago$", first)
    assert second.split()[:3] == ["h-8-bbb", "draining", "\\x1b[2J"], "a name that would move the cursor"
    assert "heard of" not in second
    assert (trouble, err) == ("  → no such bucket", "")

    (line,) = run("workers", "--model", "tiny", "--json")[1].splitlines()
    told = json.loads(line)
    assert 0 <= told.pop("age_s") < 30
    assert told == {"worker": "h-7-aaa", **busy.model_dump(mode="json")}


def test_pausing_needs_to_know_which_model(run: Run) -> None:
    assert "[model_not_found]" in run("queues", "pause", "--model", "nope")[2]


def test_the_command_line_takes_classes_by_the_name_that_they_show(
    run: Run, client: Client, queue: MessageQueue
) -> None:
    """`--priority batch` was refused: it had to be BATCH."""
    code, out, err = run("submit", "x", "--priority", "batch", "--deadline-s", "30")
    assert code == 0, err
    status = client.get(out.strip()).status()
    assert status.priority is Priority.BATCH
    assert status.expires_at is not None
    assert status.submitted_at is not None
    assert abs(status.expires_at - status.submitted_at - 30) < 5


SUBMIT_16 = """
import sys
from gristmill.producer import Client
from gristmill.schemas.errors import IdempotencyConflict
with Client(sys.argv[1]) as client:
    for _ in range(16):
        try:
            print(client.submit(sys.argv[2], model="tiny", idempotency_key="k").id)
        except IdempotencyConflict:
            print("conflict")
"""


def test_one_key_is_one_job_whoever_sends_it_at_once(client: Client, settings: Settings) -> None:
    """From sixteen threads and two processes; a third one says something else under the same key."""
    command = [sys.executable, "-P", "-c", SUBMIT_16, settings.broker_url]
    others = [
        subprocess.Popen([*command, text], stdout=subprocess.PIPE, text=True) for text in ("hello", "hello")
    ]
    with ThreadPoolExecutor(16) as threads:
        ours = set(threads.map(lambda _: client.submit("hello", idempotency_key="k").id, range(64)))
    outputs = [process.communicate(timeout=60)[0].split() for process in others]
    expected = idempotent_job_id("default", "k")
    assert ours == {expected}
    assert outputs == [[expected] * 16] * 2
    assert client.get(expected).status().state is JobState.QUEUED
    with pytest.raises(IdempotencyConflict):
        client.submit("goodbye", idempotency_key="k")


def test_of_two_requests_under_one_key_one_wins_and_the_other_hears_of_it(client: Client) -> None:
    def submit(number: int) -> str:
        try:
            return client.submit(f"text {number % 2}", idempotency_key="k").job.prompt  # type: ignore[union-attr]
        except IdempotencyConflict:
            return "conflict"

    with ThreadPoolExecutor(16) as threads:
        said = list(threads.map(submit, range(32)))
    assert said.count("conflict") == 16
    assert len(set(said)) == 2


def test_what_sqs_gave_up_on_becomes_a_dead_letter_and_a_failed_job(
    moto_sqs: SqsServer, valkey: Valkey, tmp_path: Path
) -> None:
    settings = moto_sqs.settings(valkey, tmp_path)
    moto_sqs.create(settings)
    job = make_job(model=moto_sqs.model, tenant="acme")
    app = broker.make_app(settings)
    broker.publish(app, moto_sqs.dead, job.to_json(), job.id, "acme")
    broker.close(app)
    with open_state(settings) as state, Client(settings) as client:
        state.submit(job)
        state.announce(moto_sqs.model, moto_sqs.queues)
        with open_keeper(KeeperSettings(**settings.model_dump()), "k1") as keeper:
            assert keeper.round().drained == 1
        assert client.get(job.id).status().state is JobState.FAILED
        (letter,) = client.dead.list()
        assert (letter.job_id, letter.tenant, letter.queue) == (job.id, "acme", moto_sqs.dead)
        assert client.dead.requeue(letter).retry_of == job.id
    assert moto_sqs.counts(moto_sqs.dead) == (0, 0)
