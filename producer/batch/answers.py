"""Answers: the lines that a batch has ended in so far, those of a batch that it retries merged in."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator
from typing import Literal

from ...backends.object_lines import object_lines
from ...schemas import keys
from ...schemas.batch import Batch, BatchStatus, OpenedBatch, RequestCounts
from ...schemas.batch_manifest import BatchManifest
from ...schemas.errors import JobNotFound
from ..link import Link
from .twins import Lines

Kind = Literal["output", "errors"]

_LINE = re.compile(rb'\{"id":"batch_req_[^".]+\.([0-9]{1,10})"')


def line_of(data: bytes) -> int:
    """The input's line that an output line answers."""
    found = _LINE.match(data)
    assert found is not None, "not a line of a batch's output"
    return int(found[1])


class Answers:
    """Of one batch. Complete once it is final; before that what has joined it, in no promised order."""

    def __init__(self, link: Link, batch: Batch) -> None:
        self._link, self._batch = link, batch
        self._before: Answers | None = None
        if batch.retry_of is not None:
            self._before = Answers(link, find(link, batch.retry_of))

    def lines(self, kind: Kind) -> Iterator[bytes]:
        """Lines with their ends. Raises StoreUnavailable, ResultsDamaged."""
        if self._before is None:
            yield from self._own(kind)
            return
        again = Lines()
        for each in ("output", "errors"):
            for data in self._own(each):
                again.add(line_of(data))
        before = (data for data in self._before.lines(kind) if line_of(data) not in again)
        if self._batch.options.input_order:
            yield from heapq.merge(before, self._own(kind), key=line_of)
            return
        yield from before
        yield from self._own(kind)

    def _own(self, kind: Kind) -> Iterator[bytes]:
        for name in self._names(kind):
            for line in object_lines(self._link.store, name):
                yield line + b"\n"

    def _names(self, kind: Kind) -> Iterator[str]:
        batch = self._batch
        if batch.status.final:
            name = batch.output if kind == "output" else batch.error_output
            yield from () if name is None else (name,)
            return
        for each in self._link.state.batches.objects(batch.id):
            if each.kind == kind:
                yield each.name


def find(link: Link, batch_id: str) -> Batch:
    """A batch by its id, also one whose record is over and whose files are left. Raises JobNotFound."""
    found = standing(link, batch_id)
    if found is None:
        raise unknown_batch(batch_id)
    return found


def standing(link: Link, batch_id: str) -> Batch | None:
    """Where a batch stands, or stood when its record was over. None: nobody knows it."""
    return link.state.batches.get(batch_id) or ended_before(link, batch_id)


def ended_before(link: Link, batch_id: str) -> Batch | None:
    """As its files tell. None: it has none, or not all of them."""
    opened = link.store.get(keys.batch_file(batch_id, "batch.json"))
    body = link.store.get(keys.batch_file(batch_id, "manifest.json"))
    if opened is None or body is None:
        return None
    return _as_it_ended(OpenedBatch.from_json(opened).batch, BatchManifest.from_json(body))


def unknown_batch(batch_id: str) -> JobNotFound:
    """The error for an id that nobody knows."""
    return JobNotFound(f"batch {batch_id} is unknown here; is this the broker it was sent to?")


def _as_it_ended(batch: Batch, manifest: BatchManifest) -> Batch:
    ended = {
        "status": BatchStatus(manifest.status),
        "request_counts": RequestCounts(
            total=manifest.total, completed=manifest.completed, failed=manifest.failed
        ),
        "usage": manifest.usage,
        "created_at": manifest.created_at,
        "output": manifest.output and manifest.output.name,
        "error_output": manifest.errors and manifest.errors.name,
    }
    return batch.model_copy(update=ended)
