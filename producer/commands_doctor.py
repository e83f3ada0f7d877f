"""`gristmill doctor`."""

from __future__ import annotations

import click

from ..schemas.settings import load_settings
from .console import common, connection, put, put_json
from .doctor import Check, examine, exit_code

HELP = """What is installed, reachable and missing, and the next step. Exit code 0: usable.

\b
Examples:
  gristmill doctor
  gristmill doctor --json | jq 'select(.verdict != "ok")'
  GRISTMILL_BROKER_URL=redis://queue:6379/0 gristmill doctor
"""
MARKS = {
    "ok": ("ok", "green"),
    "warning": ("!", "yellow"),
    "bad_input": ("x", "red"),
    "try_again": ("x", "red"),
}


@click.command(help=HELP)
@connection
@common
def doctor(as_json: bool, **urls: str | None) -> int:
    """One line a check."""
    checks: list[Check] = []
    for check in examine(load_settings(**urls)):
        checks.append(check)
        if as_json:
            put_json(check.to_dict())
            continue
        mark, colour = MARKS[check.verdict]
        put(f"{click.style(f'{mark:<3}', fg=colour)}{check.name + ':':<10} {check.text}")
        if check.next_step is not None:
            put(f"{'':<13} → {check.next_step}")
    return exit_code(checks)
