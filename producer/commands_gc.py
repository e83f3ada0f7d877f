"""`gristmill gc`: take away what is old in the result store."""

from __future__ import annotations

import time
from collections import Counter

import click

from ..schemas.settings import load_settings
from .console import common, connection, put, put_json, say
from .link import Link

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
HELP = """Take away what is old in the result store: batches, uploads that never ended, results if asked for.

A batch goes with all its files when its retention is over (30 days after its end unless it said otherwise).
Results of single jobs stay for ever unless --results-older-than or GRISTMILL_RESULTS_KEEP_S says otherwise.
Run it from cron; nothing else removes objects.

\b
Examples:
  gristmill gc --dry-run
  gristmill gc --results-older-than 30d
"""


class _Age(click.ParamType[float]):
    """Seconds, from ``90``, ``15m``, ``12h``, ``30d``."""

    name = "age"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
        try:
            seconds = float(number) * UNITS[unit]
        except ValueError:
            seconds = 0.0
        if not 0 < seconds <= 1e9:
            self.fail(f"{text!r} is no age; write 15m, 12h or 30d", param, ctx)
        return seconds


@click.command(help=HELP)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--results-older-than", "results_keep_s", type=_Age(), metavar="AGE", help="Such as 30d.")
@connection
@common
def gc(dry_run: bool, as_json: bool, **options: str | float | None) -> None:
    """Find, say, take away."""
    from ..backends.retention import find_old, remove

    settings = load_settings(**options)
    link = Link(settings)
    objects, size, kinds = 0, 0, Counter[str]()
    try:
        for old in find_old(link.store, link.state, settings, time.time()):
            if not dry_run:
                remove(link.store, old)
            objects, size = objects + old.objects, size + old.size
            kinds[old.kind] += 1
            days = old.age_s / UNITS["d"]
            if as_json:
                fields = {"kind": old.kind, "name": old.name, "objects": old.objects, "bytes": old.size}
                put_json({**fields, "age_s": round(old.age_s), "why": old.why, "removed": not dry_run})
            else:
                held = f"{old.objects:,} objects, {old.size:,} bytes, {days:.1f} days"
                put(f"{old.kind:<9} {old.name}  {held}: {old.why}")
    finally:
        link.close()
    if as_json:
        put_json(
            {
                "kind": "total",
                "found": kinds.total(),
                "objects": objects,
                "bytes": size,
                "removed": not dry_run,
            }
        )
    what = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items())) or "nothing"
    say(f"{'would go' if dry_run else 'gone'}: {what}; {objects:,} objects, {size:,} bytes")
