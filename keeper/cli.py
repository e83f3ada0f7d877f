"""`gristmill-keeper`: ends what nobody runs, and sweeps up. Beside workers, or where there are none."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
from typing import Any

import click

from ..backends import logs
from .settings import KeeperSettings, load_keeper_settings

HELP = """End jobs that nobody runs: expired, cancelled, dead-lettered; send webhooks. Any may run; one leads.

Workers bring a keeper along, so this one is for fleets that scale to zero.

\b
Examples:
  gristmill-keeper --broker redis://queue:6379/0 --results s3://bucket/results
  gristmill-keeper --once          # one look, for cron; exit code 75 if the broker does not answer
"""


@click.command(help=HELP)
@click.version_option(package_name="gristmill")
@click.option("--broker", "broker_url", help="redis(s)://…, unix://…, embedded:DIR, sqs://.")
@click.option("--state", "state_url", help="Redis for logs and state; default: the broker.")
@click.option("--results", "results_url", help="file:///dir or s3://bucket/prefix.")
@click.option("--once", is_flag=True, help="Do what there is to do, and leave.")
@click.option("--every-s", "keeper_every_s", type=float, help="How often to look; default 1.")
@click.option("--health-host", help="Where the health page listens; default 127.0.0.1.")
@click.option("--health-port", "keeper_health_port", type=int, help="Serve /health and /metrics there.")
@click.option("--log-format", type=click.Choice(["text", "json"]))
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--debug", is_flag=True, help="Show a trace when something fails.")
def cli(once: bool, debug: bool, **flags: Any) -> None:
    """Read the settings, then go round."""
    with logs.last_words(debug=debug):
        settings = load_keeper_settings(**flags)
        logs.install(settings.log_format, settings.log_level)
        code = _once(settings) if once else _forever(settings)
    sys.exit(code)


def keeper_id() -> str:
    """Of this process: who leads is known by it."""
    from .keeper import ID_PREFIX

    return f"{ID_PREFIX}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


def _once(settings: KeeperSettings) -> int:
    """Whether another keeper leads does not matter for one look."""
    from .keeper import open_keeper  # slow: only once the settings are right

    with open_keeper(settings, keeper_id()) as keeper:
        while keeper.round().full:
            pass
        keeper.settle()
        if keeper.courier is not None:
            keeper.courier.drain()
    return 0


def _forever(settings: KeeperSettings) -> int:
    from .health import HealthPage
    from .keeper import open_keeper

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    with open_keeper(settings, keeper_id()) as keeper:
        page = None
        if settings.keeper_health_port is not None:
            page = HealthPage(settings.health_host, settings.keeper_health_port, keeper)
        try:
            keeper.run(stop)
        finally:
            if page is not None:
                page.stop()
    return 0


def main() -> None:
    """Console entry point."""
    cli()


if __name__ == "__main__":
    main()
