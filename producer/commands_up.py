"""`gristmill up`: an embedded stack in the foreground."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import click

from ..schemas.errors import Transient
from ..schemas.model_names import served_name
from ..schemas.settings import Settings, load_settings
from . import local_model
from .console import Interrupts, common, connection, put_json, say, warn
from .knobs import engine_knobs, worker_flags
from .link import Link
from .stack import Workers, make_workers

HELP = """Broker and workers in the foreground; others connect to it. Ctrl-C ends them, a second one at once.

\b
Examples:
  gristmill up --model smollm2-135m
  gristmill up --model Qwen/Qwen3-0.6B --workers 2 --max-num-seqs 64
"""
POLL_S = 0.2
STOP_S = 45.0


@click.command(help=HELP)
@click.option("--model", help="Default: GRISTMILL_MODEL, or the only model in the cache.")
@click.option("--workers", "count", type=click.IntRange(1, 64), default=1, show_default=True)
@engine_knobs
@connection
@common
def up(model: str | None, count: int, as_json: bool, **options: Any) -> int:
    """Start everything, then watch it."""
    urls = {name: options.pop(name) for name in ("broker_url", "state_url", "results_url")}
    settings = load_settings(**urls)
    model = local_model.choose(model or settings.model, settings, options.get("revision"))
    flags = worker_flags(options)
    workers = make_workers(settings, model, flags, count=count, logs=None, max_failures=None, stop_s=STOP_S)
    link, interrupts = Link(settings), Interrupts(workers.kill)
    try:
        link.state.ping()
        link.store.check()
        with interrupts:
            workers.start()
            say(f"starting {count} worker{'s' * (count > 1)} for {model} …")
            _watch(workers, link, settings, served_name(model), as_json, interrupts)
            say("stopping: workers finish or hand back what they run (Ctrl-C again to end at once) …")
            workers.stop()
    finally:
        workers.kill()
        link.close()
    say("stopped; accepted jobs are kept and continue with the next `gristmill up`")
    return interrupts.exit_code


def _watch(
    workers: Workers, link: Link, settings: Settings, name: str, as_json: bool, interrupts: Interrupts
) -> None:
    """Until told to stop. Says once where others connect, as soon as a worker is ready."""
    announced = False
    while not interrupts.stopping:
        for sentence in workers.check():
            warn(sentence)
        if not announced and _ready(workers, link, name):
            _announce(settings, link, name, as_json)
            announced = True
        time.sleep(POLL_S)


def _ready(workers: Workers, link: Link, name: str) -> bool:
    with suppress(Transient):
        return any(info.pid in workers.pids for info in link.state.alive(name))
    return False


def _announce(settings: Settings, link: Link, name: str, as_json: bool) -> None:
    endpoint = link.embedded_endpoint()
    where = settings.broker if endpoint is None else endpoint.tcp_url
    if as_json:
        put_json({"ready": True, "model": name, "broker_url": where, "results_url": settings.results})
        return
    say(f"ready: {name}")
    if not settings.broker_url:
        say('  in another terminal:  gristmill submit "Once upon a time" --stream')
    say(f"  for other programs:   export GRISTMILL_BROKER_URL={where}")
    say(f"  results:              {settings.results}")
