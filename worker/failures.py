"""Failures: how a job ends that engines died of, or that brings out a mistake of ours."""

from __future__ import annotations

import logging

from ..schemas.errors import GristmillError
from ..schemas.result import ErrorInfo
from .disposition import MAX_ATTEMPTS
from .generation import Generation

log = logging.getLogger(__name__)


def condemn(generation: Generation, now: float) -> None:
    """It was alone in too many crashes: it is the cause, whatever it is."""
    history, job_id = generation.history, generation.job.id
    last = history.crashes[-1]
    text = (
        f"the engine or its worker died {history.strikes} times while it ran this job alone, the last "
        f"time after {last.tokens:,} tokens ({last.code}: {last.message or last.worker})"
    )
    if generation.owner is None:  # a row has no message of its own to be put aside
        text += (
            f"; `gristmill dead show {job_id}` has the rest, `gristmill dead requeue {job_id}` tries again"
        )
    log.error("job.given_up", extra={"job_id": job_id, "crashes": history.strikes, "code": last.code})
    generation.fail(ErrorInfo(code=MAX_ATTEMPTS, message=text), now)


def crashed(generation: Generation, exc: BaseException, now: float) -> None:
    """A mistake of ours that one job's text brought out: it would do so again, so this job has failed."""
    log.critical("job.crashed", exc_info=exc, extra={"job_id": generation.job.id})
    text = f"the worker made a mistake with this job ({type(exc).__name__}); its log has the details"
    generation.fail(ErrorInfo(code=GristmillError.code, message=text), now)
