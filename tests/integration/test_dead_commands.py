"""`client.dead` and `gristmill dead`: a real Valkey, and letters that a worker would have left."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gristmill.backends.dead import DeadLetters
from gristmill.backends.message_queue import ClaimedMessage, MessageQueue
from gristmill.backends.sink import ResultSink
from gristmill.backends.state import State
from gristmill.backends.store import open_store
from gristmill.producer import AsyncClient, Client
from gristmill.producer.cli import cli
from gristmill.producer.console import run_guarded
from gristmill.schemas.errors import BadInput, BrokerUnavailable, JobNotFound, WaitTimeout
from gristmill.schemas.job import Job, JobState, Priority
from gristmill.schemas.queues import queue_name
from gristmill.schemas.result import ErrorInfo, Result, Timings
from gristmill.schemas.settings import Settings
from gristmill.schemas.status import WorkerInfo

from ..support.valkey import Valkey

QUEUE = queue_name("tiny", Priority.NORMAL)
SECRET = "the prompt nobody must see"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def settings(valkey: Valkey, tmp_path: Path) -> Settings:
    (tmp_path / "results").mkdir()
    return Settings(broker_url=valkey.url, results_url=f"file://{tmp_path}/results")


@pytest.fixture
def client(settings: Settings, state: State) -> Iterator[Client]:
    state.register("w1", WorkerInfo(models=("tiny",), host="here", pid=1, version="0"), 600)
    with Client(settings) as opened:
        yield opened


@pytest.fixture
def queue(valkey: Valkey) -> MessageQueue:
    return MessageQueue(valkey.client(), lease_s=60)


def bury(client: Client, queue: MessageQueue, state: State, settings: Settings, *, ended: bool = True) -> Job:
    """A job that its worker gave up, as a worker would: result, final state, dead letter."""
    job = client.submit(SECRET, tenant="acme", metadata={"k": "v"}, idempotency_key="once").job
    assert job is not None
    message = queue.claim([QUEUE])
    assert isinstance(message, ClaimedMessage)
    if ended:
        result = Result(
            job_id=job.id,
            model=job.model,
            state=JobState.FAILED,
            timings=Timings(submitted_at=job.submitted_at, finished_at=job.submitted_at),
            error=ErrorInfo(code="max_attempts", message="the engine died of it"),
            attempts=3,
        )
        store = open_store(settings.results, settings)
        ResultSink(state, store, inline_bytes=65_536).commit(result)
    assert queue.bury(message.tag, "max_attempts: the engine died of it")
    return job


@pytest.fixture
def buried(client: Client, queue: MessageQueue, state: State, settings: Settings) -> Job:
    return bury(client, queue, state, settings)


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

    def run_it(*args: str) -> tuple[int, str, str]:
        capfd.readouterr()
        code = run_guarded(cli, ["dead", *args])
        return code, *capfd.readouterr()

    return run_it


def test_a_requeued_job_is_a_new_one_that_names_the_old(
    client: Client, queue: MessageQueue, buried: Job
) -> None:
    (letter,) = client.dead.list()
    job = client.dead.requeue(letter)
    assert job.id != buried.id
    assert (job.retry_of, job.prompt, job.tenant, job.metadata) == (buried.id, SECRET, "acme", {"k": "v"})
    assert job.expires_at > buried.expires_at
    assert client.get(job.id).status().state is JobState.QUEUED
    assert client.get(buried.id).status().state is JobState.FAILED
    assert queue.depth(QUEUE) == 1
    assert [*client.dead.list()] == []
    assert client.submit(SECRET, tenant="acme", metadata={"k": "v"}, idempotency_key="once").id == buried.id


def test_sixteen_people_who_requeue_one_letter_make_one_job(
    client: Client, queue: MessageQueue, buried: Job
) -> None:
    (letter,) = client.dead.list()
    with ThreadPoolExecutor(16) as people:
        jobs = {job.id for job in people.map(lambda _: client.dead.requeue(letter), range(16))}
    assert len(jobs) == 1
    assert [*client.dead.list()] == []


def test_dying_between_sending_and_forgetting_makes_one_job(
    client: Client, buried: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    (letter,) = client.dead.list()
    with monkeypatch.context() as patch:

        def down(*_: object) -> int:
            raise BrokerUnavailable("gone")

        patch.setattr(DeadLetters, "remove", down)
        with pytest.raises(BrokerUnavailable):
            client.dead.requeue(letter)
    (again,) = client.dead.list()
    job = client.dead.requeue(again)
    assert job.retry_of == buried.id
    assert client.get(job.id).status().state is JobState.QUEUED


def test_a_letter_stays_until_its_job_has_ended(
    client: Client, queue: MessageQueue, state: State, settings: Settings
) -> None:
    """Its submitter would have waited for two weeks for an end that nobody owed any more."""
    bury(client, queue, state, settings, ended=False)
    (letter,) = client.dead.list()
    for act in (lambda: client.dead.requeue(letter), lambda: client.dead.purge([letter])):
        with pytest.raises(WaitTimeout, match="gristmill-keeper --once"):
            act()
    assert [*client.dead.list()] == [letter]


def test_what_holds_no_job_can_be_seen_and_thrown_away(client: Client, queue: MessageQueue) -> None:
    queue.put(QUEUE, "default", "x", "not a message")
    message = queue.claim([QUEUE])
    assert isinstance(message, ClaimedMessage)
    queue.bury(message.tag, "not a message")
    found = client.dead.show(message.tag)
    assert (found.job, found.result, found.letter.payload) == (None, None, "not a message")
    with pytest.raises(BadInput):
        client.dead.requeue(found.letter)
    assert client.dead.purge([found.letter]) == 1
    with pytest.raises(JobNotFound):
        client.dead.show(message.tag)


async def test_the_async_client_handles_them_too(settings: Settings, buried: Job) -> None:
    async with AsyncClient(settings) as client:
        (letter,) = await client.dead.list(model="tiny")
        assert (await client.dead.show(buried.id)).letter == letter
        assert (await client.dead.find(letter.id)) == letter
        job = await client.dead.requeue(letter)
        assert job.retry_of == buried.id
        assert await client.dead.purge([letter]) == 0


def test_the_commands_list_show_requeue_and_purge(
    run: Run, client: Client, queue: MessageQueue, buried: Job
) -> None:
    code, out, _ = run("list")
    assert code == 0
    assert out.startswith(buried.id)
    assert "max_attempts: the engine died of it" in out
    code, out, _ = run("show", buried.id)
    assert "attempts:    3" in out
    assert "the engine died of it [max_attempts]" in out
    code, out, err = run("requeue", buried.id)
    assert client.get(out.strip()).status().state is JobState.QUEUED
    code, out, err = run("purge", "--all")
    assert (code, out, err) == (0, "", "0 thrown away\n")
    assert run("list") == (0, "", "no dead letters\n")
    assert run("list", "--model", "tiny") == (0, "", "no dead letters in these queues\n")


def test_a_prompt_is_shown_only_to_who_asks_for_it(run: Run, buried: Job) -> None:
    for args in (("list",), ("list", "--json"), ("show", buried.id), ("show", "--json", buried.id)):
        code, out, err = run(*args)
        assert code == 0
        assert SECRET not in out + err
        assert "payload" not in out
    for args in (("show", "--show-prompt", buried.id), ("show", "--show-prompt", "--json", buried.id)):
        assert SECRET in run(*args)[1]


def test_one_unreadable_letter_keeps_no_other_from_being_sent(
    run: Run, client: Client, queue: MessageQueue, state: State, settings: Settings
) -> None:
    buried = bury(client, queue, state, settings)
    queue.put(QUEUE, "default", "x", "not a message")
    message = queue.claim([QUEUE])
    assert isinstance(message, ClaimedMessage)
    queue.bury(message.tag, "not a message")
    code, out, err = run("requeue", "--all", "--json")
    assert code == 2
    assert message.tag in err
    assert json.loads(out)["retry_of"] == buried.id
    assert [letter.id for letter in client.dead.list()] == [message.tag]
    assert run("purge", "--all", "--json")[:2] == (0, '{"purged":1}\n')


def test_nothing_is_chosen_by_accident(run: Run, buried: Job) -> None:
    for args in (("requeue",), ("purge",), ("purge", "--all", buried.id)):
        code, _, err = run(*args)
        assert code == 2
        assert "--all" in err
    assert run("list", "--queue", "another")[1] == ""
    assert run("list", "--model", "another")[1] == ""
    assert run("show", "job_nobody")[0] == 2
