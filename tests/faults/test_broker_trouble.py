"""Running jobs while the broker misbehaves: what is not fencing aborts nobody, and changes no text."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from gristmill.backends.state import State, Write, open_state
from gristmill.engine.models.tiny import write_tiny
from gristmill.producer import Client
from gristmill.schemas import keys
from gristmill.schemas.errors import BrokerUnavailable
from gristmill.schemas.events import Delta
from gristmill.schemas.job import JobState
from gristmill.schemas.settings import Settings

from ..support.journal import Attempt, make_job
from ..support.relay import Relay
from ..support.stack import Stack
from ..support.valkey import Valkey
from ..support.waiting import wait_until
from .test_worker import submit_all, tokens_so_far, undisturbed


def texts(stack: Stack, ids: list[str]) -> dict[int, str]:
    """By number. Every one has succeeded."""
    wait_until(lambda: all(stack.result(i) for i in ids), 120, "every job ends")
    results = [result for i in ids if (result := stack.result(i))]
    assert {result.state for result in results} == {JobState.SUCCEEDED}
    return {n: result.text for n, result in enumerate(results)}


def test_running_jobs_outlast_cut_connections_a_full_memory_and_a_long_freeze(stack: Stack) -> None:
    worker = stack.worker()
    expected = undisturbed(stack)
    ids = submit_all(stack)
    for tokens in (1, 4, 8):
        wait_until(lambda t=tokens: all(tokens_so_far(stack, i) >= t for i in ids), 60, "tokens stream")
        stack.valkey.drop_clients()

    admin = stack.valkey.client()
    admin.config_set("maxmemory", 1)
    wait_until(lambda: worker.said("journal.unavailable"), 30, "nothing more can be written")
    with pytest.raises(BrokerUnavailable, match="may we write to it"):
        stack.client.submit("No room for", max_tokens=4)
    admin.config_set("maxmemory", 0)

    stack.valkey.freeze()
    try:
        seen = worker.log.read_text().count("lease.not_renewed")
        wait_until(lambda: worker.log.read_text().count("lease.not_renewed") >= seen + 5, 60, "leases pass")
    finally:
        stack.valkey.thaw()
    assert texts(stack, ids) == expected
    for job_id in ids:
        status = stack.state.status(job_id)
        assert status is not None
        assert status.attempts == 1, "nobody ran it a second time"
    assert not worker.said("job.fenced")


def test_after_a_failover_running_jobs_end_with_the_same_text(
    stack: Stack, relay: Relay, valkey: Valkey, valkey_replica: Valkey
) -> None:
    worker = stack.worker("--broker", relay.url)
    expected = undisturbed(stack)
    ids = submit_all(stack)
    wait_until(lambda: all(tokens_so_far(stack, i) >= 8 for i in ids), 60, "every job has some tokens")
    relay.switch(valkey_replica.socket)  # its address moves before it is told that it is the primary now
    wait_until(lambda: worker.said("journal.unavailable"), 30, "a replica takes no writes")
    valkey.kill()
    valkey_replica.promote()
    assert texts(stack, ids) == expected
    assert not worker.said("job.fenced")
    wait_until(lambda: not valkey_replica.client().hlen(keys.CLAIMS), 30, "all are acknowledged")


def test_a_broker_that_still_loads_its_data_costs_no_attempt_and_no_text(
    valkey: Valkey, tmp_path: Path
) -> None:
    """A restarted Redis with gigabytes to read says LOADING for minutes, to everything."""
    model = write_tiny(tmp_path / "model", tokenizer=True, max_position_embeddings=4096)
    with closing(Stack(valkey, tmp_path, model)) as stack:
        worker = stack.worker("--num-threads", "1")
        request = {
            "prompt": "A long one",
            "max_tokens": 4000,
            "temperature": 0.9,
            "seed": 7,
            "ignore_eos": True,
        }
        expected = stack.client.submit(**request).result(90).text
        with ThreadPoolExecutor() as threads:
            job = stack.client.submit(**request, stream=True)
            following = threads.submit(lambda: list(job.stream(timeout_s=150)))
            wait_until(lambda: tokens_so_far(stack, job.id), 60, "it has some tokens")
            with valkey.loading():
                wait_until(lambda: worker.said("journal.unavailable"), 30, "its tokens cannot be written")
                with pytest.raises(BrokerUnavailable, match="loading"):
                    stack.client.submit("Not now", max_tokens=4)
                with pytest.raises(BrokerUnavailable, match="loading"):
                    job.status()
                wait_until(lambda: worker.said("lease.not_renewed"), 30, "nor its lease be renewed")
            followed = "".join(chunk.text for chunk in following.result())
        assert followed == expected == job.result(30).text
        assert job.status().attempts == 1, "nobody ran it a second time"
        assert stack.client.submit("And now", max_tokens=4).result(60).state is JobState.SUCCEEDED
        wait_until(lambda: not valkey.client().hlen(keys.CLAIMS), 30, "both are acknowledged")


@pytest.fixture
def replica_state(valkey: Valkey, valkey_replica: Valkey) -> Iterator[State]:
    settings = Settings(broker_url=valkey_replica.url, command_timeout_s=2)
    with open_state(settings) as opened:
        yield opened


def test_a_replica_is_an_unavailable_broker_and_no_mistake_of_anybodys(
    state: State, valkey_replica: Valkey, replica_state: State
) -> None:
    """READONLY, and MASTERDOWN where it serves nothing without its primary."""
    attempt = Attempt.begin(state, make_job())
    delta = Delta(offset=0, ids=(1,), text="x").to_json()

    def try_everything() -> None:
        for call in (
            lambda: replica_state.publish([Write(attempt.job.id, attempt.id, 1, delta)]),
            lambda: replica_state.claim(attempt.job.id, "w2", attempt.job.expires_at),
            lambda: replica_state.release(attempt.job.id, attempt.id),
            attempt_submit,
        ):
            with pytest.raises(BrokerUnavailable, match="may we write to it"):
                call()

    def attempt_submit() -> None:
        replica_state.submit(make_job())

    try_everything()
    admin = valkey_replica.client()
    admin.config_set("replica-serve-stale-data", "no")
    admin.replicaof("127.0.0.1", "1")  # nobody there
    try_everything()


def test_a_connection_that_is_silent_for_ever_is_given_up_in_time(relay: Relay, state: State) -> None:
    """A peer that vanished without a word: half open, until the timeout says so."""
    job = make_job()
    state.submit(job)
    with Client(Settings(broker_url=relay.url, command_timeout_s=0.5, connect_timeout_s=0.5)) as client:
        handle = client.get(job.id)
        assert handle.status().state is JobState.QUEUED
        relay.silence()
        with pytest.raises(BrokerUnavailable):
            handle.status()
        relay.cut()
        relay.resume()
        assert handle.status().state is JobState.QUEUED
