"""A result store that fails in every way an S3 can: nothing is lost, doubled, or acknowledged early."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from gristmill.backends import s3 as s3_clients
from gristmill.backends import store as stores
from gristmill.backends.message_queue import MessageQueue
from gristmill.backends.sink import ResultSink
from gristmill.backends.state import State
from gristmill.schemas import keys
from gristmill.schemas.job import JobState, Priority
from gristmill.schemas.queues import queue_name
from gristmill.schemas.result import Choice, FinishReason, Result
from gristmill.worker.committer import Committer
from gristmill.worker.metrics import Metrics

from ..support.journal import Attempt, make_job
from ..support.s3 import Proxy, S3Server
from ..support.stack import Stack
from ..support.waiting import wait_until

TEXT = "word " * 30_000


@pytest.mark.parametrize(
    "fault",
    [(500, "InternalError"), (503, "SlowDown"), (403, "AccessDenied"), "stall", "half", "drop", "lose reply"],
    ids=str,
)
def test_a_result_outlasts_a_store_that_fails(
    state: State,
    s3: S3Server,
    s3_proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str | tuple[int, str],
) -> None:
    """Down until somebody mends it, then the first try is answered: once stored, and known to be ours."""
    monkeypatch.setattr(s3_clients, "READ_TIMEOUT_S", 0.3)
    settings = s3.settings(s3_proxy.endpoint)
    store = stores.open_store(settings.results, settings)
    committer = Committer(
        ResultSink(state, store, inline_bytes=100),
        Metrics("m"),
        home=tmp_path,
        worker_id="w1",
        max_results=10,
        max_bytes=10**7,
        pause_max_s=0.1,
    )
    attempt = Attempt.begin(state, make_job())
    choices = (Choice(text=TEXT, finish_reason=FinishReason.STOP),)
    ours = attempt.result().model_copy(update={"choices": choices})
    done: list[tuple[Result, bool] | None] = []
    thread = threading.Thread(target=lambda: done.append(committer.commit(committer.take(ours))))
    s3_proxy.down = fault
    thread.start()
    if fault != "lose reply":  # that one is there at the second try, and found
        wait_until(lambda: committer.failure, 30, "the failure is noticed")
        status = state.status(ours.job_id)
        assert status is not None
        assert status.state is JobState.RUNNING
    else:
        wait_until(lambda: s3_proxy.requests >= 2, 30, "it tries again")
    s3_proxy.down = None
    thread.join(30)
    assert done == [(ours, True)]
    monkeypatch.undo()  # 0.3 s are for a reply that never comes
    stored = stores.open_store(settings.results, s3.settings()).get(keys.result_object(ours.job_id))
    assert stored == ours.to_json().encode()
    status = state.status(ours.job_id)
    assert status is not None
    assert status.state is JobState.SUCCEEDED
    committer.spool.close()


def test_a_worker_goes_on_without_its_store_until_the_bound_and_stores_all_when_it_is_back(
    stack: Stack, s3: S3Server, s3_proxy: Proxy
) -> None:
    environment = {
        "GRISTMILL_S3_ENDPOINT_URL": s3_proxy.endpoint,
        "GRISTMILL_S3_REGION": "us-east-1",
        "GRISTMILL_S3_ACCESS_KEY": "test",
        "GRISTMILL_S3_SECRET_KEY": "test",
        "GRISTMILL_SPOOL_MAX_RESULTS": "6",
        "GRISTMILL_HOME": str(stack.directory / "home"),
    }
    worker = stack.worker("--results", s3.url, "--max-num-seqs", "2", env=environment)
    store = stores.open_store(s3.url, s3.settings())
    queue = MessageQueue(stack.valkey.client(), lease_s=3)

    def submit() -> list[str]:
        return [
            stack.client.submit(f"{n} mills", max_tokens=6, temperature=0.0, ignore_eos=True).id
            for n in range(12)
        ]

    def text(job_id: str) -> str | None:
        body = store.get(keys.result_object(job_id))
        return None if body is None else Result.from_json(body).text

    first = submit()
    wait_until(lambda: all(text(i) for i in first), 60, "the undisturbed run ends")
    expected = [text(i) for i in first]
    s3_proxy.down = (503, "SlowDown")
    second = submit()
    wait_until(lambda: worker.said("spool.full"), 60, "intake stops at the bound")
    waiting = queue.depth(queue_name("m", Priority.NORMAL))
    assert waiting >= 12 - 6 - 3, "six wait to be stored, and at most what ran beside them"
    wait_until(
        lambda: queue.claimed() + queue.depth(queue_name("m", Priority.NORMAL)) == 12, 10, "none acked"
    )
    assert not any(text(i) for i in second)
    s3_proxy.down = None
    wait_until(lambda: all(text(i) for i in second), 60, "all are stored")
    assert [text(i) for i in second] == expected
    wait_until(
        lambda: not queue.claimed() and not queue.depth(queue_name("m", Priority.NORMAL)), 20, "all acked"
    )
    log = worker.log.read_text()
    assert [log.count(f"job.finished job_id={i}") for i in second] == [1] * 12
    assert [log.count(f"job.claimed job_id={i}") for i in second] == [1] * 12
