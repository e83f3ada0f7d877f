"""A large checkpoint's way into memory: read ahead of who maps it, and how far it is, in the log."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

log = logging.getLogger(__name__)

LARGE_BYTES = 512 * 1024 * 1024
"""Below this a checkpoint is there before a thread pays."""
THREADS = 4
CHUNK_BYTES = 4 * 1024 * 1024
PAGE_BYTES = 4096
LOG_EVERY_S = 5.0


class Loading:
    """The weights of one model while they are loaded.

    The tensors themselves come out of a memory map, whose page faults read a little at a time, one after the
    other: a disk or a network file system that serves several readers at once stands idle. ``read_ahead``
    has threads pull the files into the page cache meanwhile; where the pages are there already it costs a
    look at each chunk. What is read does not depend on it.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [(path, path.stat().st_size) for path in files]
        self.total_bytes = sum(size for _, size in self._files)
        self._done = 0
        self._began_s = time.monotonic()
        self._due_s = self._began_s + LOG_EVERY_S

    def add(self, count: int) -> None:
        """So many bytes of weights have been taken. A long load says now and then how far it is."""
        self._done += count
        now = time.monotonic()
        if now < self._due_s:
            return
        self._due_s = now + LOG_EVERY_S
        rate = self._done / (now - self._began_s)
        log.info(
            "weights.loading",
            extra={
                "bytes": self._done,
                "total_bytes": self.total_bytes,
                "mb_per_s": round(rate / 1e6, 1),
                "eta_s": round(max(0, self.total_bytes - self._done) / rate),
            },
        )

    def read_ahead(self, room_bytes: int, *, part: int = 0, parts: int = 1) -> list[threading.Thread]:
        """Start to, unless the files are small or would not fit in ``room_bytes`` of page cache.

        ``part`` of ``parts``: that of one of several processes which load the same model.
        """
        if not LARGE_BYTES <= self.total_bytes <= room_bytes:
            return []
        chunks = [(path, at) for path, size in self._files for at in range(0, size, CHUNK_BYTES)]
        mine = iter(chunks[part::parts])
        lock = threading.Lock()
        # Daemons: an engine that is told to stop while it loads does not wait for them.
        threads = [threading.Thread(target=_read, args=(mine, lock), daemon=True) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        return threads


def _read(chunks: Iterator[tuple[Path, int]], lock: threading.Lock) -> None:
    """Take chunks until there are none. What cannot be read is for the mapping to complain of."""
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while True:
        with lock:
            chunk = next(chunks, None)
        if chunk is None:
            return
        try:
            descriptor = os.open(chunk[0], os.O_RDONLY)
            try:
                if not _is_cached(descriptor, chunk[1], buffer):
                    os.preadv(descriptor, [buffer], chunk[1])
            finally:
                os.close(descriptor)
        except OSError:
            return


def _is_cached(descriptor: int, at: int, buffer: memoryview) -> bool:
    """Whether a page in the middle of the chunk is in memory: chunks come and go as a whole."""
    try:
        return os.preadv(descriptor, [buffer[:PAGE_BYTES]], at + CHUNK_BYTES // 2, os.RWF_NOWAIT) > 0
    except OSError:  # it would have to be read, or this file system does not say
        return False
