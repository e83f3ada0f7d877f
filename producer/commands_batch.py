"""`gristmill batch …`: submit a file and leave; look, steer and fetch later, from anywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import click

from ..schemas.batch import Batch, BatchStatus, RowsEnded, StatusChanged
from ..schemas.errors import InvalidRequest
from . import batches
from .batch.answers import Answers
from .batch.download import download
from .batch.following import follow as follow_events
from .batch.forecast import Forecast, Progress
from .batch.intake import InvalidInput
from .batch.output import check_target
from .batches import BatchHandle
from .commands_run import default_errors, show_problems, show_refusal
from .console import common, connection, put, put_json, say, warn
from .core import local_time
from .input_flags import asked_for, input_flags, order_flag, webhook_flags, webhook_wishes
from .link import Link
from .progress import rest
from .sampling_flags import GroupedCommand
from .settings import ProducerSettings, load_producer_settings

HELP = """Batches on a queue that workers serve: submit a file and leave.

\b
Examples:
  gristmill batch submit prompts.jsonl
  gristmill batch list
  gristmill batch follow batch_4be3…
  gristmill batch results batch_4be3… -o answers.jsonl
  gristmill batch retry --failed batch_4be3…
"""
SUBMIT_HELP = """Submit a file; print the batch's id. The same file again is the same batch.

\b
Examples:
  gristmill batch submit prompts.jsonl --model smollm2-135m
  gristmill batch submit s3://bucket/in.parquet --prompt-column question --chat --input-order
  gristmill batch submit prompts.jsonl --stop-after-failed 100 --meta team=search
  gristmill batch submit prompts.jsonl --webhook https://example.com/hook --webhook-every-percent 10
"""
RECOVER_HELP = """Go on with a batch whose record was lost with the state server. Its rows and its answers
are in the result store; what has ended does not run again. The completion window begins anew.

\b
Examples:
  gristmill batch recover batch_4be3…
"""
FOLLOW_HELP = """Show a batch's answers as they come, from the first, then how it ended.

\b
Examples:
  gristmill batch follow batch_4be3… > answers.jsonl
  gristmill batch follow batch_4be3… --json            # its events, one a line
"""


@click.group(help=HELP)
def batch() -> None:
    """Root of the commands."""


class _Opened:
    """A link for the time of one command."""

    def __init__(self, options: dict[str, Any]) -> None:
        names = ("broker_url", "state_url", "results_url")
        self.settings: ProducerSettings = load_producer_settings(
            **{name: options.pop(name) for name in names}
        )
        self.link = Link(self.settings)

    def handle(self, batch_id: str) -> BatchHandle:
        return batches.Batches(self.link).get(batch_id)

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *exc: object) -> None:
        self.link.close()


@batch.command(help=SUBMIT_HELP, cls=GroupedCommand)
@click.argument("source", metavar="INPUT|-")
@order_flag(by_default=False)
@webhook_flags
@click.option("--stop-after-failed", type=click.IntRange(1), help="Cancel it once so many rows have failed.")
@click.option("--stop-after-share", type=click.FloatRange(0, 1, min_open=True), help="… such a share of all.")
@click.option("--window-h", type=click.FloatRange(0, min_open=True), help="It expires after so many hours.")
@click.option("--meta", multiple=True, metavar="KEY=VALUE", help="Kept with the batch; up to 16.")
@click.option("--fresh", is_flag=True, help="A new batch, although this file was submitted before.")
@input_flags
@connection
@common
def submit(source: str, as_json: bool, **options: Any) -> int:
    """Check, upload, open."""
    with _Opened(options) as opened:
        more = ("input_order", "stop_after_failed", "stop_after_share")
        asked = asked_for(options, **{name: options[name] for name in more}, **webhook_wishes(options))
        hours = options["window_h"]
        asked = replace(
            asked,
            fresh=options["fresh"],
            metadata=_metadata(options["meta"]),
            completion_window_s=None if hours is None else hours * 3600.0,
        )
        try:
            made = batches.submit(opened.link, source, asked, opened.settings)
        except InvalidInput as exc:
            show_refusal(exc, [each.problem for each in exc.errors], as_json)
            raise
        for sentence in made.warnings:
            warn(sentence)
        if as_json:
            put_json(_record(made.status()))
        else:
            put(made.id)
    return 0


def _metadata(pairs: tuple[str, ...]) -> dict[str, str]:
    if wrong := [pair for pair in pairs if "=" not in pair]:
        raise InvalidRequest(f"--meta {wrong[0]}: write KEY=VALUE", param="meta")
    return dict(pair.split("=", 1) for pair in pairs)


@batch.command("list", help="The newest batches first.")
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--after", metavar="ID", help="Those before this one.")
@connection
@common
def list_batches(limit: int, after: str | None, as_json: bool, **options: Any) -> int:
    """A line each."""
    with _Opened(options) as opened:
        for each in batches.Batches(opened.link).list(after, limit):
            if as_json:
                put_json(_record(each))
                continue
            counts = each.request_counts
            ended = f"{counts.completed + counts.failed:,}/{counts.total:,}"
            failed = f", {counts.failed:,} failed" if counts.failed else ""
            put(f"{each.id}  {_status(each):11}  {ended} rows{failed}  {each.model}  {each.input}".rstrip())
    return 0


@batch.command(help="Where a batch stands.")
@click.argument("batch_id", metavar="ID")
@connection
@common
def show(batch_id: str, as_json: bool, **options: Any) -> int:
    """All that its record says."""
    with _Opened(options) as opened:
        found = opened.handle(batch_id).status()
        if as_json:
            put_json(_record(found))
            return 0
        for name, value in _facts(found):
            put(f"{name + ':':13}{value}")
        for problem in found.errors:
            put(f"  line {problem.line}: {problem.message} [{problem.code}]")
    return 0


def _facts(found: Batch) -> list[tuple[str, str]]:
    counts, usage = found.request_counts, found.usage
    facts = [
        ("batch", found.id),
        ("status", _status(found)),
        ("model", found.model),
        ("rows", f"{counts.total:,}: {counts.completed:,} done, {counts.failed:,} failed"),
        ("tokens", f"{usage.prompt_tokens:,} in, {usage.completion_tokens:,} out"),
    ]
    times = ("created_at", "in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at")
    for name in (*times, "cancelling_at", "cancelled_at", "expires_at"):
        at = getattr(found, name)
        if at is not None and not (name == "expires_at" and found.status.final):
            facts.append((name.removesuffix("_at"), local_time(at)))
    if found.reason is not None:
        facts.append(("because", f"{found.reason.message} [{found.reason.code}]"))
    if found.trouble is not None:
        facts.append(("trouble", f"{found.trouble.message} [{found.trouble.code}]"))
        facts.append(("next step", "mend that in the result store; a keeper tries again within five minutes"))
    if found.retry_of is not None:
        facts.append(("retry of", found.retry_of))
    if found.input:
        facts.append(("input", found.input))
    facts += [(f"metadata {name}", value) for name, value in found.metadata.items()]
    if found.problems:
        facts.append(("problems", f"{found.problems:,}"))
    return facts


@batch.command(help=FOLLOW_HELP)
@click.argument("batch_id", metavar="ID")
@click.option("--after", metavar="EVENT", help="Events from after this one; its id is in --json.")
@connection
@common
def follow(batch_id: str, after: str | None, as_json: bool, **options: Any) -> int:
    """Answers on stdout, progress on stderr."""
    from ..backends.object_lines import object_lines
    from ..schemas.events import EntryId

    with _Opened(options) as opened:
        handle, forecast = opened.handle(batch_id), Forecast()
        last = None if after is None else EntryId.parse(after)
        for event_id, event in follow_events(opened.link, batch_id, last):
            if as_json:
                put_json({"id": str(event_id)} | json.loads(event.to_json()))
                continue
            if isinstance(event, RowsEnded):
                for line in object_lines(opened.link.store, event.object):
                    put(line.decode())
                _say_rows(event, forecast.progress(handle.status()))
            elif isinstance(event, StatusChanged):
                say(f"{event.status}, paused" if event.paused else event.status)
        ended = handle.status()
        show_problems(ended.errors, False)
        return 0 if ended.status is BatchStatus.COMPLETED else 2


def _say_rows(event: RowsEnded, now: Progress) -> None:
    """How far it was with these rows; speed and rest only if that is where it stands."""
    ended = event.counts.completed + event.counts.failed
    speed = f", {rest(now)}" if ended == now.ended else ""
    say(f"{ended:,}/{event.counts.total:,} rows{speed}")


@batch.command(help="Fetch a batch's answers; of one that still runs, those that have ended.")
@click.argument("batch_id", metavar="ID")
@click.option("-o", "--output", default="-", show_default=True, metavar="FILE|s3://…|-")
@click.option("--errors", metavar="FILE", help="Rows that failed; default: OUTPUT's name with .errors.jsonl.")
@connection
@common
def results(batch_id: str, output: str, errors: str | None, as_json: bool, **options: Any) -> int:
    """Both files."""
    with _Opened(options) as opened:
        errors = errors or default_errors(output)
        check_target(output, "--output", opened.settings)
        found = opened.handle(batch_id).status()
        good, bad = download(Answers(opened.link, found), output, errors, opened.settings)
        if as_json:
            summary = {"batch": found.id, "status": found.status, "output": good, "errors": bad}
            say(json.dumps(summary)) if output == "-" else put_json(summary)
            return 0
        say(f"{good:,} answers, {bad:,} failed rows; the batch is {_status(found)}")
    return 0


def _steer(name: str, text: str) -> click.Command:
    """A command that asks something of batches."""

    def command(batch_ids: tuple[str, ...], as_json: bool, **options: Any) -> int:
        with _Opened(options) as opened:
            for batch_id in batch_ids:
                handle = opened.handle(batch_id)
                status: BatchStatus = getattr(handle, name)()
                if as_json:
                    put_json({"batch": batch_id, "status": status, "paused": handle.status().paused})
                else:
                    say(f"{batch_id}: {_status(handle.status())}")
        return 0

    made = click.argument("batch_ids", metavar="ID...", nargs=-1, required=True)(connection(common(command)))
    return batch.command(name, help=text)(made)


cancel = _steer("cancel", "Stop batches; what has ended is kept, and delivered.")
pause = _steer("pause", "Start no more rows of batches.")
resume = _steer("resume", "Let paused batches go on.")


@batch.command(help="A new batch of the rows that failed; its answers have those of the old one merged in.")
@click.argument("batch_id", metavar="ID")
@click.option("--failed", is_flag=True, required=True, help="Those that failed, expired or were cancelled.")
@connection
@common
def retry(batch_id: str, failed: bool, as_json: bool, **options: Any) -> int:  # noqa: ARG001 - said for the reader
    """Its id on stdout."""
    with _Opened(options) as opened:
        made = opened.handle(batch_id).retry()
        if as_json:
            put_json(_record(made.status()))
        else:
            put(made.id)
    return 0


@batch.command(help=RECOVER_HELP)
@click.argument("batch_id", metavar="ID")
@connection
@common
def recover(batch_id: str, as_json: bool, **options: Any) -> int:
    """Make its record again; how much is left."""
    from ..backends import recovery

    with _Opened(options) as opened:
        found = recovery.recover(opened.link.state.batches, opened.link.store, batch_id)
    left = found.total - found.rows
    if as_json:
        fields = {"id": batch_id, "total": found.total, "ended": found.rows, "left": left}
        put_json({**fields, "objects": found.objects, "doubled": found.doubled})
    else:
        put(f"{batch_id}  {found.rows:,} of {found.total:,} rows had ended; {left:,} go on")
    return 0


def _status(found: Batch) -> str:
    return f"{found.status.value}, paused" if found.paused and not found.status.final else found.status.value


def _record(found: Batch) -> dict[str, Any]:
    return found.model_dump(mode="json", exclude_none=True)
