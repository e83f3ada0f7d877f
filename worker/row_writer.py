"""RowWriter: finished rows of a segment into objects, and these into their batch."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

from ..backends.batches import Accepted, Batches, Refused
from ..backends.store import ResultStore
from ..schemas import keys
from ..schemas.batch import ResultObject, RowTimes, pack_lines, ttft_bin
from ..schemas.job import JobState
from ..schemas.result import Timings, Usage
from .patience import Patience

log = logging.getLogger(__name__)

Kind = Literal["output", "errors"]
CLOSE_BYTES = 8 * 1024 * 1024
CLOSE_ROWS = 10_000
"""One script sets all their bits."""
CLOSE_S = 10.0
MAX_BEHIND = 3
"""Batches of objects that may wait for the store; then no more rows are begun."""


class Ended(NamedTuple):
    """A finished row."""

    line: int
    body: bytes
    """Its line of the output, or of the errors."""
    state: JobState
    usage: Usage
    times: Timings | None = None
    """Of a row whose tokens were all made in this attempt."""


@dataclass(slots=True)
class _Pile:
    """Rows for the next objects."""

    rows: list[Ended] = field(default_factory=list[Ended])
    size: int = 0
    since: float = 0.0


class RowWriter:
    """Order of effects: object, create-only → ``accept`` → its rows' logs are gone. Dying in between leaves
    an object that belongs to nothing, and logs from which the next attempt makes its rows' lines again.

    ``add`` is called by the segment's thread alone; a thread of the writer's own writes. ``patiently``
    repeats a call until the other side answers, and returns None if we close.
    """

    def __init__(
        self,
        segment_id: str,
        attempt: int,
        *,
        batches: Batches,
        store: ResultStore,
        patiently: Patience,
        on_answer: Callable[[Accepted | None], None],
        close_s: float = CLOSE_S,
    ) -> None:
        self._segment_id, self._attempt = segment_id, attempt
        self._batches, self._store = batches, store
        self._patiently, self._on_answer = patiently, on_answer
        self._close_s = close_s
        self._pile = _Pile()
        self._piles: list[_Pile] = []
        self._changed = threading.Condition()
        self._number = 0
        self._stopped = False
        self._thread: threading.Thread | None = None

    def add(self, row: Ended) -> None:
        """Take a finished row."""
        if not self._pile.rows:
            self._pile.since = time.monotonic()
        self._pile.rows.append(row)
        self._pile.size += len(row.body)
        if self._pile.size >= CLOSE_BYTES or len(self._pile.rows) >= CLOSE_ROWS:
            self.close_pile()

    def due_in(self) -> float | None:
        """Seconds until what was added must be written; None: nothing was."""
        if not self._pile.rows:
            return None
        return max(0.0, self._pile.since + self._close_s - time.monotonic())

    def close_pile(self) -> None:
        """Write what was added so far, as soon as possible."""
        if not self._pile.rows:
            return
        with self._changed:
            self._piles.append(self._pile)
            self._pile = _Pile()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="row-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def full(self) -> bool:
        """The store is behind: begin no more rows."""
        return len(self._piles) >= MAX_BEHIND

    @property
    def idle(self) -> bool:
        """Everything that was added has joined."""
        return not self._piles and not self._pile.rows

    def stop(self) -> None:
        """End the thread; what has not joined is in the rows' logs. A write under way goes on."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    # ---- its thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._piles or self._stopped)
                if self._stopped:
                    return
                pile = self._piles[0]
            answer = self._write(pile.rows)
            if isinstance(answer, bool):  # we close
                return
            if answer is None:  # these never join: not idle for a moment, which would look like the end
                self._on_answer(None)
                return
            with self._changed:
                del self._piles[0]
            self._on_answer(answer)

    def _write(self, rows: list[Ended]) -> Accepted | Literal[False] | None:
        """None: fenced. False: we close."""
        rows = sorted(rows)
        while True:
            objects = [(self._describe(kind, some), some) for kind, some in _kinds(rows)]
            self._number += 1
            for described, some in objects:
                body = b"".join(row.body for row in some)
                if self._patiently(partial(self._put, described.name, body)) is None:
                    return False
            answer = self._patiently(partial(self._accept, [described for described, _ in objects]))
            if answer is None:
                return False
            if isinstance(answer, Refused):
                rows = self._without(answer, rows, [described.name for described, _ in objects])
                continue
            return answer if isinstance(answer, Accepted) else None

    def _accept(self, objects: list[ResultObject]) -> Accepted | Refused | Literal[False]:
        return self._batches.accept(self._segment_id, self._attempt, objects) or False

    def _put(self, name: str, body: bytes) -> bool:
        self._store.put_new(name, body)  # False: we did so before, and the answer was lost
        return True

    def _describe(self, kind: Kind, rows: Sequence[Ended]) -> ResultObject:
        digest = hashlib.sha256()
        for row in rows:
            digest.update(row.body)

        def those(state: JobState) -> str:
            return pack_lines([row.line for row in rows if row.state is state])

        return ResultObject(
            segment=self._segment_id,
            attempt=self._attempt,
            kind=kind,
            name=keys.rows_object(self._segment_id, self._attempt, self._number, kind),
            rows=len(rows),
            bytes=sum(len(row.body) for row in rows),
            sha256=digest.hexdigest(),
            lines=pack_lines([row.line for row in rows]),
            cancelled=those(JobState.CANCELLED),
            expired=those(JobState.EXPIRED),
            usage=Usage(
                prompt_tokens=sum(row.usage.prompt_tokens for row in rows),
                completion_tokens=sum(row.usage.completion_tokens for row in rows),
                cached_tokens=sum(row.usage.cached_tokens for row in rows),
            ),
            times=_times(rows),
        )

    def _without(self, refused: Refused, rows: list[Ended], names: list[str]) -> list[Ended]:
        """What is left; the objects that held more are nobody's."""
        log.warning("rows.refused", extra={"segment": self._segment_id, "rows": len(refused.lines)})
        for name in names:
            self._patiently(partial(self._removed, name))
        return [row for row in rows if row.line not in refused.lines]

    def _removed(self, name: str) -> bool:
        self._store.remove(name)
        return True


def _times(rows: Sequence[Ended]) -> RowTimes | None:
    told = [
        (times.started_at, times.first_token_at, times.finished_at, row.usage.completion_tokens)
        for row in rows
        if (times := row.times) and times.started_at is not None and times.first_token_at is not None
    ]
    if not told:
        return None
    return RowTimes(
        first_token_at=min(first for _, first, _, _ in told),
        finished_at=max(finished for _, _, finished, _ in told),
        completion_tokens=sum(tokens for _, _, _, tokens in told),
        ttft=Counter(str(ttft_bin(first - started)) for started, first, _, _ in told),
    )


def _kinds(rows: list[Ended]) -> list[tuple[Kind, list[Ended]]]:
    good = [row for row in rows if row.state is JobState.SUCCEEDED]
    bad = [row for row in rows if row.state is not JobState.SUCCEEDED]
    kinds: list[tuple[Kind, list[Ended]]] = [("output", good), ("errors", bad)]
    return [(kind, some) for kind, some in kinds if some]
