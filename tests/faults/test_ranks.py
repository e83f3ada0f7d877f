"""A rank of a worker's engine that dies takes the others along; the worker starts anew, and jobs go on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from gristmill.schemas.job import JobState
from gristmill.schemas.result import Result

from ..support.stack import Stack, Worker
from ..support.waiting import wait_until
from .test_worker import tokens_so_far

TOKENS = 256


def rank_pids(worker: Worker) -> list[int]:
    """Of the worker's ranks but the first: its children that run ``gristmill.engine.parallel``."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes()
        except OSError:  # it ended meanwhile
            continue
        if parent == worker.process.pid and b"gristmill.engine.parallel" in command:
            found.append(int(entry.name))
    return found


def submit(stack: Stack) -> list[str]:
    return [
        stack.client.submit(
            prompt_ids=[7 * n + 1, n], max_tokens=TOKENS, temperature=0.8 * n, seed=n, ignore_eos=True
        ).id
        for n in range(3)
    ]


def finished(stack: Stack, ids: list[str]) -> list[Result]:
    wait_until(lambda: all(stack.result(i) for i in ids), 90, "every job ends")
    return [result for i in ids if (result := stack.result(i))]


def test_killing_rank_1_in_mid_run_loses_nothing(tiny_stack: Stack) -> None:
    worker = tiny_stack.worker("--num-shard", "2", "--attention", "torch")
    expected = finished(tiny_stack, submit(tiny_stack))
    (rank,) = rank_pids(worker)
    ids = submit(tiny_stack)
    wait_until(lambda: all(tokens_so_far(tiny_stack, i) for i in ids), 60, "every job has some tokens")
    os.kill(rank, signal.SIGKILL)
    wait_until(lambda: worker.said("engine.restarted"), 90, "the worker starts its ranks anew")
    for result, undisturbed in zip(finished(tiny_stack, ids), expected, strict=True):
        assert (result.state, result.text) == (JobState.SUCCEEDED, undisturbed.text)
        assert result.usage.completion_tokens == TOKENS
    assert worker.said("lost rank 1")
    assert rank_pids(worker) != [rank]
