"""The ranks of one model in threads of one process: real arithmetic and gloo, and no process to start."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from gristmill.engine.parallel.follower import Follower
from gristmill.engine.parallel.messages import Told
from gristmill.engine.parallel.ranks import Group
from gristmill.engine.runner import Runner
from gristmill.engine.settings import EngineSettings

from .waiting import LOADED_S


@contextmanager
def followed(settings: EngineSettings) -> Iterator[Group]:
    """Rank 0's view of ``settings.tensor_parallel_size`` ranks; the others make their part and follow.

    Whoever enters makes a Runner, or an Engine, with it.
    """
    size = settings.tensor_parallel_size
    store = dist.HashStore()
    failures: list[BaseException] = []
    inboxes: list[queue.Queue[Told | None]] = [queue.Queue() for _ in range(size)]

    def tell(message: Told) -> None:
        for inbox in inboxes[1:]:
            inbox.put(message)

    def group(rank: int) -> Group:
        ends: Any = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=LOADED_S))
        return Group(rank, size, ends, tell)

    def follow(rank: int) -> None:
        try:
            runner = Runner(settings, ranks=group(rank))
            Follower(runner, settings).serve(iter(inboxes[rank].get, None))
        except Exception as exc:  # noqa: BLE001  (it is the test's, on another thread)
            failures.append(exc)

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    try:
        yield group(0)
    finally:
        for inbox in inboxes:
            inbox.put(None)
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
