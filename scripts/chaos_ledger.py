"""What the processes of a chaos run wrote down of themselves: tokens sampled and fed, claims, results.

The lines are described in ``tests/support/faultpoints/sitecustomize.py``. Each is written before anybody else
can learn of what it says (tokens) or right after it was done (claims, results), so a kill hides nothing that
had an effect, but for the one line that the victim was about to write.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Line = tuple[float, int, dict[str, Any]]


@dataclass
class Ledger:
    """All processes' lines, in order of time, added up."""

    claims: dict[str, list[tuple[float, int]]] = field(default_factory=lambda: defaultdict(list))
    """By job: when, and by which process."""
    puts: Counter[str] = field(default_factory=Counter[str])
    """Objects created, by job."""
    finals: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens: int = 0
    """Places in the outputs of all jobs that were sampled."""
    resampled: int = 0
    """Samplings of a place that had been sampled before."""
    fed: int = 0
    """Tokens that went through the model."""
    refed: int = 0
    """Of these: tokens that a request brought along, prompt or output so far, fed before for the same job."""

    room: dict[int, list[tuple[float, bool]]] = field(default_factory=lambda: defaultdict(list))
    """By process: when it began to have room for another job, and when it had none any more."""

    @classmethod
    def read(cls, directory: Path) -> Ledger:
        ledger = cls()
        base: dict[tuple[int, str], int] = {}
        highest: dict[str, int] = defaultdict(int)
        places: dict[str, set[int]] = defaultdict(set)
        for at, pid, line in sorted(_lines(directory), key=lambda line: line[0]):
            if "claim" in line:
                ledger.claims[line["claim"]].append((at, pid))
            elif "put" in line:
                ledger.puts[Path(line["put"]).stem] += 1
            elif "final" in line:
                ledger.finals[line["final"]].append(at)
            elif "room" in line:
                ledger.room[pid].append((at, line["room"]))
            for request_id, tokens in line.get("add", ()):
                base[pid, request_id] = tokens
            for request_id, start, count, sampled in line.get("step", ()):
                job, end = request_id.partition("@")[0], start + count
                ledger.fed += count
                ledger.refed += max(0, min(end, base[pid, request_id], highest[job]) - start)
                highest[job] = max(highest[job], end)
                for place in range(end, end + sampled):
                    ledger.resampled += place in places[job]
                    places[job].add(place)
        ledger.tokens = sum(map(len, places.values()))
        return ledger

    def has_room(self, pid: int, at: float) -> bool:
        """By what the process said last. One that never says anything always has."""
        said = [room for since, room in self.room.get(pid, ()) if since <= at]
        return said[-1] if said else pid not in self.room

    def taken_over(self, pid: int, died_at: float) -> list[tuple[str, float]]:
        """The jobs in the hands of ``pid`` at its death, and when each was claimed again."""
        found: list[tuple[str, float]] = []
        for job, claims in self.claims.items():
            before = [claim for claim in claims if claim[0] <= died_at]
            after = [at for at, _ in claims if at > died_at]
            ended = any(at <= died_at for at in self.finals[job])
            if before and before[-1][1] == pid and after and not ended:
                found.append((job, after[0]))
        return found


def _lines(directory: Path) -> Iterator[Line]:
    for file in directory.glob("*.jsonl"):
        pid = int(file.name.split(".")[0])
        for text in file.read_text().splitlines():
            with suppress(json.JSONDecodeError):  # the machine's disk is full, say: the rest still counts
                line = json.loads(text)
                yield line["t"], pid, line
