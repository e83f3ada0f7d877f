"""Pruner: walks the queues and takes out messages whose jobs have ended, a page per round."""

from __future__ import annotations

from ..backends.message_queue import MessageQueue

PAGE = 200


class Pruner:
    """Remembers where it stands in each queue. A queue of a million is walked in about an hour and a half."""

    def __init__(self, queue: MessageQueue) -> None:
        self._queue = queue
        self._start: dict[str, int] = {}

    def walk(self, names: list[str]) -> int:
        """Look at the next page of each queue. Returns how many messages went. Raises redis-py's."""
        gone = 0
        for name in names:
            start = self._start.get(name, 0)
            pruned = self._queue.prune(name, start, PAGE)
            gone += pruned.gone
            ahead = start + PAGE - pruned.gone  # what stays has moved up
            self._start[name] = ahead if ahead < pruned.longest else 0
        return gone
