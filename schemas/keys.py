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
WEBHOOK_HOSTS = "gm:webhooks:hosts"  # sorted set: host -> ms when its endpoints must be looked at
WEBHOOK_TROUBLED = "gm:webhooks:troubled"  # sorted set: endpoint that fails -> ms of the last try
WEBHOOKS_PENDING = "gm:webhooks:pending"  # sorted set: event to be delivered -> ms when it was queued
WEBHOOKS_DELIVERED = "gm:webhooks:delivered"  # sorted set: event -> ms; the last ones
WEBHOOKS_FAILED = "gm:webhooks:failed"  # sorted set: event that was given up -> ms; the last ones
WEBHOOK_BELL = "gm:webhooks:bell"  # channel that wakes who delivers


BATCHES = "gm:batches"  # sorted set: batch id -> ms by the server's clock when it was opened
BATCHES_DUE = "gm:batches:due"  # sorted set: batch id -> ms when a keeper must see what it needs
KEEPER = "gm:keeper"  # string: who leads the keepers, until it expires; and a channel that wakes them


OWNED: dict[str, str] = {
    BELL: "one entry, always",
    MODELS: "one field for each model that was ever served or announced",
    WORKERS: "one member for each worker alive; heartbeats and the keeper drop the others",
    DUE: "one member for each job that has not ended; its end removes it, at its expiry at the latest",
    BATCHES: "one member for each batch; who lists them drops those whose record is gone",
    BATCHES_DUE: "one member for each batch that is not final",
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


def batch(batch_id: str) -> str:
    """Hash with what is known of a batch. Its other keys live as long."""
    return f"gm:{{{batch_id}}}:batch"


def batch_rows(batch_id: str) -> str:
    """Bitmap: a row's bit, by its line, is set once an accepted object has it."""
    return f"gm:{{{batch_id}}}:rows"


def batch_objects(batch_id: str) -> str:
    """List of the accepted objects' records, in order."""
    return f"gm:{{{batch_id}}}:objects"


def batch_segments(batch_id: str) -> str:
    """Hash: segment id -> what it is made of."""
    return f"gm:{{{batch_id}}}:segments"


def batch_unsent(batch_id: str) -> str:
    """Sorted set: a segment that needs a message -> when it asked: how many had asked by then."""
    return f"gm:{{{batch_id}}}:unsent"


def batch_stopped(batch_id: str) -> str:
    """Set of lines that were cancelled one by one."""
    return f"gm:{{{batch_id}}}:stopped"


def batch_errors(batch_id: str) -> str:
    """List of the first problems of its input."""
    return f"gm:{{{batch_id}}}:errors"


def batch_events(batch_id: str) -> str:
    """Stream of a batch's events, and the channel of the same name."""
    return f"gm:{{{batch_id}}}:events"


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


def segment_object(segment_id: str) -> str:
    """Name of a segment's rows in the result store."""
    return f"batches/{segment_id.partition('.')[0]}/segments/{segment_id}.jsonl"


def rows_object(segment_id: str, attempt: int, number: int, kind: str) -> str:
    """Name of an object of finished rows; ``kind``: output or errors. ``number`` counts within an attempt."""
    return f"{batch_results(segment_id.partition('.')[0])}{segment_id}/{attempt}-{number}.{kind}.jsonl"


def batch_results(batch_id: str) -> str:
    """What the names of all objects of a batch's finished rows begin with."""
    return f"batches/{batch_id}/results/"


def keeper_results(batch_id: str) -> str:
    """What the names of those begin with that a keeper makes of rows, to make the batch final."""
    return f"{batch_results(batch_id)}{batch_id}.keeper/"


def batch_file(batch_id: str, name: str) -> str:
    """Name of one of the files that a batch ends in: ``output.jsonl``, ``errors.jsonl``, ``manifest.json``;
    or ``batch.json``, from which a lost record is rebuilt.
    """
    return f"batches/{batch_id}/{name}"


def webhook(event_id: str) -> str:
    """Hash of an event that a webhook is sent, with what came of its tries."""
    return f"gm:webhook:{event_id}"


def webhook_queue(endpoint: str) -> str:
    """Sorted set: events to be delivered to an endpoint -> ms of their next try."""
    return f"gm:webhook:queue:{endpoint}"


def webhook_host(host: str) -> str:
    """Sorted set: a host's endpoints -> ms when their events must be looked at."""
    return f"gm:webhook:host:{host}"


def webhook_endpoint(endpoint: str) -> str:
    """Hash of an endpoint that fails or is switched off."""
    return f"gm:webhook:endpoint:{endpoint}"
