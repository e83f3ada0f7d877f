"""Every Redis key, channel and result-store object name is built here, and nowhere else.

Keys of one job share a hash tag, so that its scripts run on one cluster slot.
"""

from __future__ import annotations

PREFIX = "gm:"

# Fleet-wide keys
BELL = "gm:bell"  # stream: every put and every restore rings it; idle workers wait on it
MODELS = "gm:models"  # hash: model name -> JSON of what its workers said of it
WORKERS = "gm:workers"  # sorted set: worker id -> unix seconds until which it counts as alive
DEAD_NEW = "gm:dead:new"  # set: "<queue>\n<id>" of dead letters whose jobs may have no final state yet
DUE = "gm:due"  # sorted set: job id -> ms by the server's clock when somebody must see whether it has ended
CLAIMS = "gm:claims"  # hash: tag -> the claimed message, with the queue and the tenant it goes back to
CLAIM_EXPIRY = "gm:claims:expiry"  # sorted set: tag -> ms by the server's clock when the lease runs out
SWEEP = "gm:sweep"  # hash: when expired claims were last looked for, and until when to hold off


KEEPER = "gm:keeper"  # string: who leads the keepers, until it expires; and a channel that wakes them


OWNED: dict[str, str] = {
    BELL: "one entry, always",
    MODELS: "one field for each model that was ever served or announced",
    WORKERS: "one member for each worker alive; heartbeats and the keeper drop the others",
    DUE: "one member for each job that has not ended; its end removes it, at its expiry at the latest",
    CLAIMS: "one field for each claimed message; acknowledged, handed back, buried or swept",
    CLAIM_EXPIRY: "as CLAIMS",
    SWEEP: "five fields",
}
"""Keys without an expiry, and what keeps each of them small. A queue's own keys go when it is empty."""


def log(job_id: str) -> str:
    """Stream of a job's events, and the channel of the same name."""
    return f"gm:{{{job_id}}}:out"


def state(job_id: str) -> str:
    """Hash with a job's state, attempt and cancel flag."""
    return f"gm:{{{job_id}}}:state"


def queue(name: str) -> str:
    """Hash of a queue's flags; ``paused`` stops all claims."""
    return f"gm:queue:{name}"


def queue_tenants(name: str) -> str:
    """Sorted set: tenants with waiting messages -> what each was served so far."""
    return f"gm:queue:{name}:tenants"


def queue_past(name: str) -> str:
    """Sorted set: tenants whose messages have run out, while others still wait -> what they were served."""
    return f"gm:queue:{name}:past"


def queue_messages(name: str, tenant: str) -> str:
    """List of one tenant's waiting messages. The oldest is last, and served next."""
    return f"gm:queue:{name}:messages:{tenant}"


def queue_dead(name: str) -> str:
    """Hash: id -> the record of a message that will not be delivered again, and why (schemas/dead.py)."""
    return f"gm:queue:{name}:dead"


def queue_dead_at(name: str) -> str:
    """Sorted set: ids of the dead letters -> ms by the server's clock when they were put aside."""
    return f"gm:queue:{name}:dead:at"


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


def request_object(job_id: str) -> str:
    """Name of a job's request in the result store, where it is too large for the broker's message."""
    return f"jobs/{result_object(job_id).removeprefix('results/')}"
