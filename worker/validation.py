"""Validation: what a run would refuse a segment's rows for, found before any row of the batch runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..backends.batches import SegmentClaim
from ..schemas.batch import LineProblem, row_id
from ..schemas.batch_lines import default_custom_id, error_line
from ..schemas.errors import BadInput, ModelNotFound
from ..schemas.job import Job, JobState
from ..schemas.result import ErrorInfo, Usage
from .admission import Admission
from .row_writer import Ended
from .segment_rows import SegmentRows, parse_row

PAUSE_EVERY_S, PAUSE_S = 0.02, 0.001
"""Others want the interpreter, too: those whose tokens stream."""


@dataclass(slots=True)
class Findings:
    """What was found in a segment."""

    rows: int = 0
    """Valid ones."""
    tokens: int = 0
    """Of their prompts."""
    problems: list[LineProblem] = field(default_factory=list[LineProblem])
    """The first of them."""
    count: int = 0
    """All of them."""
    refused: list[Ended] = field(default_factory=list[Ended])
    """Their error lines, if the batch goes on without them."""


def validate(
    claim: SegmentClaim,
    rows: SegmentRows,
    admission: Admission,
    model: str,
    stopping: Callable[[], bool],
) -> Findings | None:
    """Look at each row. None: ``stopping`` said so."""
    found = Findings()
    options = claim.batch.options
    paused_at = time.monotonic()
    while len(rows):
        if time.monotonic() - paused_at > PAUSE_EVERY_S:
            if stopping():
                return None
            time.sleep(PAUSE_S)
            paused_at = time.monotonic()
        line, body = rows.take()
        job: Job | None = None
        try:
            job = parse_row(body)
            found.tokens += _tokens(job, admission, model)
            found.rows += 1
        except BadInput as exc:
            error = ErrorInfo.of(exc)
            found.count += 1
            if len(found.problems) < options.max_errors:
                found.problems.append(
                    LineProblem(code=error.code, message=error.message, param=error.param, line=line)
                )
            if options.on_invalid == "skip" and line not in claim.ended:
                found.refused.append(_ended(claim.batch.id, line, job, error))
    return found


def _tokens(job: Job, admission: Admission, model: str) -> int:
    """Of its prompt. Raises BadInput."""
    if job.model != model:
        raise ModelNotFound(f"the model {job.model!r} is not served where this batch runs: {model!r} is")
    return len(admission.fit(job).prompt_ids)


def _ended(batch_id: str, line: int, job: Job | None, error: ErrorInfo) -> Ended:
    custom_id = (job.custom_id if job else None) or default_custom_id(line)
    said = error_line(row_id(batch_id, line), custom_id, error).to_line()
    return Ended(line, said, JobState.FAILED, Usage())
