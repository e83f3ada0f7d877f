"""RowResults: what a batch's row ended in, read from the object that has its line."""

from __future__ import annotations

import json

from ..schemas.batch import batch_of
from ..schemas.batch_lines import OutputLine, result_of
from ..schemas.result import Result
from .batches import Batches
from .store import ResultStore


def row_result(batches: Batches, store: ResultStore, job_id: str) -> Result | None:
    """None: no such row, or it has not ended. Reads one object of finished rows."""
    held = batches.object_of(job_id)
    batch = None if held is None else batches.get(batch_of(job_id))
    body = None if held is None else store.get(held.name)
    if batch is None or body is None:
        return None
    mine = f'"id":"batch_req_{job_id}"'.encode()
    for line in body.splitlines():
        if mine in line and (said := json.loads(line))["id"] == f"batch_req_{job_id}":
            return result_of(OutputLine.from_python(said), job_id, batch.model)
    return None
