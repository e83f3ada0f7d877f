"""What a bulk run writes: one line per row, put back into input order, each file in one atomic step."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Self

from ..schemas.batch_lines import OutputLine
from ..schemas.errors import Misconfigured

STDOUT = "-"


class Spool:
    """Finished lines in the order they come, on disk; memory holds where each lies: 17 bytes a row.

    The file has no name: it is gone however the run ends, because results are durable elsewhere.
    """

    def __init__(self, directory: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=directory, prefix=".gristmill-")  # noqa: SIM115 - closed in __exit__
        self._end = 0
        self._offsets, self._sizes, self._failed = array("q"), array("q"), bytearray()

    def add(self, index: int, line: OutputLine, *, failed: bool) -> None:
        """The line of row ``index``, counted from 0 in input order. Misconfigured: the disk is full."""
        data = line.to_line()
        while len(self._offsets) <= index:
            self._offsets.append(-1)
            self._sizes.append(0)
            self._failed.append(0)
        try:
            self._file.seek(self._end)
            self._file.write(data)
        except OSError as exc:
            raise Misconfigured(
                f"cannot write beside the output: {exc.strerror}; make room, run again"
            ) from exc
        self._offsets[index], self._sizes[index], self._failed[index] = self._end, len(data), failed
        self._end += len(data)

    @property
    def has_failed(self) -> bool:
        """Whether a row failed."""
        return any(self._failed)

    def lines(self, *, failed: bool | None = None) -> Iterator[bytes]:
        """Lines in input order: of rows that failed, of rows that did not, or (None) of all that have one."""
        for index, offset in enumerate(self._offsets):
            if offset >= 0 and (failed is None or bool(self._failed[index]) is failed):
                self._file.seek(offset)
                yield self._file.read(self._sizes[index])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


def check_target(target: str, what: str) -> Path:
    """The directory ``target`` will be in, after trying to write there. Raises Misconfigured."""
    if target == STDOUT:
        return Path(tempfile.gettempdir())
    path = Path(target)
    directory = path.absolute().parent
    if path.is_dir():
        raise Misconfigured(f"{what} {target} is a directory; name a file")
    if not directory.is_dir():
        raise Misconfigured(f"{what} {target}: there is no directory {directory}; make it first")
    try:
        with tempfile.TemporaryFile(dir=directory, prefix=".gristmill-"):
            pass
    except OSError as exc:
        raise Misconfigured(f"{what} {target}: cannot write to {directory}: {exc.strerror}") from exc
    return directory


def write(target: str, lines: Iterator[bytes]) -> int:
    """Write all lines to ``target`` at once or not at all; how many. ``-`` is stdout, which is not atomic.

    Raises Misconfigured when the disk or the directory refuses.
    """
    if target == STDOUT:
        return _copy(lines, sys.stdout.buffer)
    path = Path(target)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            count = _copy(lines, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except OSError as exc:
        with suppress(OSError):
            temporary.unlink()
        raise Misconfigured(
            f"cannot write {target}: {exc.strerror}; the results are kept, run again"
        ) from exc
    return count


def remove(target: str) -> None:
    """Take away the file of an earlier run that has nothing to say any more."""
    if target != STDOUT:
        with suppress(OSError):
            Path(target).unlink()


def _copy(lines: Iterator[bytes], file: BinaryIO) -> int:
    count = 0
    for line in lines:
        file.write(line)
        count += 1
    file.flush()
    return count
