"""Client and AsyncClient against a real Valkey; what a worker would write is written by State and Store."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from gristmill.backends.state import State, WorkerInfo
from gristmill.backends.store import open_store
from gristmill.producer import AsyncClient, AsyncJobHandle, Client, JobHandle
from gristmill.producer.stream import follow, follow_async
from gristmill.schemas import keys
from gristmill.schemas.errors import (
    BrokerUnavailable,
    IdempotencyConflict,
    InvalidRequest,
    JobFailed,
    JobNotFound,
    ModelNotFound,
    PayloadTooLarge,
    WaitTimeout,
)
from gristmill.schemas.events import End
from gristmill.schemas.job import JobState
from gristmill.schemas.result import ErrorInfo, FinishReason
from gristmill.schemas.settings import Settings

from ..support.journal import Attempt
from ..support.valkey import Valkey


@pytest.fixture
def settings(valkey: Valkey, tmp_path: Path) -> Settings:
    (tmp_path / "results").mkdir()
    return Settings(
        broker_url=valkey.url,
        results_url=f"file://{tmp_path}/results",
        connect_timeout_s=1.0,
        command_timeout_s=1.0,
    )


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as opened:
        yield opened


@pytest.fixture
def worker(state: State) -> Iterator[str]:
    """A model that is served, as far as the registry knows."""
    state.register("w1", WorkerInfo(models=("tiny",), host="here", pid=1, version="0"), 600)
    yield "tiny"
    state.unregister("w1")


def answer(state: State, job: JobHandle | AsyncJobHandle, *texts: str, store: Settings | None = None) -> str:
    """Run the job as a worker would; its text."""
    assert job.job is not None
    attempt = Attempt.begin(state, job.job)
    attempt.write(*texts)
    attempt.done()
    if store is not None:
        body = attempt.result().to_json().encode()
        open_store(store.results, store).put_new(keys.result_object(job.id), body)
    attempt.finish(inline=store is None)
    return attempt.text


def test_a_submitted_job_is_known_and_waits_in_the_queue(client: Client, state: State, worker: str) -> None:
    job = client.submit("hello", max_tokens=4)
    assert job.warnings == ()
    status = job.status()
    assert (status.state, status.model) == (JobState.QUEUED, worker)
    assert client.get(job.id).status() == status


def test_the_result_comes_from_redis_or_from_the_store(
    client: Client, state: State, settings: Settings, worker: str
) -> None:
    small, large = client.submit("one"), client.submit("two")
    assert answer(state, small, "a", "b") == "ab"
    answer(state, large, "c", "d", store=settings)
    assert state.result(large.id) is None
    assert (small.result(5).text, large.result(5).text) == ("ab", "cd")
    assert small.result().finish_reason is FinishReason.STOP


def test_who_waits_for_a_result_is_told_that_the_store_is_away(
    client: Client,
    state: State,
    worker: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The text was complete, and whoever waited for the result saw nothing happen for minutes."""
    monkeypatch.setattr("gristmill.producer.core.SAY_AFTER_S", 0.1)
    trouble = "3 finished jobs wait to be stored: no such bucket"
    info = WorkerInfo(models=(worker,), host="here", pid=7, version="0", trouble=trouble)
    state.register("w1", info, 600)
    job = client.submit("hello", model=worker)
    assert job.job is not None
    Attempt.begin(state, job.job)
    with pytest.raises(WaitTimeout):
        job.result(1.0)
    assert caplog.records
    caplog.clear()
    monkeypatch.setattr("gristmill.producer.stream.follow", partial(follow, idle_s=0.1))
    with pytest.raises(WaitTimeout):
        list(job.stream(timeout_s=1.0))
    assert [record.message for record in caplog.records] == [
        f"still waiting: worker 7 on here says: {trouble}"
    ]


async def test_who_awaits_a_result_is_told_so_as_well(
    settings: Settings,
    state: State,
    worker: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gristmill.producer.core.SAY_AFTER_S", 0.1)
    monkeypatch.setattr("gristmill.producer.stream.follow_async", partial(follow_async, idle_s=0.1))
    info = WorkerInfo(models=(worker,), host="here", pid=7, version="0", trouble="no such bucket")
    state.register("w1", info, 600)
    async with AsyncClient(settings) as client:
        job = await client.submit("hello", model=worker)
        assert job.job is not None
        Attempt.begin(state, job.job)
        with pytest.raises(WaitTimeout):
            await job.result(1.0)
        said = ["still waiting: worker 7 on here says: no such bucket"]
        assert [record.message for record in caplog.records] == said
        with pytest.raises(WaitTimeout):
            [chunk async for chunk in job.stream(timeout_s=1.0)]
        assert [record.message for record in caplog.records] == 2 * said
        assert list(await client.workers()) == ["w1"]


def test_a_result_outlives_the_state(
    client: Client, state: State, settings: Settings, worker: str, valkey: Valkey
) -> None:
    job = client.submit("one")
    answer(state, job, "kept", store=settings)
    valkey.client().delete(keys.state(job.id), keys.log(job.id))
    assert client.get(job.id).result(5).text == "kept"
    assert client.get(job.id).status().state is JobState.SUCCEEDED
    assert "".join(chunk.text for chunk in client.get(job.id).stream()) == "kept"


def test_waiting_ends_when_the_job_does(client: Client, state: State, worker: str) -> None:
    job = client.submit("hello")
    later = threading.Timer(0.2, answer, (state, job, "done"))
    later.start()
    assert job.result(10).text == "done"
    later.join()


def test_patience_has_an_end_and_the_job_goes_on(client: Client, state: State, worker: str) -> None:
    job = client.submit("hello")
    with pytest.raises(WaitTimeout, match=job.id):
        job.result(0.05)
    answer(state, job, "after all")
    assert job.result(5).text == "after all"


def test_a_stream_shows_the_text_early_and_late(client: Client, state: State, worker: str) -> None:
    job = client.submit("hello", stream=True)
    later = threading.Timer(0.1, answer, (state, job, "a", "b", "c"))
    later.start()
    chunks = list(job.stream(timeout_s=10))
    later.join()
    assert "".join(chunk.text for chunk in chunks) == "abc"
    assert "".join(chunk.text for chunk in client.get(job.id).stream()) == "abc"
    rest = client.get(job.id).stream(str(chunks[0].id))
    assert "".join(chunk.text for chunk in rest) == "bc"


def test_a_stream_in_openais_form_ends_with_the_usage_or_raises(
    client: Client, state: State, worker: str
) -> None:
    job = client.submit(messages=[{"role": "user", "content": "hello"}], stream=True)
    answer(state, job, "a", "b")
    *bodies, usage = job.stream_openai(include_usage=True, timeout_s=10)
    deltas = [body["choices"][0]["delta"] for body in bodies]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": "b"}, {}]
    assert bodies[-1]["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2)
    with pytest.raises(InvalidRequest, match=r"use stream\(\)"):
        next(client.get(job.id).stream_openai())
    stopped = client.submit("hello")
    assert stopped.job is not None
    attempt = Attempt.begin(state, stopped.job)
    attempt.done(reason=FinishReason.CANCELLED)
    attempt.finish(reason=FinishReason.CANCELLED)
    with pytest.raises(JobFailed, match="cancelled"):
        list(stopped.stream_openai(timeout_s=10))


def test_a_failed_job_raises_its_own_error_or_hands_out_its_result(
    client: Client, state: State, worker: str
) -> None:
    job = client.submit("hello")
    assert job.job is not None
    attempt = Attempt.begin(state, job.job)
    error = ErrorInfo(code="context_length_exceeded", message="too long")
    failed = attempt.result().model_copy(update={"state": JobState.FAILED, "error": error, "choices": ()})
    state.finish(job.id, End(state=JobState.FAILED, error=error), failed.to_json())
    with pytest.raises(JobFailed) as caught:
        job.result(5)
    assert caught.value.job_error_code == "context_length_exceeded"
    assert job.result(5, check=False).error == error
    with pytest.raises(JobFailed):
        list(job.stream(timeout_s=5))


def test_cancel_raises_the_flag_the_worker_looks_for(client: Client, state: State, worker: str) -> None:
    job = client.submit("hello")
    assert job.cancel() is JobState.QUEUED
    assert state.cancelled([job.id]) == {job.id}


def test_an_idempotency_key_makes_one_job(client: Client, worker: str) -> None:
    first = client.submit("hello", idempotency_key="k")
    assert client.submit("hello", idempotency_key="k").id == first.id
    with pytest.raises(IdempotencyConflict, match="'k'"):
        client.submit("something else", idempotency_key="k")


def test_an_unknown_job_is_not_waited_for(client: Client) -> None:
    for ask in (lambda j: j.status(), lambda j: j.result(), lambda j: list(j.stream()), lambda j: j.cancel()):
        with pytest.raises(JobNotFound):
            ask(client.get("job_unknown"))
    with pytest.raises(InvalidRequest):
        client.get("../secret")


def test_an_unknown_model_names_the_known_ones(client: Client, worker: str) -> None:
    with pytest.raises(ModelNotFound, match="known models: tiny"):
        client.submit("hello", model="huge")


def test_without_any_worker_the_next_step_is_said(client: Client) -> None:
    with pytest.raises(ModelNotFound, match="gristmill-worker run --model"):
        client.submit("hello")


def test_a_known_model_with_nobody_alive_is_a_warning(client: Client, state: State) -> None:
    state.register("w1", WorkerInfo(models=("tiny",), host="here", pid=1, version="0"), 600)
    state.unregister("w1")
    job = client.submit("hello")
    assert "no worker for tiny is running" in job.warnings[0]
    assert job.status().state is JobState.QUEUED


def test_bad_input_is_refused_without_a_broker(tmp_path: Path) -> None:
    client = Client("redis://127.0.0.1:1/0")
    with pytest.raises(PayloadTooLarge, match="10,"):
        client.submit("x" * 10_000_000)
    with pytest.raises(InvalidRequest, match="max_tokens"):
        client.submit("hello", max_tokens=0)
    with pytest.raises(InvalidRequest, match="max_token"):
        client.submit("hello", max_token=5)


def test_a_broker_that_is_down_is_said_so_within_seconds(settings: Settings, valkey: Valkey) -> None:
    valkey.kill()
    for broker in (settings, "redis://127.0.0.1:1/0"):
        started = time.monotonic()
        with pytest.raises(BrokerUnavailable):
            Client(broker).submit("hello")
        assert time.monotonic() - started < 5


def test_importing_the_client_loads_no_broker_library() -> None:
    code = "import sys; from gristmill.producer import Client, AsyncClient; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert not set(loaded.split()) & {"redis", "celery", "kombu", "boto3", "rich", "click", "torch"}


async def test_the_async_client_says_the_same(settings: Settings, state: State, worker: str) -> None:
    async with AsyncClient(settings) as client:
        job = await client.submit("hello", stream=True)
        answer(state, job, "a", "b")
        assert [chunk.text async for chunk in job.stream(timeout_s=5) if chunk.text] == ["a", "b"]
        bodies = [body async for body in job.stream_openai(include_usage=True, timeout_s=5)]
        assert [each["text"] for body in bodies for each in body["choices"]] == ["a", "b", ""]
        assert bodies[-1]["usage"]["completion_tokens"] == 2
        assert (await job.result(5)).text == "ab"
        assert (await client.get(job.id).status()).state is JobState.SUCCEEDED
        assert "tiny" in await client.models()
        with pytest.raises(JobNotFound):
            await client.get("job_unknown").result()
        with pytest.raises(ModelNotFound):
            await client.submit("hello", model="huge")
        waiting = await client.submit("hello")
        with pytest.raises(WaitTimeout):
            await waiting.result(0.05)
        assert await waiting.cancel() is JobState.QUEUED
