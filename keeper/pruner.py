"""Pruner: walks the queues and takes out messages whose jobs have ended, a few per round."""

from __future__ import annotations

from collections.abc import Iterable

from ..backends.message_queue import MessageQueue

PAGE = 200
"""Messages of one tenant that one call looks at."""
CALLS = 20
"""Calls per queue and round: each holds the server up for a few milliseconds at most."""


class Pruner:
    """Remembers where it stands in each queue. A queue of a million is walked in some five minutes."""

    def __init__(self, queue: MessageQueue) -> None:
        self._queue = queue
        self._at: dict[str, tuple[int, int]] = {}

    def walk(self, names: Iterable[str]) -> int:
        """Look at the next pages of each queue. Returns how many messages went. Raises redis-py's."""
        return sum(self._walk(name) for name in names)

    def _walk(self, name: str) -> int:
        gone, (tenant, start) = 0, self._at.get(name, (0, 0))
        for _ in range(CALLS):
            pruned = self._queue.prune(name, tenant, start, PAGE)
            gone, tenant, start = gone + pruned.gone, pruned.tenant, pruned.start
            if tenant < 0:  # once around
                tenant = start = 0
                break
        self._at[name] = tenant, start
        return gone
