"""Batches: many rows as one, in Redis. START HERE for a batch's life on the state server.

``open`` → segments are claimed and ``validated`` → ``begin`` → claimed again, rows begun, objects
``accept``ed → all rows have ended → ``begin_finalize`` → ``complete``. Every change is one script in
``lua/``. A row's bit is set by ``accept`` alone, and counts and usage are summed there, so that they are
exact at all times. What a worker writes is fenced by its segment's attempt as a job's is by its own.

Every method raises BrokerUnavailable while the server does not answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from ..schemas import keys
from ..schemas.batch import (
    Batch,
    BatchStatus,
    LineProblem,
    LineSet,
    ResultObject,
    SegmentInfo,
    batch_of,
    row_of,
    unpack_lines,
)
from ..schemas.events import EntryId
from ..schemas.result import ErrorInfo
from ..schemas.status import JobStatus
from . import batch_calls
from .batch_calls import (
    Accepted,
    BatchEntry,
    DueBatch,
    NoClaim,
    Refused,
    RowStanding,
    SegmentClaim,
    Standing,
)
from .calls import Call, Entry, Resubscribed

__all__ = [
    "Accepted",
    "BatchEntry",
    "BatchSubscription",
    "Batches",
    "DueBatch",
    "NoClaim",
    "Refused",
    "RowStanding",
    "SegmentClaim",
    "Standing",
]

T = TypeVar("T")
PAGE = 500


class _Run(Protocol):
    """How a call is carried out."""

    def __call__(self, call: Call[T], /) -> T: ...


class _Channel(Protocol):
    """A subscription: see ``state.Subscription``."""

    def __enter__(self) -> Any: ...
    def __exit__(self, *exc: object) -> None: ...
    def get_raw(self, timeout_s: float) -> dict[str, Any] | None: ...


class Batches:
    """For threads, beside ``State``, whose connection it uses: ``state.batches``."""

    def __init__(self, run: _Run, subscribe: Callable[[str], _Channel]) -> None:
        self._run, self._subscribe = run, subscribe

    # ---- a batch's life

    def open(self, batch: Batch, segments: Sequence[SegmentInfo]) -> bool:
        """Make it known. Its segments' messages are the caller's to send: see ``sent``. False: it is known
        already.

        Raises IdempotencyConflict if it is known with another description.
        """
        return self._run(batch_calls.open_batch(batch, segments))

    def get(self, batch_id: str) -> Batch | None:
        """Where it stands. None: unknown, or its time is over."""
        return self._run(batch_calls.get(batch_id))

    def list(self, after: str | None = None, limit: int = 20) -> list[Batch]:
        """The newest first, from behind ``after`` on."""
        found: list[Batch] = []
        while len(found) < limit:
            ids = self._run(batch_calls.list_batches(after, limit))
            if not ids:
                break
            records = [(batch_id, self.get(batch_id)) for batch_id in ids]
            found += [record for _, record in records if record is not None]
            after = ids[-1]
            if gone := [batch_id for batch_id, record in records if record is None and batch_id != after]:
                self._run(batch_calls.forget(gone))
        return found[:limit]

    def forget_gone(self, after: str | None, limit: int) -> str | None:
        """Take those whose records have gone off the list: of the next ``limit``, the newest first.

        Returns where to go on; None: from the first again.
        """
        ids = self._run(batch_calls.list_batches(after, limit))
        there = [batch_id for batch_id in ids if self._run(batch_calls.exists(batch_id))]
        if gone := set(ids).difference(there):
            self._run(batch_calls.forget(list(gone)))
        return there[-1] if there and len(ids) == limit else None

    def begin(self, batch: Batch) -> BatchStatus | None:
        """Once all its segments were validated: let it run (they need messages then), or fail, or stop, since
        as many rows were refused as may fail. Safe to repeat.

        Returns its status. None: unknown.
        """
        return self._run(batch_calls.begin(batch, batch.options.retention_s))

    def cancel(self, batch_id: str, reason: ErrorInfo | None = None) -> BatchStatus:
        """Ask for a stop; returns the status as it is now. Raises JobNotFound."""
        return self._run(batch_calls.cancel(batch_id, reason))

    def cancel_row(self, batch_id: str, line: int) -> bool:
        """Ask for one row to be stopped. False: it has ended. Raises JobNotFound."""
        return self._run(batch_calls.cancel_row(batch_id, line))

    def pause(self, batch_id: str) -> BatchStatus:
        """Start no more rows; those that run go on. Raises JobNotFound."""
        return self._run(batch_calls.pause(batch_id, paused=True))

    def resume(self, batch_id: str) -> BatchStatus:
        """Go on. Raises JobNotFound."""
        return self._run(batch_calls.pause(batch_id, paused=False))

    def delete(self, batch_id: str) -> bool:
        """Forget it at once. Its objects stay. False: unknown."""
        return self._run(batch_calls.delete(batch_id))

    # ---- a segment's

    def claim_segment(self, segment_id: str, worker_id: str) -> SegmentClaim | NoClaim:
        """Begin an attempt, and fence all earlier ones."""
        return self._run(batch_calls.claim(segment_id, worker_id))

    def begin_rows(
        self, segment_id: str, attempt: int, worker_id: str, lines: Sequence[int]
    ) -> list[list[Entry]] | None:
        """Begin to run these rows. Returns of each what its log had before this attempt. None: fenced."""
        return self._run(batch_calls.begin_rows(segment_id, attempt, worker_id, lines))

    def validated(
        self,
        segment_id: str,
        attempt: int,
        *,
        rows: int,
        tokens: int,
        problems: Sequence[LineProblem],
        count: int,
        told: int,
    ) -> bool:
        """``rows`` are valid, with ``tokens`` of prompts; ``problems`` are the first of ``count``, and the
        batch tells the first ``told`` of all. False: fenced.
        """
        return self._run(
            batch_calls.validated(
                segment_id, attempt, rows=rows, tokens=tokens, problems=problems, count=count, told=told
            )
        )

    def accept(
        self, segment_id: str, attempt: int, objects: Sequence[ResultObject]
    ) -> Accepted | Refused | None:
        """Let objects of finished rows, which are in the store, join the batch: all or none. None: fenced."""
        return self._run(batch_calls.accept(batch_of(segment_id), segment_id, attempt, objects))

    def add(
        self, batch_id: str, objects: Sequence[ResultObject], token: str = ""
    ) -> Accepted | Refused | None:
        """The same of rows that no worker ends: the client's, until the batch is made final, and with the
        ``token`` of ``begin_finalize`` a keeper's. None: it is not theirs to say (any more).
        """
        return self._run(batch_calls.accept(batch_id, "", token, objects))

    def split(self, segment_id: str, attempt: int, kept: SegmentInfo, given: SegmentInfo) -> bool:
        """Give unstarted rows away as segment ``given``, which a keeper sends. False: fenced."""
        return self._run(batch_calls.split(segment_id, attempt, kept, given))

    def release(self, segment_id: str, attempt: int, running: Sequence[int], *, unsent: bool = False) -> bool:
        """Hand it back; ``running``: lines whose logs go on elsewhere. ``unsent``: the message will be
        acknowledged, and a keeper has to send another. False: it is not this attempt's any more.
        """
        return self._run(batch_calls.release(segment_id, attempt, running, unsent=unsent))

    def end_segment(self, segment_id: str, attempt: int) -> bool:
        """It needs nothing more. False: fenced."""
        return self._run(batch_calls.end_segment(segment_id, attempt))

    def standing(self, batch_id: str) -> Standing:
        """What who runs its rows must know."""
        return self._run(batch_calls.standing(batch_id))

    def segments(self, batch_id: str) -> list[SegmentInfo]:
        """All of them, in no order."""
        return self._run(batch_calls.segments(batch_id))

    def unsent(self, batch_id: str, limit: int = 100) -> dict[str, int]:
        """Some of the segments that need a message; each with a mark, for ``sent``."""
        return self._run(batch_calls.unsent(batch_id, limit))

    def sent(self, batch_id: str, marks: Mapping[str, int]) -> None:
        """These have the one that ``unsent`` told of. What has asked for another since still needs that: a
        message may be used up before its sender comes to say that it is sent.
        """
        if marks:
            self._run(batch_calls.sent(batch_id, marks))

    # ---- for keepers

    def silent(self, batch_id: str) -> dict[str, int]:
        """Segments that need a message and should have one, and that no live worker runs; each with the last
        attempt at it. Looks at all segments.
        """
        return self._run(batch_calls.silent(batch_id))

    def ask(self, batch_id: str, attempts: Mapping[str, int]) -> int:
        """These of ``silent`` have lost their messages: they need others, but for those of which something
        has been heard since. Returns how many.
        """
        return self._run(batch_calls.ask(batch_id, attempts)) if attempts else 0

    def due(self, limit: int) -> tuple[float, list[DueBatch]]:
        """The server's time, and batches that need a look."""
        return self._run(batch_calls.due(limit))

    def defer(self, batch_id: str, until: float, *, seen_at: float) -> bool:
        """Look again then, unless something wakes you before, or has since ``seen_at``, the time of ``due``.

        Unix seconds by the server's clock. False: it is to be looked at as it stands.
        """
        return self._run(batch_calls.defer(batch_id, until, seen_at))

    def not_due(self, batch_ids: Sequence[str]) -> None:
        """Nobody need look at these."""
        if batch_ids:
            self._run(batch_calls.not_due(batch_ids))

    def expire(self, batch_id: str) -> bool:
        """Stop it if its time is up. True: it is to be made final once nobody runs rows of it."""
        return self._run(batch_calls.expire(batch_id))

    def begin_finalize(self, batch_id: str, token: str, lease_s: float) -> BatchStatus | None:
        """Take it upon oneself for ``lease_s`` to make it final: from here on no worker can add to it. Again
        with the same token prolongs that. Returns the status it has, or EXPIRED if that is what it becomes.

        None: it is not ready for that, or somebody else does it.
        """
        return self._run(batch_calls.begin_finalize(batch_id, token, lease_s))

    def complete(
        self,
        batch: Batch,
        token: str,
        *,
        output: str | None = None,
        error_output: str | None = None,
        manifest: str | None = None,
    ) -> BatchStatus | None:
        """Its files stand: make it final. Safe to repeat. None: it is somebody else's by now."""
        return self._run(
            batch_calls.complete(
                batch.id,
                token,
                batch.options.retention_s,
                output=output,
                error_output=error_output,
                manifest=manifest,
            )
        )

    def trouble(self, batch_id: str, what: ErrorInfo) -> bool:
        """Its files cannot be made until a person mends this; its record says so until they are. False: it is
        final, or unknown.
        """
        return self._run(batch_calls.trouble(batch_id, what))

    def object_count(self, batch_id: str) -> int:
        """How many objects of it were accepted."""
        return self._run(batch_calls.object_count(batch_id))

    def objects(self, batch_id: str, start: int = 0) -> Iterator[ResultObject]:
        """Accepted ones, in order, but for the first ``start``; those that join meanwhile included."""
        while page := self._run(batch_calls.objects(batch_id, start, PAGE)):
            yield from page
            start += len(page)

    def ended(self, batch_id: str) -> LineSet:
        """The rows that are in accepted objects."""
        return self._run(batch_calls.ended(batch_id))

    # ---- one row

    def row(self, job_id: str) -> JobStatus | None:
        """As ``State.status``, of a row. None: nothing is known of it."""
        found = row_of(job_id)
        where = None if found is None else self._run(batch_calls.row(*found))
        if found is None or where is None:
            return None
        if not where.ended:
            return where.status
        held = self.object_of(job_id)
        if held is None:
            return where.status
        return batch_calls.ended_as(where.status, held, found[1])

    def object_of(self, job_id: str) -> ResultObject | None:
        """The accepted object that has a row's line. None: it has not ended. Looks through them all."""
        found = row_of(job_id)
        if found is None:
            return None
        batch_id, line = found
        return next((each for each in self.objects(batch_id) if line in unpack_lines(each.lines)), None)

    # ---- events

    def read_events(self, batch_id: str, after: EntryId | None = None, count: int = 1000) -> list[BatchEntry]:
        """Up to ``count`` events after ``after`` (None: from the first)."""
        return self._run(batch_calls.read_events(batch_id, after, count))

    def subscribe(self, batch_id: str) -> BatchSubscription:
        """Live events: a context manager; what is published after entering it is not missed."""
        return BatchSubscription(self._subscribe(keys.batch_events(batch_id)))


class BatchSubscription:
    """A batch's channel. Entering it waits for the server's confirmation."""

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel

    def __enter__(self) -> BatchSubscription:
        self._channel.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._channel.__exit__(*exc)

    def get(self, timeout_s: float) -> BatchEntry | Resubscribed | None:
        """The next event; Resubscribed after a break; None: nothing within ``timeout_s``."""
        message = self._channel.get_raw(timeout_s)
        return None if message is None else batch_calls.parse_event_message(message)
