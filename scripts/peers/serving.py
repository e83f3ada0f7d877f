"""What every peer's process does: load, then time what it is given. It runs in the peer's own environment.

One JSON line in, one out; a library's own prints go to stderr.
  {"rows": [[prompt ids, tokens wanted], …]}   → {"seconds": …, "tokens": …}     all there at once
  {"row": [prompt ids, tokens wanted]}         → {"times_s": [of each token, from the start of the request]}
Before the first answer: {"ready": {settings and versions}}.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

Row = tuple[Sequence[int], int]


class Peer(Protocol):
    """Greedy, exact lengths, end tokens ignored."""

    about: dict[str, Any]
    """Versions and settings, as they were in force."""

    def batch(self, rows: Sequence[Row]) -> int:
        """Run all, and say how many tokens came out."""
        ...

    def single(self, row: Row) -> Iterator[None]:
        """Run one, and yield as each token is known."""
        ...


def serve(load: Callable[[], Peer]) -> None:
    """Answer until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    peer = load()
    say({"ready": peer.about})
    for line in sys.stdin:
        asked = json.loads(line)
        started = time.monotonic()
        if "row" in asked:
            times = [time.monotonic() - started for _ in peer.single(asked["row"])]
            say({"times_s": times, **memory()})
        else:
            tokens = peer.batch(asked["rows"])
            say({"seconds": time.monotonic() - started, "tokens": tokens, **memory()})


def memory() -> dict[str, float]:
    """Peak GiB of this process, or of one it has started if that took more: engines are often processes.

    Not getrusage's: that begins with what the parent had when it forked, and knows no child that still runs.
    """
    return {"peak_gib": round(max(peak_kib(each) for each in family(os.getpid())) / 1024**2, 2)}


def family(pid: int) -> Iterator[int]:
    yield pid
    for child in children(pid):
        yield from family(child)


def children(pid: int) -> list[int]:
    """Of all its threads."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found += map(int, (thread / "children").read_text().split())
    return found


def peak_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # it has ended meanwhile
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def threads() -> int:
    return int(os.environ["BENCH_THREADS"])
