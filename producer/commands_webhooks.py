"""`gristmill webhooks list | show | replay | endpoints | enable | test | listen | secret`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import click

from ..schemas.errors import Misconfigured
from ..schemas.webhook import DeliveryState, WebhookDelivery, WebhookEndpoint, new_secret, secret_key
from . import core
from .commands_jobs import client_of
from .console import Interrupts, common, connection, put, put_json, say, warn
from .settings import load_producer_settings

HELP = """Events sent to webhooks: what became of them, sending again, trying a receiver out.

\b
Examples:
  gristmill webhooks list --failed
  gristmill webhooks show evt_0190…                    # every try, with what was answered
  gristmill webhooks replay evt_0190…
  gristmill webhooks replay --failed --since-h 48
  gristmill webhooks endpoints                         # receivers that fail, or said that they are gone
  gristmill webhooks enable https://example.com/hook   # it is back: send what waits for it
  gristmill webhooks test https://example.com/hook
  gristmill webhooks secret                            # a new one, for GRISTMILL_WEBHOOK_SECRET
  gristmill webhooks listen --port 8099                # a receiver that checks and prints
"""
LIMIT = 100
POLL_S = 0.2


@click.group(help=HELP)
def webhooks() -> None:
    """Root of the commands."""


def _endpoint(command: Any) -> Any:
    return click.option(
        "--endpoint", metavar="URL", help="Only those for this URL (its query does not count)."
    )(command)


def _since(command: Any) -> Any:
    return click.option("--since-h", type=click.FloatRange(0), help="Only events of the last so many hours.")(
        command
    )


@webhooks.command("list")
@click.option("--failed", "only", flag_value="failed", help="Only those that were given up.")
@click.option("--pending", "only", flag_value="pending", help="Only those that are to be sent.")
@click.option("--delivered", "only", flag_value="delivered", help="Only those that arrived.")
@click.option("--limit", type=click.IntRange(1), default=LIMIT, show_default=True, help="At most so many.")
@_endpoint
@_since
@connection
@common
def list_command(
    only: str | None,
    limit: int,
    endpoint: str | None,
    since_h: float | None,
    as_json: bool,
    **urls: str | None,
) -> None:
    """Events, the newest first."""
    count = 0
    with client_of(urls) as client:
        found = client.webhooks.list(state=only, endpoint=endpoint, since=_hours_ago(since_h))
        for each in islice(found, limit):
            count += 1
            put(each.to_json()) if as_json else put(_line(each))
    if not count:
        say("no events" + (" like that" if only or endpoint or since_h is not None else ""))
    elif count == limit:
        say(f"the newest {limit:,}; --limit shows more")


@webhooks.command()
@click.argument("event_id", metavar="EVENT")
@connection
@common
def show(event_id: str, as_json: bool, **urls: str | None) -> None:
    """One event, with its tries."""
    with client_of(urls) as client:
        found = client.webhooks.get(event_id)
    if as_json:
        put(found.to_json())
        return
    for title, value in _details(found):
        put(f"{title + ':':<10} {value}")


@webhooks.command()
@click.argument("event_ids", metavar="[EVENT]…", nargs=-1)
@click.option("--failed", is_flag=True, help="All that were given up.")
@_endpoint
@_since
@connection
@common
def replay(
    event_ids: tuple[str, ...],
    failed: bool,
    endpoint: str | None,
    since_h: float | None,
    as_json: bool,
    **urls: str | None,
) -> None:
    """Send events again, under the ids they have. Those that wait are tried now."""
    if bool(event_ids) == failed:
        raise Misconfigured("name events, or say --failed")
    with client_of(urls) as client:
        names = list(event_ids) or [
            each.id
            for each in client.webhooks.list(
                state=DeliveryState.FAILED, endpoint=endpoint, since=_hours_ago(since_h)
            )
        ]
        known = client.webhooks.replay(names)
    for name in names:
        if name not in known:
            warn(f"no event {name}")
    if as_json:
        put_json({"replayed": list(known)})
    else:
        say(f"{len(known):,} to be sent again")


@webhooks.command()
@connection
@common
def endpoints(as_json: bool, **urls: str | None) -> None:
    """Receivers that fail, or answered 410 and get nothing any more."""
    with client_of(urls) as client:
        found = client.webhooks.endpoints()
    for each in found:
        put(each.to_json()) if as_json else put(_endpoint_line(each))
    if not found:
        say("no receiver is in trouble")


@webhooks.command()
@click.argument("url", metavar="URL")
@connection
@common
def enable(url: str, as_json: bool, **urls: str | None) -> None:
    """A receiver is back: switch it on, and send what waits for it now."""
    with client_of(urls) as client:
        had, waiting = client.webhooks.enable(url)
    if as_json:
        put_json({"was_in_trouble": had, "waiting": waiting})
        return
    say(
        f"{'its troubles are forgotten' if had else 'it was in no trouble'}; {waiting:,} events are tried now"
    )
    say(f"those that were given up: gristmill webhooks replay --failed --endpoint {url}")


@webhooks.command()
@click.argument("url", metavar="URL")
@click.option(
    "--timeout-s", type=click.FloatRange(0), default=60.0, show_default=True, help="How long to wait."
)
@connection
@common
def test(url: str, timeout_s: float, as_json: bool, **urls: str | None) -> None:
    """Send an event of the type webhook.test the way all others go: once, by a worker or a keeper."""
    with client_of(urls) as client:
        found = client.webhooks.test(url, timeout_s)
    if as_json:
        put(found.to_json())
    else:
        last = found.log[-1]
        say(f"delivered: {found.endpoint} answered {last.status} after {last.ms:,} ms")


@webhooks.command()
def secret() -> None:
    """Make a secret. Receivers check with it what workers and keepers sign with it."""
    put(new_secret())


@webhooks.command()
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=8099, show_default=True, help="0: any free one."
)
@click.option(
    "--answer", "status", type=click.IntRange(200, 599), default=204, help="Another status than 204."
)
@common
def listen(host: str, port: int, status: int, as_json: bool) -> int:
    """Receive webhooks, check their signatures, print them. Ctrl-C ends it.

    The secret is GRISTMILL_WEBHOOK_SECRET; without one it makes one, and says how to use it.
    """
    from .listener import Listener, Received

    settings = load_producer_settings()
    given = settings.webhook_secret.get_secret_value() if settings.webhook_secret else new_secret()
    try:
        keys = [secret_key(one) for one in given.split()]
    except ValueError as exc:
        raise Misconfigured(f"GRISTMILL_WEBHOOK_SECRET: {exc}") from exc

    def on_received(received: Received) -> None:
        if received.event is None:
            warn(f"{received.path}: {received.why}; answered 401")
        elif as_json:
            put_json(received.event)
        else:
            event = received.event
            put(f"{event.get('id')}  {event.get('type')}  {event.get('data')}")

    listener = Listener(host, port, keys, on_received, status)
    with Interrupts(listener.close) as interrupts:
        say(f"listening: http://{f'[{host}]' if ':' in host else host}:{listener.port}/")
        if settings.webhook_secret is None:
            say("  start workers with:")
            say(f"  export GRISTMILL_WEBHOOK_SECRET={given}")
            say(f"  export GRISTMILL_WEBHOOK_ALLOW={host}")
        while not interrupts.stopping:
            time.sleep(POLL_S)
        listener.close()
    return interrupts.exit_code


def _hours_ago(hours: float | None) -> float | None:
    return None if hours is None else time.time() - 3600 * hours


def _line(found: WebhookDelivery) -> str:
    tail = f"next {core.local_time(found.next_at)}" if found.next_at is not None else ""
    parts = [
        found.id,
        core.local_time(found.created_at),
        found.state,
        found.type,
        str(found.data.get("id", "")),
    ]
    return "  ".join([*parts, found.endpoint, found.why, tail]).rstrip()


def _details(found: WebhookDelivery) -> Iterator[tuple[str, Any]]:
    yield "event", found.id
    yield "type", found.type
    yield "endpoint", found.endpoint
    yield "state", f"{found.state}{f' ({found.why})' if found.why else ''}"
    yield "created", core.local_time(found.created_at)
    if found.ended_at is not None:
        yield "ended", core.local_time(found.ended_at)
    if found.next_at is not None:
        yield "next try", core.local_time(found.next_at)
    for each in found.log:
        what = "delivered" if each.code is None else f"{each.code}: {each.reason}"
        yield f"try {each.n}", f"{core.local_time(each.at)}  {each.status or '-'}  {each.ms:,} ms  {what}"
    for name, value in found.data.items():
        yield f"  {name}", value


def _endpoint_line(each: WebhookEndpoint) -> str:
    if each.disabled_at is not None:
        return f"{each.url}  switched off {core.local_time(each.disabled_at)}: a URL of it answered 410"
    held = f", next try {core.local_time(each.held_until)}" if each.held_until is not None else ""
    since = f" since {core.local_time(each.since)}" if each.since is not None else ""
    return f"{each.url}  failed {each.failures:,} times in a row{since} ({each.why}){held}"
