"""`gristmill run`: a file of requests in, a file of answers out, everything embedded."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import nullcontext
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import click

from ..schemas.batch import Batch, BatchStatus, LineProblem
from ..schemas.errors import BadInput, GristmillError, ModelNotFound
from ..schemas.model_names import served_name
from ..schemas.webhook import DeliveryState
from . import batches, core, local_model
from .batch import output as outputs
from .batch.answers import Answers
from .batch.cache import Cache
from .batch.check import naming_the_line
from .batch.crew import Crew
from .batch.download import download
from .batch.intake import Intake, InvalidInput
from .batch.run import Hooks, Run, latest, only_run
from .batch.sources import STANDARD, refuse_same_files
from .batches import Wishes
from .console import Interrupts, common, connection, put_json, say, say_error, warn
from .input_flags import asked_for, input_flags, order_flag, webhook_flags, webhook_wishes
from .knobs import engine_knobs, worker_flags
from .link import EMBEDDED, Link
from .progress import show_progress
from .sampling_flags import GroupedCommand
from .settings import ProducerSettings, load_producer_settings
from .summary import Summary

WEBHOOK_WAIT_S = 5.0
"""For a run's last event to be delivered, before its worker ends."""
NEWEST_EVENTS = 100

HELP = """Run every request of a file; write the answers in OpenAI's batch format.

Lines are OpenAI batch lines (/v1/chat/completions, /v1/completions), or {"prompt": …} or {"messages": …}
with max_tokens, temperature and so on beside it; such flags here are for lines that do not say. Tables (CSV,
Parquet) have a column of prompts, or a template. The whole file is checked before anything runs. Stop it at
any time: the same command (without --fresh) goes on where it was, and runs no finished row again.

\b
Examples:
  gristmill run prompts.jsonl -o answers.jsonl
  gristmill run prompts.jsonl -o answers.jsonl --model Qwen/Qwen3-0.6B --max-tokens 200
  gristmill run reviews.csv -o s3://bucket/out.jsonl.gz --template "Is this praise? {text}" --chat
  echo '{"prompt": "Once upon a time", "max_tokens": 32}' | gristmill run - -o -
  gristmill run prompts.jsonl -o answers.jsonl --broker redis://queue:6379/0     # workers elsewhere
  gristmill run prompts.jsonl -o answers.jsonl --webhook https://example.com/hook --webhook-every-percent 10
"""


@click.command(help=HELP, cls=GroupedCommand)
@click.argument("source", metavar="INPUT|-")
@click.option("-o", "--output", required=True, metavar="FILE|-", help="Answers of rows that succeeded.")
@click.option("--errors", metavar="FILE", help="Rows that failed; default: OUTPUT's name with .errors.jsonl.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True)
@order_flag(by_default=True)
@webhook_flags
@click.option("--cache", metavar="FILE", help="Keep answers there, and take them for rows that ask the same.")
@click.option(
    "--fresh",
    is_flag=True,
    help="Run every row, whatever earlier runs have ended; then this is the one to continue.",
)
@input_flags
@engine_knobs
@connection
@common
def run(source: str, output: str, errors: str | None, workers: int, as_json: bool, **options: Any) -> int:
    """Check, run, write."""
    names = ("broker_url", "state_url", "results_url")
    settings = load_producer_settings(**{name: options.pop(name) for name in names})
    if as_json and output == STANDARD:
        raise BadInput("--json prints the summary on stdout; give --output a file name")
    errors = errors or default_errors(output)
    refuse_same_files({"input": source, "--output": output, "--errors": errors})
    for what, name in (("--output", output), ("--errors", errors)):
        if name is not None:
            outputs.check_target(name, what, settings)
    asked = asked_for(options, input_order=options["input_order"], **webhook_wishes(options))
    link = Link(settings)
    try:
        link.state.ping()
        link.store.check()
        model = _Model(asked, settings, link, options["revision"])
        with (
            read_or_say(source, asked, settings, model.names, as_json) as intake,
            Cache(options["cache"]) if options["cache"] else nullcontext() as cache,
        ):
            with naming_the_line(intake.checked, asked.model or settings.model):
                name = model.name(intake.checked.model)
            batch = batches.describe(intake, asked, name, settings, "run_", source)
            batch = latest(link, intake, batch, fresh=options["fresh"])
            job = Run(link, settings, intake, batch, cache)
            with (
                only_run(settings, job.batch.id),
                _crew(link, settings, job, model, workers, options) as crew,
            ):
                said = Summary(job, intake, output, errors, options["fresh"], as_json)
                return _execute(link, crew, said)
    finally:
        link.close()


class _Model:
    """The model of a run: as rows may call it, as the queue calls it, and as a worker of ours loads it."""

    def __init__(self, asked: Wishes, settings: ProducerSettings, link: Link, revision: str | None) -> None:
        self._settings, self._link, self._revision = settings, link, revision
        self._wanted = asked.model or settings.model
        self.here = settings.broker.startswith(EMBEDDED)
        self.ours: str | None = None
        """What a worker of our own loads; None: workers are somewhere else."""
        if self._wanted is not None:  # a wrong name is known before a long file is read
            self._choose(self._wanted)

    @property
    def names(self) -> list[str] | None:
        """Those that rows may give; None: any one."""
        return None if self._wanted is None else [self._wanted, served_name(self._wanted)]

    def name(self, said: str | None) -> str:
        """In the queue. ``said``: what rows call it. Raises ModelNotFound."""
        chosen = self._choose(self._wanted or said)
        self.ours = chosen if self.here else None
        return served_name(chosen) if self.here else chosen

    def _choose(self, wanted: str | None) -> str:
        if not self.here:
            return core.pick_model(wanted, self._link.state.models(), self._settings)
        try:
            return local_model.choose(wanted, self._settings, self._revision)
        except ModelNotFound:
            if wanted is not None and self._link.state.alive(wanted):  # `up` serves it from another cache
                return wanted
            raise


def read_or_say(
    source: str, asked: Wishes, settings: ProducerSettings, models: Iterable[str] | None, as_json: bool
) -> Intake:
    """The checked input. Invalid lines are shown, then raised or (``skip``) left to the error file."""
    try:
        intake = batches.read(source, asked, settings, models)
    except InvalidInput as exc:
        show_refusal(exc, [each.problem for each in exc.errors], as_json)
        raise
    for each in intake.checked.errors:
        warn(str(each))
    return intake


def show_problems(problems: Iterable[LineProblem], as_json: bool) -> None:
    """What is wrong with an input, line by line."""
    for each in problems:
        say_error(f"line {each.line}: {each.message} [{each.code}]")
        if as_json:
            put_json(each.model_dump())


def show_refusal(exc: InvalidInput, problems: Iterable[LineProblem], as_json: bool) -> None:
    """The same of an input that does not run for it; the last object says that this was all."""
    show_problems(problems, as_json)
    if as_json:
        said = {"complete": False, "rows": exc.rows, "succeeded": 0, "failed": 0, "invalid": exc.invalid}
        put_json(said)


def _crew(
    link: Link, settings: ProducerSettings, job: Run, model: _Model, count: int, options: dict[str, Any]
) -> Crew:
    ours = None if job.over else model.ours
    return Crew(link, settings, job.batch.model, ours, worker_flags(options), count, warn)


def _execute(link: Link, crew: Crew, said: Summary) -> int:
    """Run; whatever ends it, write what is finished; then say how it went."""
    started, job = time.monotonic(), said.job
    interrupts = Interrupts(crew.kill)
    failure = None
    with interrupts:
        if not job.over:
            said.begin(link.settings.broker)
            try:
                with show_progress() as report:
                    job.execute(crew, Hooks(lambda: interrupts.stopping, report))
            except GristmillError as exc:
                failure = exc
        batch = job.batch
        if batch.status is BatchStatus.FAILED:
            refused = InvalidInput(batch.problems, batch.request_counts.total)
            show_refusal(refused, batch.errors, said.as_json)
            raise refused
        if failure is not None and batch.created_at is None:
            say("nothing was sent; once this is mended, the same command begins anew:")
            raise failure
        if batch.created_at is not None:
            download(Answers(link, batch), said.output, said.errors, link.settings)
            job.keep_answers()
        if job.over and batch.options.webhook is not None:
            _tell_of_webhook(link, batch)
    said.end(time.monotonic() - started, crew.logs)
    if failure is not None:
        said.how_to_go_on("once this is mended, ")
        raise failure
    if not job.over:
        said.how_to_go_on()
        return interrupts.exit_code or 75
    return 0


def _tell_of_webhook(link: Link, batch: Batch) -> None:
    """What became of the event that says how the batch ended: who sends it may be our own worker."""
    deadline, last = time.monotonic() + WEBHOOK_WAIT_S, f"batch.{batch.status.value}"
    while True:
        newest = islice(link.outbox.list(), NEWEST_EVENTS)
        event = next((each for each in newest if (each.type, each.data.get("id")) == (last, batch.id)), None)
        if event is not None and event.state is DeliveryState.DELIVERED:
            say(f"webhook: {last} delivered")
            return
        failed = event is not None and (event.tries or event.state is not DeliveryState.PENDING)
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    if event is None:
        warn("no event was sent to the webhook: it is one of before, or the batch had ended earlier")
    else:
        why = event.log[-1].reason if event.log else event.why or "nobody tried it yet"
        warn(
            f"{last} has not reached the webhook ({event.state.value}: {why}); workers and keepers go on "
            f"trying while they run; `gristmill webhooks show {event.id}` says how that goes"
        )


def default_errors(output: str) -> str | None:
    """``answers.jsonl.gz`` → ``answers.errors.jsonl.gz``. None: they go to stdout, or a device, too."""
    if output == STANDARD or outputs.special(output):
        return None
    folder, slash, name = output.rpartition("/")
    packed = PurePosixPath(name).suffix if name.endswith((".gz", ".zst", ".zstd")) else ""
    stem = PurePosixPath(name.removesuffix(packed))
    return f"{folder}{slash}{stem.stem if stem.suffix else stem.name}.errors.jsonl{packed}"
