"""MessageQueue: what the transport says to Redis, one Lua script per operation.

START HERE for the queue's laws. A message waits in its tenant's list, or is claimed under a tag with a lease;
there is no moment in between. Only the tag ends or prolongs a claim, and each claim has its own, so that a
worker that lost its lease can do no harm: its tag is spent. All times are the server's.

redis-py's exceptions pass through: kombu and Celery act on them; ``broker.py`` translates them for others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import NoScriptError

from ..schemas import keys
from ..schemas.errors import NotReplicated
from .script import Script, lua, run_script

SWEEP_LIMIT = 500
"""Claims handed back by one sweep, so that a sweep never blocks the server for long."""
PRUNE_BYTES = 1 << 20
"""Looked at by one prune, but for the last message: see SWEEP_LIMIT. By one page of a search, too."""
SEEK_PAGE = 200
SEEK_LIMIT = 20_000
"""Messages of one tenant that a search looks through: some hundred milliseconds, in short calls."""
HELD_PAGE = 100
"""Claims that one call looks at, or some more: see SWEEP_LIMIT."""
DEAD_LIMIT = 10_000
"""Dead letters a queue keeps; older ones go."""
DEAD_TTL_S = 30 * 86_400
"""How long a queue's dead letters stay after the last one came."""

_NAMES = {
    "queue_tenants": keys.queue_tenants("%s"),
    "queue_past": keys.queue_past("%s"),
    "queue_messages": keys.queue_messages("%s", "%s"),
    "queue_dead": keys.queue_dead("%s"),
    "queue_dead_at": keys.queue_dead_at("%s"),
    "queue": keys.queue("%s"),
    "dead_new": keys.DEAD_NEW,
    "bell": keys.BELL,
    "claims": keys.CLAIMS,
    "claim_expiry": keys.CLAIM_EXPIRY,
    "sweep": keys.SWEEP,
}


@dataclass(frozen=True, slots=True)
class ClaimedMessage:
    """A message and the tag that acts on it. ``deliveries`` counts this one too."""

    queue: str
    tag: str
    deliveries: int
    tenant: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep did: claims handed back, or how long expired ones are spared after an outage."""

    returned: int
    hold_s: float


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a look at a queue's waiting messages did."""

    gone: int
    tenant: int
    """Where to go on; -1: there is no such tenant any more, begin anew."""
    start: int


class MessageQueue:
    """All queues of one server. Thread-safe, as its client is.

    ``now_ms`` replaces the server's clock in tests of expiry; None is the real one.
    """

    def __init__(
        self,
        client: redis.Redis,
        *,
        lease_s: float,
        now_ms: int | None = None,
        replicas: int = 0,
        replica_wait_s: float = 1.0,
    ) -> None:
        self.client = client
        self.replicas, self.replica_wait_s = replicas, replica_wait_s
        self.lease_ms = int(lease_s * 1000)
        self.now_ms = now_ms
        self._swept_ms: int | str = ""

    def put(
        self, queue: str, tenant: str, base: str, payload: str | bytes, expires_ms: int | None = None
    ) -> int:
        """Accept a message: as durable on return as the server is. Returns how many wait for the tenant.

        ``base`` is unique to the message, and the stem of its tags. Repeated after an error that leaves open
        whether it arrived, two messages may be accepted. Raises NotReplicated if fewer than ``replicas``
        have confirmed it after ``replica_wait_s``: it is accepted then, and less safe.
        """
        assert not {"#", "\n"} & {*base, *tenant, *queue}, (queue, tenant, base)
        args = (queue, tenant, base, payload, expires_ms or "")
        if not self.replicas:
            return int(run_script(self.client, PUT, *args))
        waiting, confirmed = self._put_and_wait(*args)
        if confirmed < self.replicas:
            raise NotReplicated(confirmed=confirmed, wanted=self.replicas, wait_s=self.replica_wait_s)
        return int(waiting)

    def _put_and_wait(self, *args: str | bytes | int) -> tuple[int, int]:
        """On one connection: WAIT asks after what its own connection wrote, and nothing else."""
        wait = ("WAIT", self.replicas, int(self.replica_wait_s * 1000))
        try:
            return _both(self.client, ("EVALSHA", PUT.sha, 0, *args), wait)
        except NoScriptError:
            return _both(self.client, ("EVAL", PUT.text, 0, *args), wait)

    def claim(self, queues: Sequence[str], unacknowledged: Iterable[str] = ()) -> ClaimedMessage | str:
        """The next message of the first queue that has one, or the bell's last id if none has.

        Messages of ``unacknowledged`` queues are gone once delivered.
        """
        flags = frozenset(unacknowledged)
        pairs = [part for queue in queues for part in (queue, "1" if queue in flags else "0")]
        reply: list[Any] = run_script(self.client, CLAIM, self._now, self.lease_ms, *pairs)
        if len(reply) == 1:
            return reply[0].decode()
        queue, tag, deliveries, tenant, payload = reply
        return ClaimedMessage(queue.decode(), tag.decode(), int(deliveries), tenant.decode(), payload)

    def ack(self, *tags: str) -> list[bool]:
        """The messages are done with. False: the tag was spent, and somebody else has the message."""
        return [bool(done) for done in run_script(self.client, ACK, *tags)] if tags else []

    def requeue(self, *tags: str) -> list[bool]:
        """Back to the heads of their lists, the first tag foremost. False: the tag was spent."""
        return [bool(done) for done in run_script(self.client, REQUEUE, *tags)] if tags else []

    def bury(self, tag: str, reason: str) -> bool:
        """Put aside what is not to be delivered again: see dead.py. False: the tag was spent."""
        args = (self._now, tag, reason, DEAD_LIMIT, DEAD_TTL_S * 1000)
        return bool(run_script(self.client, BURY, *args))

    def renew(self, tags: Sequence[str]) -> list[str]:
        """A full lease from now for each tag. Returns the spent ones."""
        return (
            [tag.decode() for tag in run_script(self.client, RENEW, self._now, self.lease_ms, *tags)]
            if tags
            else []
        )

    def sweep(self, *, period_s: float = 0.0, server: Sequence[Any] = ()) -> Sweep:
        """Hand expired claims back, unless their owners could not renew: see queue_sweep.lua for the rule.

        One caller's life is one MessageQueue: what it swept before tells a standstill from an empty fleet.
        ``server`` is for tests.
        """
        args = (self._now, self.lease_ms, int(period_s * 1000), self._swept_ms, SWEEP_LIMIT, *server)
        returned, hold_ms, self._swept_ms = map(int, run_script(self.client, SWEEP, *args))
        return Sweep(returned, hold_ms / 1000)

    def release_orphans(self) -> int:
        """Hand every claim back at once. Only for who knows that no owner lives."""
        return int(run_script(self.client, ORPHANS))

    def depth(self, queue: str) -> int:
        """Messages that wait, claimed ones not included."""
        return int(run_script(self.client, DEPTH, queue))

    def claimed(self) -> int:
        """Claimed messages of all queues of this server."""
        return int(self.client.hlen(keys.CLAIMS))

    def counts(self, queue: str) -> tuple[int, int]:
        """Messages that wait, and messages of this queue that are claimed; the latter by looking at each."""
        return self.depth(queue), int(run_script(self.client, CLAIMED, queue))

    def purge(self, queue: str) -> int:
        """Throw away what waits. Returns how many messages that were."""
        return int(run_script(self.client, PURGE, queue))

    def prune(self, queue: str, tenant: int, start: int, count: int) -> Pruned:
        """Throw away waiting messages whose jobs have ended, among ``count`` of one tenant's.

        ``start``: how many of its oldest to pass over. Only where this server holds the states of jobs too.
        """
        args = (queue, tenant, start, count, PRUNE_BYTES, keys.state("%s"))
        return Pruned(*map(int, run_script(self.client, PRUNE, *args)))

    def lacking(self, queue: str, tenant: str, ids: Collection[str]) -> set[str]:
        """Those tasks of ``ids`` that have no message: none waits, and none is claimed.

        Ends when all were found. Behind SEEK_LIMIT waiting messages whatever was not found may stand: then
        it says so of none.
        """
        left, start = set(ids), 0
        while left:
            looked, *found = run_script(self.client, SEEK, queue, tenant, start, SEEK_PAGE, PRUNE_BYTES)
            left -= {each.decode() for each in found}
            start += looked
            if not looked:
                return self._unclaimed(queue, left)
            if start >= SEEK_LIMIT:
                break
        return set()

    def _unclaimed(self, queue: str, ids: set[str]) -> set[str]:
        """Those that are not claimed: a page at a time, since it has to look at every claim of all queues."""
        left, cursor = set(ids), b"0"
        while left:
            cursor, *found = run_script(self.client, HELD, queue, cursor, HELD_PAGE)
            left -= {each.decode() for each in found}
            if cursor == b"0":
                break
        return left

    def pause(self, queue: str, *, paused: bool) -> None:
        """Stop all claims from a queue, or let them go on."""
        run_script(self.client, PAUSE, queue, int(paused))

    def paused(self, queue: str) -> bool:
        """Whether claims from it are stopped."""
        return bool(self.client.hexists(keys.queue(queue), "paused"))

    @property
    def _now(self) -> str | int:
        return "" if self.now_ms is None else self.now_ms


def load_script(name: str) -> Script:
    """A Lua file behind ``queue_common.lua``, with the key names of ``schemas/keys.py`` filled in."""
    common = lua("queue_common")
    for placeholder, key in _NAMES.items():
        common = common.replace(f"'{{{placeholder}}}'", f"'{key}'")
    return Script.of(common + lua(f"queue_{name}"))


def _both(client: redis.Redis, *commands: tuple[str | bytes | int, ...]) -> Any:
    pipe: Any = client.pipeline(transaction=False)  # pyright: ignore[reportUnknownMemberType]  (shard_hint)
    for command in commands:
        pipe.execute_command(*command)
    return pipe.execute()


PUT, CLAIM, ACK, REQUEUE, BURY, RENEW = map(load_script, ("put", "claim", "ack", "requeue", "bury", "renew"))
SWEEP, ORPHANS, DEPTH, PURGE = map(load_script, ("sweep", "orphans", "depth", "purge"))
PAUSE, PRUNE, CLAIMED, SEEK, HELD = map(load_script, ("pause", "prune", "claimed", "seek", "held"))
