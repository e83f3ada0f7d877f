"""A new batch of another one's failed rows."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ...backends.object_lines import gone, object_lines
from ...schemas import keys
from ...schemas.batch import Batch, OpenedBatch, RequestCounts
from ...schemas.errors import InvalidRequest
from ...schemas.job import Job
from ..link import Link
from ..settings import producer_settings
from .answers import Answers, line_of
from .check import Rules
from .intake import Intake
from .submission import Submission
from .twins import Lines


def retry(link: Link, batch: Batch) -> Batch:
    """Submit it; again gives the same.

    Raises InvalidRequest, StoreUnavailable, BrokerUnavailable; ResultsDamaged if its rows are gone.
    """
    if not batch.status.final:
        raise InvalidRequest(f"batch {batch.id} is {batch.status}; wait for its end, or cancel it")
    failed = Lines()
    for data in Answers(link, batch).lines("errors"):
        failed.add(line_of(data))
    with Intake(Rules(producer_settings(link.settings))) as intake:
        checked = intake.take_jobs(_rows(link, batch.id, failed))
        if not checked.rows:
            raise InvalidRequest(f"batch {batch.id} has no failed row that could run again")
        again = Batch(
            id=intake.batch_id("batch_", batch.id),
            retry_of=batch.id,
            request_counts=RequestCounts(total=checked.rows),
            **{name: getattr(batch, name) for name in _KEPT},
        )
        Submission(link, intake, again).run()
    return again


_KEPT = ("model", "endpoint", "tenant", "input", "completion_window_s", "metadata", "options")


def _rows(link: Link, batch_id: str, wanted: Lines) -> Iterator[Job]:
    """Rows of the segments' inputs, in the order of the segments. Lines that were refused have none."""
    opened = keys.batch_file(batch_id, "batch.json")  # what lies beside these may be of an earlier life
    body = link.store.get(opened)
    if body is None:
        raise gone(opened)
    for info in OpenedBatch.from_json(body).segments:
        for data in object_lines(link.store, info.input):
            if int(json.loads(data)["id"].rpartition(".")[2]) in wanted:
                yield Job.from_json(data).model_copy(update={"copy_of": None})
