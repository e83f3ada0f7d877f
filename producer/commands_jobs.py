"""`gristmill submit | follow | status | result | cancel`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import JobFailed, WaitTimeout
from ..schemas.job import JobState, Priority
from ..schemas.result import Result
from ..schemas.status import JobStatus
from . import core
from .client import Client, JobHandle
from .console import (
    INTERRUPTED,
    common,
    connection,
    put,
    put_json,
    put_piece,
    read_stdin,
    say,
    warn,
)
from .sampling_flags import GROUPS, GroupedCommand, sampling_flags, wishes

if TYPE_CHECKING:
    from .replica import Chunk

SUBMIT_HELP = """Send one job and print its id; --stream shows the text as it is made, --wait when it is done.

\b
Examples:
  gristmill submit "Once upon a time" --max-tokens 64 --stream
  gristmill submit "Why is the sky blue?" --chat --wait --json
  gristmill submit "Ada Lovelace, born 1815" --json-schema person.json --wait
  gristmill submit "Is 7 prime?" --chat --choice yes --choice no --temperature 0 --wait
  gristmill submit "Weather in Oslo?" --chat --tools tools.json --tool-choice required --wait --json
  cat long.txt | gristmill submit - --chat --system "Summarise in one sentence." --wait
"""


@click.command(help=SUBMIT_HELP, cls=GroupedCommand)
@click.argument("prompt", metavar="PROMPT|-")
@click.option("--chat", is_flag=True, help="The prompt is a user's message: apply the chat template.")
@click.option("--system", help="A system message before it; implies --chat.")
@click.option("--model", help="Default: GRISTMILL_MODEL, or the only model served.")
@click.option("--adapter", "adapter_id", metavar="NAME", help="Through this LoRA adapter of the worker's.")
@click.option(
    "--priority",
    type=click.Choice([p.value for p in Priority]),
    help="Default: interactive with --stream, else normal.",
)
@click.option("--tenant", help="Whose job it is.")
@click.option(
    "--deadline-s", type=click.FloatRange(0, min_open=True), help="End it after so long, with what it has."
)
@click.option("--idempotency-key", metavar="KEY", help="Sent twice with the same key, the job exists once.")
@click.option("--webhook", metavar="URL", help="Send a signed event there when the job has ended.")
@click.option("--stream", is_flag=True, help="Print text as it is made.")
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option(
    "--timeout-s", type=click.FloatRange(0), help="With --wait: how long. The job goes on afterwards."
)
@sampling_flags(*GROUPS)
@connection
@common
def submit(
    prompt: str,
    chat: bool,
    system: str | None,
    model: str | None,
    priority: str | None,
    tenant: str | None,
    deadline_s: float | None,
    idempotency_key: str | None,
    webhook: str | None,
    stream: bool,
    wait: bool,
    timeout_s: float | None,
    as_json: bool,
    **sampling: Any,
) -> int:
    """One job from the command line."""
    urls = {name: sampling.pop(name) for name in ("broker_url", "state_url", "results_url")}
    text = read_stdin() if prompt == "-" else prompt
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    with client_of(urls) as client:
        job = client.submit(
            None if chat or system else text,
            messages=messages if chat or system else None,
            model=model,
            stream=stream,
            priority=priority or (Priority.INTERACTIVE if stream else Priority.NORMAL),
            tenant=tenant,
            deadline_s=deadline_s,
            idempotency_key=idempotency_key,
            webhook=webhook,
            **wishes(sampling),
        )
        for warning in job.warnings:
            warn(warning)
        if stream:
            return _show_stream(job, None, as_json)
        if wait:
            return _show_result(job, as_json, timeout_s)
        if as_json:
            assert job.job is not None
            put_json({"job_id": job.id, "model": job.job.model, "warnings": job.warnings})
        else:
            put(job.id)
    return 0


FOLLOW_HELP = """Show a job's text from the beginning, then as it is made.

\b
Examples:
  gristmill follow job_0190…
  gristmill follow job_0190… --json                    # a piece a line, each with its id
  gristmill follow job_0190… --from 1790000000000-12   # what comes after that piece
"""
STATUS_HELP = """Where a job stands.

\b
Examples:
  gristmill status job_0190…
  gristmill status run_17….12 --json        # line 12 of a bulk run
"""
RESULT_HELP = """Print a job's text, or its whole result as JSON. Of a job that was stopped: what it has.

\b
Examples:
  gristmill result job_0190… --wait --timeout-s 60
  gristmill result job_0190… --json > result.json
"""
CANCEL_HELP = """Stop jobs. What they generated so far stays in their results.

\b
Examples:
  gristmill cancel job_0190…
  gristmill cancel job_0190… job_0191… --json
"""


@click.command(help=FOLLOW_HELP)
@click.argument("job_id", metavar="JOB")
@click.option("--from", "last_id", metavar="ID", help="Continue after this entry id (shown by --json).")
@connection
@common
def follow(job_id: str, last_id: str | None, as_json: bool, **urls: str | None) -> int:
    """Streamed text again, or from the middle."""
    with client_of(urls) as client:
        return _show_stream(client.get(job_id), last_id, as_json)


@click.command(help=STATUS_HELP)
@click.argument("job_id", metavar="JOB")
@connection
@common
def status(job_id: str, as_json: bool, **urls: str | None) -> int:
    """Its state, a line a field."""
    with client_of(urls) as client:
        found = client.get(job_id).status()
        if found.state is JobState.QUEUED and client.queue_is_paused(found):
            warn("its queue is paused: it waits for `gristmill queues resume`")
    if as_json:
        put(found.to_json())
    else:
        for name, value in _status_lines(found):
            put(f"{name + ':':<12} {value}")
    return 0


@click.command(help=RESULT_HELP)
@click.argument("job_id", metavar="JOB")
@click.option("--wait", is_flag=True, help="Wait for the end; otherwise a job that runs is exit code 75.")
@click.option("--timeout-s", type=click.FloatRange(0), help="With --wait: how long.")
@connection
@common
def result(job_id: str, wait: bool, timeout_s: float | None, as_json: bool, **urls: str | None) -> int:
    """What a job ended in."""
    with client_of(urls) as client:
        job = client.get(job_id)
        if not wait:
            state = job.status().state
            if not state.final:
                raise WaitTimeout(f"job {job_id} is {state}; add --wait, or ask again later")
        return _show_result(job, as_json, timeout_s)


@click.command(help=CANCEL_HELP)
@click.argument("job_ids", metavar="JOB…", nargs=-1, required=True)
@connection
@common
def cancel(job_ids: tuple[str, ...], as_json: bool, **urls: str | None) -> int:
    """Ask for their end."""
    with client_of(urls) as client:
        for job_id in job_ids:
            state = client.get(job_id).cancel()
            if as_json:
                put_json({"job_id": job_id, "state": state.value, "cancelling": not state.final})
            else:
                put(f"{job_id}: {f'{state}; was over already' if state.final else 'is being cancelled'}")
    return 0


def client_of(urls: Mapping[str, str | None]) -> Client:
    """A client of the connections that the command line names."""
    return Client(urls["broker_url"], state_url=urls["state_url"], results_url=urls["results_url"])


def _show_stream(job: JobHandle, last_id: str | None, as_json: bool) -> int:
    """Text to stdout piece by piece; how it ended to stderr, or with ``--json`` as the last object."""
    failure: JobFailed | None = None
    pages = _Pages()
    try:
        for chunk in job.stream(last_id):
            if as_json:
                put_json(_chunk(job.id, chunk))
                continue
            pages.show(chunk)
    except JobFailed as exc:
        failure = exc
    except KeyboardInterrupt:
        return _left(job)
    pages.close()
    ended = job.result(check=False)
    if as_json:
        put_json(_ending(ended))
    else:
        put("")
        say(_usage_line(ended))
    if failure is not None:
        raise failure
    return 0


def _show_result(job: JobHandle, as_json: bool, timeout_s: float | None) -> int:
    try:
        ended = job.result(timeout_s, check=False)
    except KeyboardInterrupt:
        return _left(job)
    if as_json:
        put(ended.to_json())
        return 0 if ended.state is JobState.SUCCEEDED else 2
    for choice in ended.choices:
        if not choice.text and ended.state is not JobState.SUCCEEDED:
            continue
        if choice.index:
            say(_heading(choice.index))
        put(choice.text)
    core.raise_unless_succeeded(ended)
    say(_usage_line(ended))
    return 0


class _Pages:
    """Choices one behind the other: the first as it is made, each other once those before it have ended."""

    def __init__(self) -> None:
        self._kept: dict[int, list[Chunk]] = {}
        self._at, self._begun = 0, False

    def show(self, chunk: Chunk) -> None:
        """What of it, and of what was kept back, has its turn now."""
        self._kept.setdefault(chunk.choice, []).append(chunk)
        while chunks := self._kept.pop(self._at, None):
            self._put(chunks)
            if not any(each.finish_reason for each in chunks):
                return
            self._at, self._begun = self._at + 1, False

    def close(self) -> None:
        """No more comes: who follows from the middle may have seen the end of those before."""
        while self._kept:
            self._at, self._begun = min(self._kept), False
            self._put(self._kept.pop(self._at))

    def _put(self, chunks: list[Chunk]) -> None:
        if self._at and not self._begun:
            put("")
            say(_heading(self._at))
        self._begun = True
        for each in chunks:
            if each.reset:
                say("\n(the job began anew and its text changed; from the beginning:)")
            put_piece(each.text)


def _heading(index: int) -> str:
    return f"(choice {index + 1}:)"


def _left(job: JobHandle) -> int:
    say(f"\nthe job goes on: gristmill follow {job.id}   (stop it: gristmill cancel {job.id})")
    return INTERRUPTED


def _chunk(job_id: str, chunk: Chunk) -> dict[str, Any]:
    return {
        "kind": "chunk",
        "job_id": job_id,
        "id": str(chunk.id),
        "choice": chunk.choice,
        "offset": chunk.offset,
        "ids": chunk.ids,
        "text": chunk.text,
        "reset": chunk.reset,
        "finish_reason": chunk.finish_reason.value if chunk.finish_reason else None,
        **({} if chunk.logprobs is None else {"logprobs": [asdict(each) for each in chunk.logprobs]}),
        **({} if chunk.tool_calls is None else {"tool_calls": [c.model_dump() for c in chunk.tool_calls]}),
    }


def _ending(ended: Result) -> dict[str, Any]:
    return {
        "kind": "end",
        "job_id": ended.job_id,
        "state": ended.state.value,
        "finish_reason": ended.finish_reason.value if ended.finish_reason else None,
        "usage": ended.usage.model_dump(),
        "error": ended.error.model_dump() if ended.error else None,
    }


def _usage_line(ended: Result) -> str:
    usage, timings = ended.usage, ended.timings
    parts = [f"{usage.prompt_tokens} + {usage.completion_tokens} tokens"]
    if timings.ttft_s is not None:
        parts.append(f"first after {timings.ttft_s:.2f} s")
    parts.append(f"done after {timings.e2e_s:.2f} s")
    if ended.finish_reason is not None:
        parts.append(f"finish: {ended.finish_reason}")
    return f"[{ended.job_id}: {', '.join(parts)}]"


def _status_lines(found: JobStatus) -> Iterable[tuple[str, Any]]:
    yield "job", found.job_id
    yield (
        "state",
        f"{found.state}{' (cancelling)' if found.cancel_requested and not found.state.final else ''}",
    )
    yield "model", found.model
    yield "tokens", found.tokens
    yield "attempts", found.attempts
    if found.worker:
        yield "worker", found.worker
    for name in ("submitted_at", "started_at", "finished_at"):
        if (at := getattr(found, name)) is not None:
            yield name.removesuffix("_at"), core.local_time(at)
    if found.error is not None:
        yield "error", f"{found.error.message} [{found.error.code}]"
    if found.result is not None:
        yield "result", found.result
