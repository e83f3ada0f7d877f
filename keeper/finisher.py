"""Finisher: makes a batch final. Rows that did not run get their error lines; then its files are assembled.

Any number of keepers may try. One holds a batch at a time, and nothing else can join it from then on; each
step is safe to repeat, so who dies on the way is followed by another once the hold has run out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

from ..backends.assemble import assemble
from ..backends.batches import Batches, Refused
from ..backends.joining import join
from ..backends.line_merge import Piece
from ..backends.object_lines import object_lines
from ..backends.store import ResultStore
from ..schemas import keys
from ..schemas.batch import Batch, BatchStatus, LineSet, OpenedBatch, ResultObject, pack_lines, row_of
from ..schemas.batch_lines import OutputLine, unfinished_line
from ..schemas.batch_manifest import BatchFile, BatchManifest
from ..schemas.errors import GristmillError, ResultsDamaged
from ..schemas.job import JobState

log = logging.getLogger(__name__)

OURS = "keeper"
ROWS_AT_ONCE = 10_000
"""In an object of rows that did not run: the server is held up for as long as it takes to set their bits."""
_ENDED = {BatchStatus.CANCELLING: JobState.CANCELLED, BatchStatus.EXPIRED: JobState.EXPIRED}
_FINAL = {
    BatchStatus.FINALIZING: BatchStatus.COMPLETED,
    BatchStatus.CANCELLING: BatchStatus.CANCELLED,
    BatchStatus.EXPIRED: BatchStatus.EXPIRED,
}


class Finisher:
    """``hold_s``: how long a keeper that fell silent keeps others from a batch."""

    def __init__(self, batches: Batches, store: ResultStore, keeper_id: str, hold_s: float) -> None:
        self._batches, self._store, self._token, self._hold_s = batches, store, keeper_id, hold_s

    def finish(self, batch_id: str) -> BatchStatus | None:
        """Make it final; returns what it is now. None: it is not ready for that, or somebody else's.

        Raises BrokerUnavailable, StoreUnavailable, Misconfigured; ResultsDamaged where a person must look.
        """
        with self._held(batch_id) as becomes:
            batch = None if becomes is None else self._batches.get(batch_id)
            if becomes is None or batch is None:
                return None
            state = _ENDED.get(becomes)
            if state is not None and not self._end_the_rest(batch, state):
                return None
            return self._complete(batch_id, becomes)

    def join_clients(self, batch_id: str, token: str = "") -> bool:
        """Rows that its client refused or answered, if it died before it said so: they are in no segment.

        ``token``: see ``Batches.add``. False: it is not ours to say. Raises as ``finish`` does.
        """
        body = self._store.get(keys.batch_file(batch_id, "batch.json"))
        objects = () if body is None else OpenedBatch.from_json(body).objects
        return all(join(self._batches, self._store, batch_id, each, OURS, token) for each in objects)

    @contextmanager
    def _held(self, batch_id: str) -> Generator[BatchStatus | None]:
        """Hold the batch until the block ends. The status that it has, or EXPIRED if it is to be that."""
        becomes = self._batches.begin_finalize(batch_id, self._token, self._hold_s)
        over = threading.Event()

        def hold_on() -> None:
            while not over.wait(self._hold_s / 3):
                try:
                    self._batches.begin_finalize(batch_id, self._token, self._hold_s)
                except GristmillError as exc:  # what is to be written after it has run out is refused
                    log.info("batch.hold_not_renewed", extra={"batch_id": batch_id, "code": exc.code})

        renewing = threading.Thread(target=hold_on, name="hold", daemon=True)
        if becomes is not None:
            renewing.start()
        try:
            yield becomes
        finally:
            over.set()

    # ---- rows that did not run

    def _end_the_rest(self, batch: Batch, state: JobState) -> bool:
        """Error lines for all rows that have not ended. False: somebody else holds the batch by now."""
        ended, stamp = self._batches.ended(batch.id), time.time_ns() // 1_000_000
        names = (keys.rows_object(f"{batch.id}.{OURS}", stamp, n, "errors") for n in count(1))
        if not self.join_clients(batch.id, self._token):
            return False
        for name in sorted({info.input for info in self._batches.segments(batch.id)}):
            rows = _unfinished(self._store, name, ended, state)
            try:
                while some := dict(islice(rows, ROWS_AT_ONCE)):
                    if not self._add(batch, state, some, names):
                        return False
            except ResultsDamaged as exc:  # nobody knows what its rows were called; the others get lines
                log.error("batch.rows_lost", extra={"batch_id": batch.id, "reason": exc.message})
        return True

    def _add(self, batch: Batch, state: JobState, rows: dict[int, OutputLine], names: Iterator[str]) -> bool:
        """Let these join, but for those that have joined before. False: somebody else holds the batch."""
        while rows:
            made = self._written(state, rows, names)
            answer = self._batches.add(batch.id, [made], self._token)
            if not isinstance(answer, Refused):
                return answer is not None
            rows = {line: row for line, row in rows.items() if line not in answer.lines}
        return True

    def _written(self, state: JobState, rows: dict[int, OutputLine], names: Iterator[str]) -> ResultObject:
        """An object of these rows, in the store."""
        lines = sorted(rows)
        body = b"".join(rows[line].to_line() for line in lines)
        name = next(name for name in names if self._store.put_new(name, body))
        packed = pack_lines(lines)
        return ResultObject(
            segment=OURS,
            kind="errors",
            name=name,
            rows=len(lines),
            bytes=len(body),
            sha256=hashlib.sha256(body).hexdigest(),
            lines=packed,
            cancelled=packed if state is JobState.CANCELLED else "",
            expired=packed if state is JobState.EXPIRED else "",
        )

    # ---- files

    def _complete(self, batch_id: str, becomes: BatchStatus) -> BatchStatus | None:
        batch = self._batches.get(batch_id)
        if batch is None:
            return None
        counts = batch.request_counts
        if becomes is BatchStatus.FINALIZING and counts.completed + counts.failed != counts.total:
            raise ResultsDamaged(
                f"batch {batch_id}: {counts.completed + counts.failed:,} of {counts.total:,} rows have "
                "ended, and the others are in no object of its segments; put those back"
            )
        pieces: dict[str, list[Piece]] = {"output": [], "errors": []}
        for each in self._batches.objects(batch_id):
            pieces[each.kind].append(Piece.of(each))
        output = self._file(batch, "output", pieces["output"], counts.completed)
        errors = self._file(batch, "errors", pieces["errors"], counts.failed)
        manifest = keys.batch_file(batch_id, "manifest.json")
        said = BatchManifest(
            batch=batch_id,
            status=_FINAL[becomes].value,
            total=counts.total,
            completed=counts.completed,
            failed=counts.failed,
            usage=batch.usage,
            input_order=batch.options.input_order,
            output=output,
            errors=errors,
            created_at=batch.created_at or 0.0,
        )
        self._store.put_new(manifest, said.to_json().encode())
        return self._batches.complete(
            batch,
            self._token,
            output=output.name if output else None,
            error_output=errors.name if errors else None,
            manifest=manifest,
        )

    def _file(self, batch: Batch, kind: str, pieces: Sequence[Piece], rows: int) -> BatchFile | None:
        if not pieces:
            return None
        made = assemble(
            self._store,
            keys.batch_file(batch.id, f"{kind}.jsonl"),
            pieces,
            in_order=batch.options.input_order,
            scratch=lambda n: keys.rows_object(f"{batch.id}.{OURS}", 0, n, kind),
        )
        if made.rows != rows:
            raise ResultsDamaged(f"{made.name} has {made.rows:,} lines of {rows:,} that were counted")
        return made


def _unfinished(
    store: ResultStore, name: str, ended: LineSet, state: JobState
) -> Iterator[tuple[int, OutputLine]]:
    """Line numbers and error lines of the rows of an input that have not ended."""
    for data in object_lines(store, name):
        job: Any = json.loads(data)
        row = row_of(job["id"])
        if row is not None and row[1] not in ended:
            yield row[1], unfinished_line(job["id"], job.get("custom_id") or job["id"], state)
