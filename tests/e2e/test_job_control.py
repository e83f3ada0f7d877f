"""Classes, tenants, deadlines and cancellations with a real worker and the real model: one worker for all."""

from __future__ import annotations

from gristmill.producer import JobHandle
from gristmill.schemas.job import JobState

from ..support.stack import Stack, Worker
from ..support.waiting import wait_until

LONG = {"max_tokens": 1900, "ignore_eos": True}
SHORT = {"max_tokens": 4, "ignore_eos": True}


def generating(*jobs: JobHandle) -> bool:
    return all(job.status().tokens > 0 for job in jobs)


def test_a_worker_serves_classes_tenants_and_deadlines_as_promised(stack: Stack) -> None:
    worker = stack.worker("--max-num-seqs", "2", "--max-total-tokens", "2048")
    batch = [stack.client.submit(f"Count from {n}:", priority="batch", **LONG) for n in range(2)]
    wait_until(lambda: generating(*batch), 60, "batch work fills the engine")

    urgent_work_is_not_kept_waiting(stack, worker, batch)
    a_deadline_stops_a_running_job(stack)
    cancelled_jobs_keep_their_text_and_free_their_memory(worker, batch)
    tenants_take_turns(stack)


def urgent_work_is_not_kept_waiting(stack: Stack, worker: Worker, batch: list[JobHandle]) -> None:
    result = stack.client.submit("Hello", priority="interactive", **SHORT).result(60)
    assert result.usage.completion_tokens == 4
    assert worker.metric("num_preemptions_total") >= 1, "it took a batch job's place"
    assert [job.status().state for job in batch] == [JobState.RUNNING] * 2


def a_deadline_stops_a_running_job(stack: Stack) -> None:
    job = stack.client.submit("Once upon a time", priority="interactive", deadline_s=3, **LONG)
    result = job.result(60, check=False)
    assert result.state is JobState.EXPIRED
    assert result.text
    assert 0 < result.usage.completion_tokens < LONG["max_tokens"]


def cancelled_jobs_keep_their_text_and_free_their_memory(worker: Worker, batch: list[JobHandle]) -> None:
    assert worker.metric("kv_cache_usage_ratio") > 0
    for job in batch:
        job.cancel()
    results = [job.result(30, check=False) for job in batch]
    assert [result.state for result in results] == [JobState.CANCELLED] * 2
    assert all(result.text for result in results)
    wait_until(lambda: worker.metric("kv_cache_usage_ratio") == 0, 20, "their blocks are free")


def tenants_take_turns(stack: Stack) -> None:
    """Whoever came with much work first does not keep the others waiting for all of it."""
    busy = [stack.client.submit("x", priority="interactive", **LONG) for _ in range(3)]
    wait_until(
        lambda: sum(job.status().state is JobState.RUNNING for job in busy) == 3, 30, "no room is left"
    )
    many = [stack.client.submit(f"many {n}", tenant="many", **SHORT) for n in range(8)]
    few = [stack.client.submit(f"few {n}", tenant="few", **SHORT) for n in range(2)]
    for job in busy:
        job.cancel()
    started = {job.id: job.result(60).timings.started_at for job in many + few}
    order = sorted(started, key=lambda job_id: started[job_id] or 0.0)
    assert {job.id for job in few} <= set(order[:4])
