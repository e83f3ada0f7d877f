"""Where the files of a model lie: a directory here, or a bucket (``bucket.py``). Both are read and written
alike."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from ..schemas.errors import Misconfigured, ModelInvalid
from .manifest import is_plain, sha256_of

PIECE_BYTES = 8 * 1024 * 1024
"""What one request fetches or stores, as S3's own guide has it; larger for files of over 72 GB."""
MAX_PIECES = 9_000
"""S3 takes 10,000 parts."""
MAX_SMALL_BYTES = 64 * 1024 * 1024

_SHA256 = re.compile(r"[0-9a-f]{64}")
_LEFT_OUT = re.compile(r"consolidated|.*\.(bin|pt|pth|ckpt|h5|msgpack|onnx|py|pyc)$")


@dataclass(frozen=True, slots=True)
class Found:
    """A file of a place. ``tag`` changes when the content does; None: nobody says."""

    size: int
    tag: str | None = None


class Writer(Protocol):
    """One file that is being written, in order; it appears when it is finished, and not before."""

    def kept(self) -> Iterator[bytes]:
        """What an earlier writer of the same content left behind; goes on after it."""
        ...

    def append(self, data: bytes) -> None: ...

    def finish(self) -> None:
        """Durable on return."""
        ...

    def abandon(self) -> None:
        """Give up; what is there may be kept for the next one."""
        ...

    def discard(self) -> None:
        """Give up, and keep nothing: it was wrong."""
        ...


class Place(Protocol):
    """Raises DownloadFailed while it does not answer, Misconfigured where settings or rights are wrong."""

    where: str

    def files(self) -> dict[str, Found]:
        """Files that belong to a model, by name: no sub-directories, no pickles, no code, nothing hidden."""
        ...

    def whole(self, name: str) -> bytes | None:
        """A small file; None: there is none. Raises ModelInvalid for a large one."""
        ...

    def span(self, name: str, start: int, count: int) -> bytes:
        """So many bytes, or less at the end of the file."""
        ...

    def pieces(self, name: str, found: Found, start: int = 0) -> Iterator[bytes]:
        """The rest of a file, in order."""
        ...

    def checksum(self, name: str) -> str | None:
        """SHA-256 of a file, where it costs no transfer to know it; else None."""
        ...

    def put(self, name: str, body: bytes) -> None:
        """Write a small file at once, over an older one."""
        ...

    def remove(self, name: str) -> None:
        """It may be gone already."""
        ...

    def begun(self, name: str, found: Found) -> int:
        """Bytes of it that an earlier writer has left."""
        ...

    def writer(self, name: str, found: Found) -> Writer: ...


def is_kept(name: str) -> bool:
    """Whether a file belongs to a model, as far as we are concerned."""
    return is_plain(name) and _LEFT_OUT.match(name) is None


def piece_bytes(size: int) -> int:
    """Of a file of that size."""
    return max(PIECE_BYTES, -(-size // MAX_PIECES))


# ---- a directory


class Folder:
    """A directory; it is made when something is written."""

    def __init__(self, path: Path) -> None:
        self.path, self.where = path, str(path)

    def files(self) -> dict[str, Found]:
        """See Place."""
        with _file_errors(self.path):
            if not self.path.is_dir():
                return {}
            found = [each for each in self.path.iterdir() if is_kept(each.name) and each.is_file()]
            stats = {each.name: each.stat() for each in found}
        return {
            name: Found(each.st_size, f"{each.st_size}-{each.st_mtime_ns}") for name, each in stats.items()
        }

    def whole(self, name: str) -> bytes | None:
        """See Place."""
        with _file_errors(self.path):
            try:
                refuse_large(self.path / name, (self.path / name).stat().st_size)
                return (self.path / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def span(self, name: str, start: int, count: int) -> bytes:
        """See Place."""
        with _file_errors(self.path), (self.path / name).open("rb") as file:
            file.seek(start)
            return file.read(count)

    def pieces(self, name: str, found: Found, start: int = 0) -> Iterator[bytes]:
        """See Place."""
        with _file_errors(self.path), (self.path / name).open("rb") as file:
            file.seek(start)
            yield from _read(file, piece_bytes(found.size))

    def checksum(self, name: str) -> str | None:
        """See Place. Read, or (in the Hub's cache) what the Hub calls the file's contents."""
        with _file_errors(self.path):
            return self.named_checksum(name) or sha256_of(self.path / name)

    def named_checksum(self, name: str) -> str | None:
        """In the Hub's cache large files are links to what is named by its SHA-256."""
        with _file_errors(self.path):
            path = self.path / name
            blob = path.readlink().name if path.is_symlink() else ""
            return blob if _SHA256.fullmatch(blob) else None

    def put(self, name: str, body: bytes) -> None:
        """See Place."""
        aside = self.path / f".{name}.{os.getpid()}.part"
        with _file_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            aside.write_bytes(body)
            aside.rename(self.path / name)

    def remove(self, name: str) -> None:
        """See Place."""
        with _file_errors(self.path):
            (self.path / name).unlink(missing_ok=True)

    def begun(self, name: str, found: Found) -> int:
        """See Place."""
        with suppress(OSError):
            return min(found.size, _part(self.path, name, found).stat().st_size)
        return 0

    def writer(self, name: str, found: Found) -> Writer:
        """See Place. Parts of other contents are thrown away."""
        return _FileWriter(self.path, name, found)


class _FileWriter:
    """Writes ``.NAME.TAG.part``, which becomes NAME."""

    def __init__(self, folder: Path, name: str, found: Found) -> None:
        self._folder, self._path, self._part = folder, folder / name, _part(folder, name, found)
        with _file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for other in folder.glob(f".{_globbed(name)}.*.part"):
                if other != self._part:
                    other.unlink(missing_ok=True)
            self._file = self._part.open("r+b" if self._part.exists() else "w+b")
            if self._file.seek(0, os.SEEK_END) > found.size:
                self._file.truncate(0)
            self._step = piece_bytes(found.size)

    def kept(self) -> Iterator[bytes]:
        """See Writer."""
        with _file_errors(self._folder):
            self._file.seek(0)
            yield from _read(self._file, self._step)

    def append(self, data: bytes) -> None:
        """See Writer."""
        with _file_errors(self._folder):
            self._file.write(data)

    def finish(self) -> None:
        """See Writer. fsync: after a power cut the sizes alone would look right."""
        with _file_errors(self._folder):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.rename(self._path)

    def abandon(self) -> None:
        """See Writer."""
        with suppress(OSError):
            self._file.close()

    def discard(self) -> None:
        """See Writer."""
        self.abandon()
        with _file_errors(self._folder):
            self._part.unlink(missing_ok=True)


def _part(folder: Path, name: str, found: Found) -> Path:
    tag = hashlib.sha256((found.tag or str(found.size)).encode()).hexdigest()[:16]
    return folder / f".{name}.{tag}.part"


def _globbed(name: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", name)


def _read(file: BinaryIO, step: int) -> Iterator[bytes]:
    while data := file.read(step):
        yield data


def refuse_large(what: object, size: int) -> None:
    """Raises ModelInvalid for what is no small file."""
    if size > MAX_SMALL_BYTES:
        raise ModelInvalid(f"{what}: {size:,} bytes; at most {MAX_SMALL_BYTES:,} are read at once")


@contextmanager
def _file_errors(folder: Path) -> Generator[None]:
    """A full disk, missing rights: nothing that another attempt would change."""
    try:
        yield
    except OSError as exc:
        raise Misconfigured(
            f"{exc.filename or folder}: {exc.strerror or exc}; make room or give this user the right, "
            "and run it again: it goes on from there"
        ) from exc
