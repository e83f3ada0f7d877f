"""`gristmill plan`: what a file would take, before it runs; and what it will, while it does."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import click

from ..schemas.batch import Batch, BatchStatus
from ..schemas.errors import Transient
from . import batches
from .batch.forecast import PROMPT_WEIGHT, Forecast
from .batch.intake import Intake
from .batch.submission import CLIENT
from .commands_run import read_or_say
from .console import common, connection, put, put_json
from .input_flags import asked_for, input_flags
from .link import Link
from .progress import duration
from .sampling_flags import GroupedCommand
from .settings import load_producer_settings

HELP = """What a file would take: rows, tokens, time, money. Nothing is sent.

Tokens are estimates: four characters of a prompt each, and as many of an answer as a row allows. Once 5 % of
the same file's rows have run, what was measured on them takes their place.

\b
Examples:
  gristmill plan prompts.jsonl
  gristmill plan prompts.jsonl --tokens-per-s 4000 --price-per-hour 2.50
"""
LOOKED_AT = 50
"""Recent batches, of which one may tell how fast the model's workers are."""


@click.command(help=HELP, cls=GroupedCommand)
@click.argument("source", metavar="INPUT|-")
@click.option(
    "--tokens-per-s", type=click.FloatRange(0, min_open=True), help="Of output; default: as last measured."
)
@click.option("--price-per-hour", type=click.FloatRange(0), help="Of all workers together.")
@input_flags
@connection
@common
def plan(
    source: str, tokens_per_s: float | None, price_per_hour: float | None, as_json: bool, **options: Any
) -> int:
    """Read, estimate, say."""
    names = ("broker_url", "state_url", "results_url")
    settings = load_producer_settings(**{name: options.pop(name) for name in names})
    asked, link = asked_for(options), Link(settings)
    try:
        with read_or_say(source, asked, settings, None, as_json) as intake:
            recent = _recent(link) if settings.broker_url or link.embedded_endpoint() else []
            same = _same(link, recent, intake.checked.digest)
            said = _estimate(intake, recent, same, tokens_per_s)
    finally:
        link.close()
    if price_per_hour is not None and said["seconds"] is not None:
        said["price"] = round(said["seconds"] / 3600 * price_per_hour, 4)
    if as_json:
        put_json(said)
    else:
        _say(said)
    return 0


def _recent(link: Link) -> list[Batch]:
    try:
        return batches.Batches(link).list(limit=LOOKED_AT)
    except Transient:  # a plan needs no broker
        return []


def _same(link: Link, recent: list[Batch], digest: str) -> Batch | None:
    """The last batch of these rows. One that took answers from a cache is none: rows that ended without a
    token say nothing of what the others take.
    """
    with suppress(Transient):
        return next(
            (each for each in recent if each.input_digest == digest and not _cached(link, each)), None
        )
    return None


def _cached(link: Link, batch: Batch) -> bool:
    objects = link.state.batches.objects(batch.id)
    return any(each.segment == CLIENT and each.kind == "output" for each in objects)


def _estimate(
    intake: Intake, recent: list[Batch], same: Batch | None, tokens_per_s: float | None
) -> dict[str, Any]:
    checked = intake.checked
    prompts, outputs, basis = checked.prompt_tokens, checked.output_tokens, "estimate"
    if same is not None:
        # Its long rows ran first: what they took says nothing without what they were to take.
        forecast = Forecast([each.part for each in intake.cuts(lambda _refused: None)])
        if forecast.live(same):
            prompts, outputs = forecast.tokens(same)
            basis = f"measured on {same.request_counts.completed:,} rows of {same.id}"
    rate_of = same if same is not None and measured(same) else next(filter(measured, recent), None)
    rate = tokens_per_s or (rate_of and measured(rate_of))
    return {
        "rows": checked.rows,
        "invalid": checked.invalid,
        "copies": checked.copies,
        "prompt_tokens": round(prompts),
        "completion_tokens": round(outputs),
        "basis": basis,
        "tokens_per_s": rate and round(rate, 1),
        "rate_basis": "given" if tokens_per_s else rate_of and f"measured by {rate_of.id}",
        "seconds": None if not rate else round((outputs + PROMPT_WEIGHT * prompts) / rate, 1),
    }


def measured(batch: Batch) -> float | None:
    """Work a second, in tokens of output, of a batch that has run, or runs."""
    began, ended = batch.in_progress_at, batch.finalizing_at
    if batch.status is BatchStatus.IN_PROGRESS and not batch.paused:
        ended = time.time()
    work = batch.usage.completion_tokens + PROMPT_WEIGHT * batch.usage.prompt_tokens
    return None if began is None or ended is None or ended <= began or not work else work / (ended - began)


def _say(said: dict[str, Any]) -> None:
    copies = f", {said['copies']:,} of them ask for the same as another" if said["copies"] else ""
    invalid = f", {said['invalid']:,} not valid" if said["invalid"] else ""
    put(f"rows:    {said['rows']:,}{copies}{invalid}")
    put(f"tokens:  {said['prompt_tokens']:,} in, {said['completion_tokens']:,} out ({said['basis']})")
    if said["seconds"] is None:
        put("time:    not known yet; give --tokens-per-s, or run a batch of this model first")
        return
    put(f"time:    {duration(said['seconds'])} at {said['tokens_per_s']:,} tok/s ({said['rate_basis']})")
    if "price" in said:
        put(f"price:   {said['price']:,}")
