"""Spool: results of finished jobs that are not durable yet. It relieves memory; durability is the journal's.

Small ones wait in memory, large ones in files under ``home/spool/<worker>``. Nothing outlives its worker:
who starts next on the same disk removes it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..schemas.result import Result

log = logging.getLogger(__name__)

IN_MEMORY_BYTES = 64 * 1024
"""Results up to this size are not worth a file."""


class Parcel:
    """One result on its way. ``put_away`` it when it has to wait."""

    def __init__(self, spool: Spool, result: Result) -> None:
        self.job_id = result.job_id
        self._spool = spool
        self._result: Result | None = result
        self._body: bytes | None = result.to_json().encode()
        self._path: Path | None = None
        self.size = len(self._body)

    def result(self) -> Result:
        """The result, wherever it is by now."""
        if self._result is not None:
            return self._result
        body = self._body if self._path is None else self._path.read_bytes()
        assert body is not None, f"job {self.job_id}: a parcel without content"
        return Result.from_json(body)

    def put_away(self) -> None:
        """Keep the bytes only, and large ones on disk. A disk that is full or broken costs memory instead."""
        self._result = None
        if self._path is None and self._body is not None and self.size > IN_MEMORY_BYTES:
            self._path = self._spool.write(self.job_id, self._body)
            if self._path is not None:
                self._body = None

    def drop(self) -> None:
        """Forget it: it is durable, or somebody else's."""
        self._spool.remove(self)
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink(missing_ok=True)


class Spool:
    """Counts what waits and says when that is enough. Thread-safe.

    Jobs that run when a bound is reached still finish, and theirs join: it is intake that stops.
    """

    def __init__(
        self,
        home: Path,
        worker_id: str,
        *,
        max_results: int,
        max_bytes: int,
        on_change: Callable[[int, int], None],
    ) -> None:
        self._directory = home / "spool" / worker_id
        self._max_results, self._max_bytes = max_results, max_bytes
        self._on_change = on_change
        self._parcels: set[Parcel] = set()
        self._bytes = 0
        self._lock = threading.Lock()
        self._folder_fd: int | None = None
        self._was_full = False

    def add(self, result: Result) -> Parcel:
        """Take a result in; ``Parcel.drop`` lets go of it."""
        parcel = Parcel(self, result)
        with self._lock:
            self._parcels.add(parcel)
            self._changed(parcel.size)
        return parcel

    def remove(self, parcel: Parcel) -> None:
        """See Parcel.drop. Twice is harmless."""
        with self._lock:
            if parcel in self._parcels:
                self._parcels.discard(parcel)
                self._changed(-parcel.size)

    @property
    def results(self) -> int:
        """How many wait."""
        return len(self._parcels)

    @property
    def full(self) -> str | None:
        """In words, if a bound is reached: what waits, and which setting it is."""
        count, size = len(self._parcels), self._bytes
        if count >= self._max_results:
            bound = f"GRISTMILL_SPOOL_MAX_RESULTS is {self._max_results:,}"
        elif size >= self._max_bytes:
            bound = f"GRISTMILL_SPOOL_MAX_BYTES is {self._max_bytes:,}"
        else:
            return None
        return f"{count:,} finished jobs ({size:,} bytes) wait to be stored, and {bound}"

    def write(self, job_id: str, body: bytes) -> Path | None:
        """A file with ``body``; None if the disk will not have it."""
        try:
            with self._lock:
                if self._folder_fd is None:
                    self._folder_fd = _locked_folder(self._directory)
            path = self._directory / f"{job_id}.json"
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(body)
        except OSError as exc:
            log.warning("spool.no_disk", extra={"job_id": job_id, "reason": str(exc), "bytes": len(body)})
            return None
        return path

    def close(self) -> None:
        """Remove the directory."""
        with self._lock:
            if self._folder_fd is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
                os.close(self._folder_fd)
                self._folder_fd = None

    def _changed(self, size: int) -> None:
        self._bytes += size
        self._on_change(len(self._parcels), self._bytes)
        if (full := self.full) and not self._was_full:
            log.warning("spool.full", extra={"reason": full})
        self._was_full = full is not None


def remove_dead(home: Path) -> int:
    """Delete the spools of workers that are gone: whose directory nobody holds a lock on. How many."""
    removed = 0
    for folder in (home / "spool").glob("*/"):
        with suppress(OSError):  # somebody else's, or a file system without locks: leave it
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
                removed += 1
            finally:
                os.close(fd)
    return removed


def _locked_folder(folder: Path) -> int:
    """Create ``folder`` and hold a lock on it. Returns the descriptor. Raises OSError."""
    while True:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)  # waits at most while somebody who starts looks at it
            if folder.exists() and os.path.samestat(os.fstat(fd), folder.stat()):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # removed between the two: it looked like a dead worker's
