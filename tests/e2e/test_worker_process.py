"""`gristmill-worker run` as a process: what it tells probes and Prometheus, and how it leaves."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from typing import Any
from urllib.error import HTTPError

from gristmill.schemas.job import Priority
from gristmill.schemas.queues import queue_name

from ..support.stack import Stack, Worker
from ..support.waiting import wait_until


def get(worker: Worker, path: str) -> tuple[int, str]:
    """Status and body, from the port the worker's log names."""
    found = re.search(r"health=127\.0\.0\.1:(\d+)", worker.log.read_text())
    assert found, "the log names the health port"
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as answer:
        with answer:
            return answer.code, answer.read().decode()


def workers(stack: Stack) -> list[dict[str, Any]]:
    """As `gristmill workers --json` has them."""
    command = [sys.executable, "-P", "-m", "gristmill.producer.cli", "workers", "--json"]
    told = subprocess.run(
        [*command, "--broker", stack.valkey.url], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in told.stdout.splitlines()]


def metric(worker: Worker, name: str, **labels: str) -> float:
    """One sample of /metrics; 0 where there is none."""
    wanted = {f'{key}="{value}"' for key, value in {"model_name": "m", **labels}.items()}
    for line in get(worker, "/metrics")[1].splitlines():
        found = re.fullmatch(r"(\w+)\{(.*)\} (\S+)", line)
        if found and found[1] == f"gristmill_{name}" and wanted <= set(found[2].split(",")):
            return float(found[3])
    return 0.0


def test_a_worker_tells_probes_how_it_is_and_prometheus_what_it_did(stack: Stack) -> None:
    worker = stack.worker("--max-num-seqs", "1", env={"GRISTMILL_HEARTBEAT_EVERY_S": "0.5"})
    assert get(worker, "/health/live")[0] == get(worker, "/health/ready")[0] == 200

    job = stack.client.submit("Once upon a time", max_tokens=8, ignore_eos=True)
    usage = job.result(60).usage
    wait_until(lambda: metric(worker, "generation_tokens_total"), 10, "the finished job is counted")
    assert metric(worker, "generation_tokens_total") == usage.completion_tokens == 8
    assert metric(worker, "prompt_tokens_total") == usage.prompt_tokens
    assert metric(worker, "requests_finished_total", state="succeeded") == 1
    assert metric(worker, "time_to_first_token_seconds_count") == 1
    assert metric(worker, "cold_start_seconds", phase="total") > 0

    jobs = [stack.client.submit("A long one", max_tokens=2000, ignore_eos=True) for _ in range(12)]
    queue = queue_name("m", Priority.NORMAL)
    wait_until(
        lambda: metric(worker, "queue_depth", queue=queue, state="ready"), 20, "the queue's depth is told"
    )
    (told,) = wait_until(lambda: [each for each in workers(stack) if each["running"]], 20, "it tells of them")
    assert (told["models"], told["state"], told["running"]) == (["m"], "ready", 1)
    assert told["worker"].split("-")[-2] == str(told["pid"]) == str(worker.process.pid)
    assert told["in_hand"] > 1
    assert told["age_s"] < 30

    worker.process.send_signal(signal.SIGHUP)  # with work in hand it drains, and says so
    wait_until(lambda: worker.said("worker.draining"), 10, "the drain")
    wait_until(lambda: [each["state"] for each in workers(stack)] == ["draining"], 10, "the next heartbeat")
    worker.process.send_signal(signal.SIGHUP)  # a terminal that closes sends two: the second adds no hurry
    status, body = get(worker, "/health/ready")
    assert (status, json.loads(body)["reason"]) == (503, "draining")
    for job in jobs:
        job.cancel()
    assert worker.process.wait(40) == 0
    assert not workers(stack)


def test_in_a_burst_a_worker_empties_the_queue_and_leaves(stack: Stack) -> None:
    stack.worker().terminate()  # a model that was announced once is known: submitting is not refused
    jobs = [stack.client.submit(f"Number {n} is", max_tokens=4, ignore_eos=True) for n in range(6)]
    worker = stack.worker("--burst")
    assert worker.process.wait(90) == 0
    assert [job.result(5).usage.completion_tokens for job in jobs] == [4] * 6
