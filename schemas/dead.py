"""DeadLetter: a message that nobody will deliver again, and why. Kept for a person to look at."""

from __future__ import annotations

from typing import Literal

from .wire import WIRE_VERSION, Answer, Float


class DeadLetter(Answer):
    """What stands in a queue's dead letters. ``lua/queue_common.lua`` writes it, for every broker."""

    v: Literal[1] = WIRE_VERSION
    id: str
    """The claim's tag, or the broker's own id of the message: unique, and told to nobody else."""
    job_id: str | None = None
    """As the message's header says; None where that could not be read."""
    queue: str
    tenant: str
    reason: str
    at: Float
    """Unix seconds by the server's clock."""
    payload: str = ""
    """The message as it stood in the queue; bytes that are not UTF-8 are replaced."""
