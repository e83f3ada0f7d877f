"""`gristmill workers`."""

from __future__ import annotations

import time

import click

from ..schemas.status import WorkerInfo
from ..schemas.wire import shown
from . import core
from .commands_jobs import client_of
from .console import common, connection, put, put_json, say

HELP = """Who is alive and what they do, a line each. What they wait for comes below, marked with an arrow.

\b
Examples:
  gristmill workers
  gristmill workers --model smollm2-135m
  gristmill workers --json | jq 'select(.state != "ready" or .trouble)'
"""


@click.command(help=HELP)
@click.option("--model", help="Only those that serve it.")
@connection
@common
def workers(model: str | None, as_json: bool, **urls: str | None) -> int:
    """As they said themselves with their last heartbeat."""
    with client_of(urls) as client:
        alive = client.workers()
        settings = client.settings
    found = {name: info for name, info in sorted(alive.items()) if model is None or model in info.models}
    now = time.time()
    for name, info in found.items():
        age_s = None if info.seen_at is None else round(max(0.0, now - info.seen_at), 1)
        if as_json:
            put_json({"worker": name, "age_s": age_s, **info.model_dump(mode="json")})
        else:
            put(_line(name, info, age_s))
            if info.trouble is not None:
                put(f"  → {shown(info.trouble)}")
    if not found:
        say(f"nobody is alive; start one: {core.start_command(model or settings.model or 'MODEL', settings)}")
    return 0


def _line(name: str, info: WorkerInfo, age_s: float | None) -> str:
    """Names come from the workers' side: nothing in them may move the cursor."""
    heard = "" if age_s is None else f"  heard of {age_s:.0f} s ago"
    return (
        f"{shown(name):<32} {shown(info.state):<9} {shown(', '.join(info.models))}"
        f"  {info.in_hand:,} jobs: {info.running:,} running, {info.waiting:,} waiting{heard}"
    )
