"""Every Redis key, channel and result-store object name is built here, and nowhere else.

Keys of one job share a hash tag, so that its scripts run on one cluster slot.
"""

from __future__ import annotations

PREFIX = "gm:"

# Fleet-wide keys
BELL = "gm:bell"  # stream: every put and every restore rings it; idle workers wait on it
MODELS = "gm:models"  # hash: model name -> JSON of what its workers said of it
WORKERS = "gm:workers"  # sorted set: worker id -> unix seconds until which it counts as alive


def log(job_id: str) -> str:
    """Stream of a job's events, and the channel of the same name."""
    return f"gm:{{{job_id}}}:out"


def state(job_id: str) -> str:
    """Hash with a job's state, attempt and cancel flag."""
    return f"gm:{{{job_id}}}:state"


def worker(worker_id: str) -> str:
    """String with a live worker's description (JSON); expires with its heartbeat."""
    return f"gm:worker:{worker_id}"


def control(model: str) -> str:
    """Channel that announces cancellations for jobs of a model; the flag in the state is the truth."""
    return f"gm:control:{model}"


def result_object(job_id: str) -> str:
    """Name of a job's result in the result store. Rows of a batch lie together."""
    batch, dot, line = job_id.partition(".")
    return f"results/{batch}/{line}.json" if dot else f"results/{job_id}.json"
