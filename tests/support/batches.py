"""Batches as a client opens them: their segments lie in the store, and their messages are the test's to
send.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from gristmill.backends.batches import SegmentClaim
from gristmill.backends.state import State
from gristmill.backends.store import ResultStore
from gristmill.schemas import keys
from gristmill.schemas.batch import (
    Batch,
    BatchStatus,
    RequestCounts,
    ResultObject,
    Segment,
    SegmentInfo,
    row_id,
    segment_id,
)
from gristmill.schemas.job import Endpoint, Job, Priority

BATCH = "batch_1"


def row(line: int, batch: str = BATCH, **fields: Any) -> Job:
    """A valid one; say only what matters."""
    now = time.time()
    asked = {"prompt": f"row {line}", "model": "m"} | fields
    return Job(
        id=row_id(batch, line),
        endpoint=Endpoint.COMPLETIONS,
        priority=Priority.BATCH,
        custom_id=f"c{line}",
        submitted_at=1_700_000_000.0,
        expires_at=now + 3600,
        **asked,
    )


def open_batch(
    state: State, store: ResultStore, *segments: Sequence[Job], batch: str = BATCH, **fields: Any
) -> Batch:
    """A batch of these segments; what a client does but for the messages."""
    infos: list[SegmentInfo] = []
    for number, rows in enumerate(segments, 1):
        name = segment_id(batch, number)
        lines = [int(job.id.rpartition(".")[2]) for job in rows]
        body = "".join(job.to_json() + "\n" for job in rows)
        assert store.put_new(keys.segment_object(name), body.encode())
        ends = {"first": min(lines), "last": max(lines)}
        infos.append(SegmentInfo(id=name, input=keys.segment_object(name), rows=len(rows), **ends))
    total = sum(map(len, segments))
    opened = Batch(id=batch, model="m", request_counts=RequestCounts(total=total), **fields)
    assert state.batches.open(opened, infos)
    return opened


def run_batch(state: State, store: ResultStore, *segments: Sequence[Job], **fields: Any) -> Batch:
    """The same, as if it had been validated."""
    batch = open_batch(state, store, *segments, **fields)
    for info in state.batches.segments(batch.id):
        claim = state.batches.claim_segment(info.id, "validator")
        assert isinstance(claim, SegmentClaim)
        said = {"rows": info.rows, "tokens": 1, "problems": (), "count": 0, "told": 1}
        assert state.batches.validated(info.id, claim.attempt, **said)
    assert state.batches.begin(batch) is BatchStatus.IN_PROGRESS
    return batch


def message(segment: str) -> str:
    """The body of a segment's message."""
    return Segment(id=segment).to_json()


def lines_of(state: State, store: ResultStore, batch: str = BATCH) -> list[dict[str, Any]]:
    """Of all accepted objects, by the input's line; each checked against its record."""
    found: list[dict[str, Any]] = []
    for each in state.batches.objects(batch):
        found += _lines(store, each)
    return sorted(found, key=lambda line: int(line["id"].rpartition(".")[2]))


def _lines(store: ResultStore, each: ResultObject) -> list[dict[str, Any]]:
    body = store.get(each.name)
    assert body is not None, f"{each.name} was accepted, and is not there"
    assert len(body) == each.bytes
    lines = [json.loads(line) for line in body.splitlines()]
    assert len(lines) == each.rows
    return lines
