"""Submission: from an intake to an open batch whose segments are queued. Safe to repeat, wherever it ended.

Segments go to the result store; then the batch is opened; then each segment gets its message. Names follow
from the input alone, so a submission that was interrupted is repeated with the same command.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from ...backends.batches import Batches
from ...backends.joining import join
from ...backends.recovery import clear_end
from ...backends.segment_messages import send_segment
from ...backends.store import ResultStore
from ...schemas import keys
from ...schemas.batch import (
    Batch,
    BatchStatus,
    OpenedBatch,
    Phase,
    ResultObject,
    SegmentInfo,
    pack_lines,
    row_id,
    segment_id,
)
from ...schemas.batch_lines import OutputLine, error_line
from ..link import Link
from .answers import standing
from .check import Refusal
from .cutting import Cut, Part, Sent
from .intake import Intake, Taken

OBJECT_BYTES = 8 * 1024 * 1024
UPLOADS = 4
"""Segments on their way to the store, and in memory."""
SENT_AT_ONCE = 50
ALL = 1_000_000
CLIENT = "client"
Kind = Literal["output", "errors"]
DAY_S = 86_400.0


@dataclass(slots=True)
class Uploaded:
    """What of a batch lies in the store."""

    segments: list[SegmentInfo] = field(default_factory=list[SegmentInfo])
    objects: list[ResultObject] = field(default_factory=list[ResultObject])
    """Of rows that no worker need look at."""
    parts: list[Part] = field(default_factory=list[Part])
    """The segments' estimates, in order."""


class Submission:
    """One batch of one input. Raises StoreUnavailable, BrokerUnavailable, Misconfigured: repeat it then."""

    def __init__(self, link: Link, intake: Intake, batch: Batch) -> None:
        self._link, self._intake, self.batch = link, intake, batch
        self.known = standing(link, batch.id)
        """Where it stood before, if it was submitted before. Its files may have outlived its record: a second
        output would not fit where the first one lies."""

    @property
    def _batches(self) -> Batches:
        return self._link.state.batches

    def run(self, taken: Taken | None = None, own: OwnRows | None = None) -> Uploaded:
        """Everything. ``taken`` says of a row that ``own`` has its answer."""
        uploaded = self.upload(taken, own)
        self.open(uploaded)
        return uploaded

    def upload(self, taken: Taken | None = None, own: OwnRows | None = None) -> Uploaded:
        """Segments' inputs, and the lines of rows that no worker need look at."""
        own = own or OwnRows(self._link.store, self.batch.id)
        uploaded = Uploaded()
        with ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(UPLOADS, thread_name_prefix="upload"))
            under_way: deque[Future[SegmentInfo]] = deque()
            for each in self._intake.cuts(own.refuse, taken):
                uploaded.parts.append(each.part)
                under_way.append(pool.submit(self._put, each))
                if len(under_way) >= UPLOADS:
                    uploaded.segments.append(under_way.popleft().result())
            uploaded.segments += [each.result() for each in under_way]
        uploaded.objects = own.close()
        return uploaded

    def open(self, uploaded: Uploaded) -> None:
        """Make the batch known, and have its segments validated."""
        if self.known is None:
            self._open(uploaded)
        else:  # rows that were answered when it was opened are in no segment, and need not be answered now
            self._join(self._opened_with())
        self._join(uploaded.objects)
        if self.known is None or self.known.status is BatchStatus.VALIDATING:
            self._send()

    def _open(self, uploaded: Uploaded) -> None:
        clear_end(self._batches, self._link.store, self.batch.id)
        opened = OpenedBatch(
            batch=self.batch, segments=tuple(uploaded.segments), objects=tuple(uploaded.objects)
        )
        self._replace(keys.batch_file(self.batch.id, "batch.json"), opened.to_json().encode())
        self._batches.open(self.batch, uploaded.segments)

    def _opened_with(self) -> Sequence[ResultObject]:
        body = self._link.store.get(keys.batch_file(self.batch.id, "batch.json"))
        return () if body is None else OpenedBatch.from_json(body).objects

    def _join(self, objects: Sequence[ResultObject]) -> None:
        """None joins that is too late: the batch is past taking anything."""
        for each in objects:
            if not join(self._batches, self._link.store, self.batch.id, each, CLIENT):
                return

    def _send(self) -> None:
        """A message for each segment that has none. A keeper would do it half a minute later.

        One that asks again meanwhile, since the batch was paused, is a keeper's to send once that goes on.
        """
        unsent = list(self._batches.unsent(self.batch.id, ALL).items())  # in the order in which they asked
        for start in range(0, len(unsent), SENT_AT_ONCE):
            page = dict(unsent[start : start + SENT_AT_ONCE])
            for each in page:
                send_segment(self._link.app, self.batch, each, Phase.VALIDATE)
            self._batches.sent(self.batch.id, page)

    def _put(self, cut: Cut) -> SegmentInfo:
        """A segment's input."""
        name = segment_id(self.batch.id, cut.number)
        target = keys.segment_object(name)
        if self.known is None:
            self._replace(target, b"".join(self._lines(cut.rows)))
        return SegmentInfo(id=name, input=target, rows=len(cut.rows), first=cut.first, last=cut.last)

    def _replace(self, target: str, body: bytes) -> None:
        """What an earlier try, or an earlier life, has left is replaced, unless the batch is open by now:
        somebody else submits the same, and a worker may be about to read it.
        """
        store = self._link.store
        if not store.put_new(target, body) and self._batches.get(self.batch.id) is None:
            store.remove(target)
            store.put_new(target, body)

    def _lines(self, rows: list[Sent]) -> Iterator[bytes]:
        """Jobs as JSON, a line each: the spooled body behind what the batch says."""
        now = time.time()
        same = {
            "model": self.batch.model,
            "submitted_at": now,
            "expires_at": now + self.batch.completion_window_s + DAY_S,
        }
        shared = json.dumps(same, separators=(",", ":"))[1:-1]
        for each in rows:
            own = {"v": 1, "id": row_id(self.batch.id, each.row.line), "custom_id": each.row.custom_id}
            if each.copy_of is not None:
                own["copy_of"] = row_id(self.batch.id, each.copy_of)
            head = json.dumps(own, ensure_ascii=False, separators=(",", ":"))[:-1]
            yield f"{head},{shared},".encode() + each.row.body[1:] + b"\n"


class OwnRows:
    """Lines of rows that end without a worker: refused ones, and those whose answers are known already.

    They come in the order of the input, and are written as objects of at most some MiB.
    """

    def __init__(self, store: ResultStore, batch_id: str) -> None:
        self._store, self._batch_id = store, batch_id
        self._attempt = time.time_ns() // 1_000_000
        self._objects: list[ResultObject] = []
        self._open = {"output": _Buffer(), "errors": _Buffer()}

    def refuse(self, refusal: Refusal) -> None:
        """A row that is not valid."""
        line = error_line(row_id(self._batch_id, refusal.line), refusal.custom_id, refusal.error)
        self._add("errors", refusal.line, line)

    def answer(self, number: int, line: OutputLine) -> None:
        """A row whose answer is known."""
        self._add("output", number, line)

    def close(self) -> list[ResultObject]:
        """Write what is left; all objects."""
        self._write("output")
        self._write("errors")
        return self._objects

    def _add(self, kind: Kind, number: int, line: OutputLine) -> None:
        buffer = self._open[kind]
        buffer.lines.append(number)
        buffer.data += line.to_line()
        if len(buffer.data) >= OBJECT_BYTES:
            self._write(kind)

    def _write(self, kind: Kind) -> None:
        buffer, self._open[kind] = self._open[kind], _Buffer()
        if not buffer.lines:
            return
        body = bytes(buffer.data)
        owner = f"{self._batch_id}.{CLIENT}"
        name = keys.rows_object(owner, self._attempt, len(self._objects), kind)
        self._store.put_new(name, body)
        self._objects.append(
            ResultObject(
                segment=CLIENT,
                kind=kind,
                name=name,
                rows=len(buffer.lines),
                bytes=len(body),
                sha256=hashlib.sha256(body).hexdigest(),
                lines=pack_lines(buffer.lines),
            )
        )


@dataclass(slots=True)
class _Buffer:
    lines: list[int] = field(default_factory=list[int])
    data: bytearray = field(default_factory=bytearray)
