"""`gristmill queues create | list | pause | resume`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from ..schemas import queues as names
from ..schemas.errors import Misconfigured
from ..schemas.job import Priority
from ..schemas.settings import Settings, load_settings
from . import core
from .console import common, connection, put, put_json, say
from .link import Link

SQS = "sqs:"
HELP = """The queues of a model: three classes, served strictly in order.

\b
Examples:
  gristmill queues create --model smollm2-135m     # on SQS; a Redis makes its queues by itself
  gristmill queues list                            # what waits and what is running, by queue
  gristmill queues pause --class batch             # nobody claims; what runs goes on, submitting too
  gristmill queues resume
"""


@click.group(help=HELP)
def queues() -> None:
    """Root of the commands."""


@queues.command()
@click.option("--model", required=True, help="As clients and workers name it.")
@click.option(
    "--redrive",
    type=click.IntRange(1, 1000),
    default=1000,
    show_default=True,
    help="SQS: receives after which a message goes to the dead-letter queue. Hand-backs count too.",
)
@connection
@common
def create(model: str, redrive: int, as_json: bool, **urls: str | None) -> None:
    """Create what is missing of a model's queues, and make the model known. May be repeated."""
    settings = load_settings(**urls)
    link = Link(settings)
    try:
        found = list(_create(settings, model, redrive))
        link.state.announce(model, names.queue_names(model))
    finally:
        link.close()
    for fields in found:
        if as_json:
            put_json(fields)
        else:
            put(f"{fields['queue']}  {'created' if fields['created'] else 'was there'}")
    if not settings.broker.startswith(SQS):
        say("a Redis makes its queues when the first message comes; the model is known now")


def _create(settings: Settings, model: str, redrive: int) -> Iterator[dict[str, Any]]:
    if not settings.broker.startswith(SQS):
        return
    from ..backends.sqs_admin import create_queues

    for queue in create_queues(settings, model, max_receives=redrive):
        yield {"queue": queue.name, "url": queue.url, "created": queue.created}


@queues.command("list")
@click.option("--model", help="Only this model's; default: those of every known model.")
@connection
@common
def list_command(model: str | None, as_json: bool, **urls: str | None) -> None:
    """What waits and what is claimed, by queue. On SQS the numbers are approximate."""
    from ..backends import broker

    link = Link(load_settings(**urls))
    try:
        known = [model] if model else sorted(link.state.models())
        if not known:
            raise Misconfigured(
                "no model is known here; run `gristmill queues create --model MODEL`, or start a worker"
            )
        every = [queue for name in known for queue in names.queue_names(name)]
        for queue in every:
            waiting, claimed = broker.counts(link.app, queue)
            _put(queue, waiting, claimed, broker.paused(link.app, queue), as_json)
    finally:
        link.close()


def _switch(command: Any) -> Any:
    """Which queues to pause or resume."""
    command = click.option(
        "--class",
        "classes",
        multiple=True,
        type=click.Choice([p.value for p in Priority]),
        help="Default: all three.",
    )(command)
    command = click.option("--model", help="Default: GRISTMILL_MODEL, or the only model known.")(command)
    return common(connection(command))


@queues.command()
@_switch
def pause(model: str | None, classes: tuple[str, ...], as_json: bool, **urls: str | None) -> None:
    """Let nobody claim from a model's queues. Running jobs go on, and submitting does."""
    _set_paused(True, model, classes, as_json, urls)


@queues.command()
@_switch
def resume(model: str | None, classes: tuple[str, ...], as_json: bool, **urls: str | None) -> None:
    """Let workers claim from them again; they hear of it at once."""
    _set_paused(False, model, classes, as_json, urls)


def _set_paused(
    paused: bool, model: str | None, classes: tuple[str, ...], as_json: bool, urls: dict[str, str | None]
) -> None:
    from ..backends import broker

    settings = load_settings(**urls)
    link = Link(settings)
    try:
        name = core.pick_model(model, link.state.models(), settings)
        for queue in [names.queue_name(name, Priority(c)) for c in classes or Priority]:
            broker.pause(link.app, queue, paused=paused)
            if as_json:
                put_json({"queue": queue, "paused": paused})
            else:
                put(f"{queue}  {'paused' if paused else 'goes on'}")
    finally:
        link.close()


def _put(queue: str, waiting: int, claimed: int, paused: bool, as_json: bool) -> None:
    if as_json:
        put_json({"queue": queue, "waiting": waiting, "claimed": claimed, "paused": paused})
    else:
        put(f"{queue:<48} {waiting:>9,} waiting {claimed:>7,} claimed{'  paused' if paused else ''}")
