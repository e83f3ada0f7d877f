"""`gristmill dead list | show | requeue | purge`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from ..schemas.errors import BadInput, Misconfigured
from ..schemas.job import Job
from . import core
from .commands_jobs import client_of
from .console import common, connection, put, put_json, say, say_error

if TYPE_CHECKING:
    from ..schemas.dead import DeadLetter
    from .dead import Dead, DeadJob

HELP = """Messages that are not delivered again: their jobs have failed, and can be sent once more.

\b
Examples:
  gristmill dead list
  gristmill dead show job_0190…
  gristmill dead requeue job_0190…            # a new job with retry_of; prints its id
  gristmill dead requeue --all --model MODEL
  gristmill dead purge --all                  # asks first, on a terminal
"""
REASON_CHARS = 100


@click.group(help=HELP)
def dead() -> None:
    """Root of the commands."""


def _where(command: Any) -> Any:
    """Which queues."""
    for flag, text in (("--queue", "Only this queue."), ("--model", "Only this model's queues.")):
        command = click.option(flag, help=text)(command)
    return common(connection(command))


def _which(command: Any) -> Any:
    """Which letters: some, or all of them."""
    command = click.option("--all", "everything", is_flag=True, help="All of them.")(command)
    return click.argument("names", metavar="[JOB|ID]…", nargs=-1)(command)


@dead.command("list")
@_where
def list_command(model: str | None, queue: str | None, as_json: bool, **urls: str | None) -> None:
    """What is there, the newest first."""
    found = False
    with client_of(urls) as client:
        for letter in client.dead.list(model=model, queue=queue):
            found = True
            if as_json:
                put_json(_fields(letter))
            else:
                reason = letter.reason[:REASON_CHARS] + ("…" if len(letter.reason) > REASON_CHARS else "")
                put(f"{letter.job_id or letter.id}  {core.local_time(letter.at)}  {letter.tenant}  {reason}")
    if not found:
        say("no dead letters" + (" in these queues" if model or queue else ""))


@dead.command()
@click.argument("name", metavar="JOB|ID")
@click.option("--show-prompt", is_flag=True, help="The message and its prompt, too.")
@_where
def show(
    name: str, show_prompt: bool, model: str | None, queue: str | None, as_json: bool, **urls: str | None
) -> None:
    """Why it died: the job's error, its attempts and what died with it."""
    with client_of(urls) as client:
        found = client.dead.show(name, model=model, queue=queue)
    if as_json:
        put_json(_details(found, show_prompt))
        return
    for title, value in _lines(found, show_prompt):
        put(f"{title + ':':<12} {value}")


@dead.command()
@_which
@_where
def requeue(
    names: tuple[str, ...],
    everything: bool,
    model: str | None,
    queue: str | None,
    as_json: bool,
    **urls: str | None,
) -> int:
    """Send jobs again, each as a new one; print the new ids. What cannot be read stays."""
    failed = 0
    with client_of(urls) as client:
        for letter in _chosen(client.dead, names, everything, model, queue):
            try:
                job = client.dead.requeue(letter)
            except BadInput as exc:
                if not everything:
                    raise
                failed += 1
                say_error(f"{letter.id}: {exc.message} [{exc.code}]")
                continue
            if as_json:
                put_json({"job_id": job.id, "retry_of": job.retry_of, "letter": letter.id})
            else:
                put(job.id)
    return 2 if failed else 0


@dead.command()
@_which
@click.option("--yes", is_flag=True, help="Do not ask.")
@_where
def purge(
    names: tuple[str, ...],
    everything: bool,
    yes: bool,
    model: str | None,
    queue: str | None,
    as_json: bool,
    **urls: str | None,
) -> None:
    """Throw them away for good. The results of their jobs stay."""
    with client_of(urls) as client:
        letters = list(_chosen(client.dead, names, everything, model, queue))
        if letters and not yes and sys.stdin.isatty() and sys.stderr.isatty():
            click.confirm(f"Throw away {len(letters):,} dead letters for good?", abort=True, err=True)
        gone = client.dead.purge(letters)
    if as_json:
        put_json({"purged": gone})
    else:
        say(f"{gone:,} thrown away")


def _chosen(
    letters: Dead, names: tuple[str, ...], everything: bool, model: str | None, queue: str | None
) -> Iterator[DeadLetter]:
    if bool(names) == everything:
        raise Misconfigured("name jobs or dead letters, or say --all")
    if everything:  # read first: what follows takes out of the list that it reads
        yield from list(letters.list(model=model, queue=queue))
    for name in names:
        yield letters.find(name, model=model, queue=queue)


def _fields(letter: DeadLetter) -> dict[str, Any]:
    return letter.model_dump(mode="json", exclude={"payload", "v"})


def _details(found: DeadJob, show_prompt: bool) -> dict[str, Any]:
    result = found.result
    details = _fields(found.letter) | {
        "readable": found.job is not None,
        "state": result.state.value if result else None,
        "error": result.error.model_dump() if result and result.error else None,
        "attempts": result.attempts if result else None,
        "history": _history(found),
    }
    if show_prompt:
        details |= {"payload": found.letter.payload, "job": _plain(found.job)}
    return details


def _history(found: DeadJob) -> list[dict[str, Any]]:
    """What died with the job, as its result remembers."""
    return [crash.model_dump(mode="json") for crash in (found.result.crashes if found.result else ())]


def _lines(found: DeadJob, show_prompt: bool) -> Iterator[tuple[str, Any]]:
    letter, result = found.letter, found.result
    yield "letter", letter.id
    yield "job", letter.job_id or "unknown: the message cannot be read"
    yield "queue", letter.queue
    yield "tenant", letter.tenant
    yield "at", core.local_time(letter.at)
    yield "reason", letter.reason
    if result is None:
        yield "state", "no result: it has not ended yet, or its time is over"
    else:
        yield "state", result.state
        yield "attempts", result.attempts
        if result.error is not None:
            yield "error", f"{result.error.message} [{result.error.code}]"
    for crash in _history(found):
        yield "crash", " ".join(f"{name}={value}" for name, value in crash.items())
    if show_prompt:
        body = _plain(found.job)
        yield "message", json.dumps(body, ensure_ascii=False) if body else letter.payload
    else:
        yield "prompt", "not shown; --show-prompt"


def _plain(job: Job | None) -> dict[str, Any] | None:
    return None if job is None else job.model_dump(mode="json", exclude_defaults=True)
