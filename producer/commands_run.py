"""`gristmill run`: a file of requests in, a file of answers out, everything embedded."""

from __future__ import annotations

import secrets
import shutil
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, BinaryIO

import click

from ..schemas.errors import BadInput, GristmillError
from . import bulk_output, bulk_session, core
from .bulk import Progress
from .bulk_output import STDOUT, Spool
from .bulk_session import InvalidLines, Prepared, Session
from .console import Interrupts, common, connection, put_json, say, say_error, schema_option, warn
from .knobs import engine_knobs, worker_flags
from .link import Link
from .progress import duration, show_progress
from .sampling_flags import FOR_ROWS, GroupedCommand, dests, sampling_flags, wishes
from .settings import ProducerSettings, load_producer_settings

HELP = """Run every request of a JSONL file; write the answers in OpenAI's batch format, in input order.

Lines are OpenAI batch lines (/v1/chat/completions, /v1/completions), or {"prompt": …} or {"messages": …}
with max_tokens, temperature and so on beside it; such flags here are for lines that do not say. The whole
file is checked before anything runs. Stop it at any time: the same command goes on where it was, and runs no
finished row again.

\b
Examples:
  gristmill run prompts.jsonl -o answers.jsonl
  gristmill run prompts.jsonl -o answers.jsonl --model Qwen/Qwen3-0.6B --max-tokens 200
  echo '{"prompt": "Once upon a time", "max_tokens": 32}' | gristmill run - -o -
  gristmill run prompts.jsonl -o answers.jsonl --broker redis://queue:6379/0     # workers elsewhere
"""


@click.command(help=HELP, cls=GroupedCommand)
@click.argument("source", metavar="INPUT|-")
@click.option("-o", "--output", required=True, metavar="FILE|-", help="Answers of rows that succeeded.")
@click.option("--errors", metavar="FILE", help="Rows that failed; default: OUTPUT's name with .errors.jsonl.")
@click.option("--model", help="Default: what the lines name, GRISTMILL_MODEL, or the only one in the cache.")
@click.option("--adapter", metavar="NAME", help="A LoRA adapter of the worker's; for lines that name none.")
@click.option("--json-schema", metavar="FILE", help="Answers fit this schema; for lines that do not say.")
@click.option(
    "--on-invalid",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Lines that are not valid: run nothing, or write them to the error file and run the rest.",
)
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True)
@click.option(
    "--window", "bulk_window", type=click.IntRange(1), help="Rows in the queue at once; default 512."
)
@click.option("--fresh", is_flag=True, help="Forget earlier runs over this file; run every row.")
@sampling_flags(*FOR_ROWS)
@engine_knobs
@connection
@common
def run(source: str, output: str, errors: str | None, workers: int, as_json: bool, **options: Any) -> int:
    """Check, run, write."""
    names = ("broker_url", "state_url", "results_url", "bulk_window")
    settings = load_producer_settings(**{name: options.pop(name) for name in names})
    if as_json and output == STDOUT:
        raise BadInput("--json prints the summary on stdout; give --output a file name")
    errors = errors or default_errors(output)
    directory = _check_targets(source, output, errors)
    link = Link(settings)
    try:
        with open_input(source) as file:
            job = _prepare(file, settings, link, options, as_json)
            knobs = worker_flags(options)
            with (
                Spool(directory) as spool,
                Session(settings, link, job, knobs=knobs, workers=workers, warn=warn) as session,
            ):
                return _execute(session, file, spool, job, output, errors, as_json)
    finally:
        link.close()


def _prepare(
    file: BinaryIO, settings: ProducerSettings, link: Link, options: dict[str, Any], as_json: bool
) -> Prepared:
    """The checked input. Invalid lines are shown, then raised or (``skip``) left to the error file."""
    defaults = wishes({name: options[name] for name in dests(*FOR_ROWS)})
    core.sampling_params(defaults)  # what is wrong with a flag is said once, not for every line
    if options["adapter"]:
        defaults["adapter_id"] = options["adapter"]
    if response_format := schema_option(options["json_schema"]):
        defaults["response_format"] = response_format
    skip = options["on_invalid"] == "skip"
    try:
        job = bulk_session.prepare(
            file,
            settings,
            link,
            model=options["model"],
            revision=options["revision"],
            defaults=defaults,
            skip_invalid=skip,
            salt=secrets.token_hex(8) if options["fresh"] else "",
        )
    except InvalidLines as exc:
        for each in exc.errors:
            say_error(str(each))
            if as_json:
                put_json({"line": each.line, "custom_id": each.custom_id, **each.error.model_dump()})
        raise
    for each in job.checked.errors:
        warn(str(each))
    return job


def _execute(
    session: Session,
    file: BinaryIO,
    spool: Spool,
    job: Prepared,
    output: str,
    errors: str | None,
    as_json: bool,
) -> int:
    """Run; whatever ends it, write what is finished; then say how it went."""
    started = time.monotonic()
    interrupts = Interrupts(session.kill)
    complete, failure = False, None
    with interrupts:
        try:
            with show_progress() as report:
                complete = session.execute(file, spool, lambda: interrupts.stopping, report)
        except GristmillError as exc:
            failure = exc
        _write(spool, output, errors)
    progress = session.progress
    summary = _summary(job, progress, time.monotonic() - started)
    summary |= {"complete": complete, "output": output, "errors": errors, "logs": session.logs}
    if as_json:
        put_json(summary)
    _say_summary(summary, progress)
    if failure is not None:
        say("what is finished is written; once this is mended, the same command continues:")
        raise failure
    if not complete:
        left = progress.rows - progress.ended
        say(f"stopped with {left:,} rows to go; run the same command again to continue")
        return interrupts.exit_code or 75
    return 0


def _write(spool: Spool, output: str, errors: str | None) -> None:
    """Both files. Without an error file the failed rows stand among the others."""
    if errors is None:
        bulk_output.write(output, spool.lines())
        return
    bulk_output.write(output, spool.lines(failed=False))
    if spool.has_failed:
        bulk_output.write(errors, spool.lines(failed=True))
    else:
        bulk_output.remove(errors)


def _summary(job: Prepared, progress: Progress, seconds: float) -> dict[str, Any]:
    return {
        "batch": job.batch,
        "model": job.name,
        "rows": progress.rows,
        "succeeded": progress.succeeded,
        "failed": progress.failed,
        "invalid": progress.invalid,
        "resumed": progress.resumed,
        "prompt_tokens": progress.prompt_tokens,
        "completion_tokens": progress.completion_tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(progress.tokens_per_s, 1),
        "ttft_p50_s": _rounded(progress.ttft_s(0.5)),
        "ttft_p95_s": _rounded(progress.ttft_s(0.95)),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _say_summary(summary: dict[str, Any], progress: Progress) -> None:
    rows = [f"{summary['succeeded']:,} done", f"{summary['failed']:,} failed"]
    if summary["invalid"]:
        rows.append(f"{summary['invalid']:,} not valid")
    if summary["resumed"]:
        rows.append(f"{summary['resumed']:,} of them in an earlier run")
    say(f"rows:    {', '.join(rows)}")
    say(
        f"tokens:  {summary['prompt_tokens']:,} in, {summary['completion_tokens']:,} out"
        f" in {duration(summary['seconds'])}, {summary['tokens_per_s']:,.0f} tok/s"
    )
    if progress.ttfts:
        say(f"TTFT:    p50 {summary['ttft_p50_s']:.3f} s, p95 {summary['ttft_p95_s']:.3f} s (from the claim)")
    say(f"output:  {summary['output']}")
    if summary["errors"] and (summary["failed"] or summary["invalid"]):
        say(f"errors:  {summary['errors']}")
    for log in summary["logs"]:
        say(f"log:     {log}")


def open_input(source: str) -> BinaryIO:
    """The input, seekable: stdin and pipes go into a temporary file first. Raises BadInput."""
    try:
        if source == STDOUT:
            return _copied(sys.stdin.buffer)
        file = Path(source).open("rb")  # noqa: SIM115 - the caller closes it
        if stat.S_ISREG(Path(source).stat().st_mode):
            return file
        with file:
            return _copied(file)
    except OSError as exc:
        raise BadInput(f"cannot read {source}: {exc.strerror}") from exc


def _copied(file: BinaryIO) -> BinaryIO:
    copy = tempfile.TemporaryFile(prefix="gristmill-")  # noqa: SIM115 - the caller closes it
    shutil.copyfileobj(file, copy)
    copy.seek(0)
    return copy


def default_errors(output: str) -> str | None:
    """``answers.jsonl`` → ``answers.errors.jsonl``. With stdout, failed rows go there too: None."""
    if output == STDOUT:
        return None
    path = Path(output)
    return str(path.with_name(f"{path.stem if path.suffix else path.name}.errors.jsonl"))


def _check_targets(source: str, output: str, errors: str | None) -> Path:
    bulk_session.refuse_same_files(source, output, errors)
    if errors is not None:
        bulk_output.check_target(errors, "--errors")
    return bulk_output.check_target(output, "--output")
