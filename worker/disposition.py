"""What becomes of a delivery. There is no other way out of a task."""

from __future__ import annotations

from enum import StrEnum

MAX_ATTEMPTS = "max_attempts"
"""Error code of a job that was given up, and the reason among the dead letters."""


class Disposition(StrEnum):
    """Returned by the one task; ``EngineRequest`` carries it out."""

    ACK = "ack"
    """The job's final state is durable: the message may go."""
    REQUEUE = "requeue"
    """Hand it back at the head of its queue: another worker continues from the journal."""
    DROP = "drop"
    """Touch nothing: the lease brings it back."""
    BURY = "bury"
    """Its failure is durable, and a person should look at it: the message goes to the dead letters."""
