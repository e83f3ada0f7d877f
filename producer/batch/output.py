"""Files that are written for users: a path, ``s3://bucket/key`` or ``-``; packed as their name says.

A file appears when it is whole, and an older one stands until then; standard output is not like that.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ...schemas.errors import Misconfigured
from ...schemas.settings import Settings
from .sources import STANDARD, FileName, Packing, zstandard


class Target(Protocol):
    """Somewhere to write to."""

    def write(self, data: bytes) -> None: ...

    def finish(self) -> None:
        """Durable on return, and visible."""
        ...

    def abandon(self) -> None:
        """Leave what was there before."""
        ...


def write(name: str, lines: Iterable[bytes], settings: Settings) -> int:
    """Write all lines, at once or not at all; how many.

    Raises Misconfigured when a disk, a directory or a bucket refuses, StoreUnavailable when S3 is away.
    """
    with opened(name, settings) as target:
        count = 0
        for line in lines:
            target.write(line)
            count += 1
    return count


@contextmanager
def opened(name: str, settings: Settings) -> Generator[Target]:
    """What writes the file; it is whole when the block ends without an error."""
    target = _packed(FileName.of(name).packing, _target(name, settings))
    try:
        yield target
        target.finish()
    except BaseException:
        target.abandon()
        raise


def check_target(name: str, what: str, settings: Settings) -> None:
    """Try whether it can be written, before hours of work depend on it. Raises Misconfigured."""
    from ...backends.object_stream import Object, is_object

    if FileName.of(name).packing is Packing.ZSTD:
        zstandard()
    if name == STANDARD:
        return
    if is_object(name):
        Object(name, settings).check()
        return
    path = _real(name)
    directory = path.parent
    if path.is_dir():
        raise Misconfigured(f"{what} {name} is a directory; name a file")
    if special(name):
        if not os.access(name, os.W_OK):
            raise Misconfigured(f"{what} {name} cannot be written to")
        return
    if not directory.is_dir():
        raise Misconfigured(f"{what} {name}: there is no directory {directory}; make it first")
    try:
        with tempfile.TemporaryFile(dir=directory, prefix=".gristmill-"):
            pass
    except OSError as exc:
        raise Misconfigured(f"{what} {name}: cannot write to {directory}: {exc.strerror}") from exc


def remove(name: str) -> None:
    """Take away the file of an earlier run that has nothing to say any more; no object, and no device."""
    if name != STANDARD and "://" not in name and not special(name):
        with suppress(OSError):
            Path(name).unlink()


def special(name: str) -> bool:
    """Whether it is a device or a pipe, like /dev/null: written into, and never replaced."""
    path = Path(name)
    return path.exists() and not path.is_file() and not path.is_dir()


def _real(name: str) -> Path:
    """Where a file is, for it is replaced there; a link to it stays."""
    return Path(os.path.realpath(name))


def _target(name: str, settings: Settings) -> Target:
    from ...backends.object_stream import Object, is_object

    if name == STANDARD:
        return _Standard()
    if is_object(name):
        return Object(name, settings).create()
    return _File(Path(name) if special(name) else _real(name))


class _Standard:
    """stdout."""

    def write(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)

    def finish(self) -> None:
        sys.stdout.buffer.flush()

    abandon = finish


class _File:
    """Written aside, then renamed; what is ``special`` is written as it is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._aside = None if special(str(path)) else path.with_name(f".{path.name}.{os.getpid()}.part")
        with self._errors():
            self._file: BinaryIO = (self._aside or path).open("wb")

    def write(self, data: bytes) -> None:
        with self._errors():
            self._file.write(data)

    def finish(self) -> None:
        with self._errors():
            self._file.flush()
            if self._aside is None:
                self._file.close()
                return
            os.fsync(self._file.fileno())
            self._file.close()
            if self._path.exists():
                shutil.copymode(self._path, self._aside)
            self._aside.replace(self._path)

    def abandon(self) -> None:
        with suppress(OSError):
            self._file.close()
        if self._aside is not None:
            with suppress(OSError):
                self._aside.unlink()

    @contextmanager
    def _errors(self) -> Generator[None]:
        try:
            yield
        except OSError as exc:
            raise Misconfigured(
                f"cannot write {self._path}: {exc.strerror}; the results are kept: make room, ask again"
            ) from exc


class _Packer:
    """Packs what goes to another target."""

    def __init__(self, target: Target, packer: Any) -> None:
        self._target, self._packer = target, packer

    def write(self, data: bytes) -> None:
        if packed := self._packer.compress(data):
            self._target.write(packed)

    def finish(self) -> None:
        self._target.write(self._packer.flush())
        self._target.finish()

    def abandon(self) -> None:
        self._target.abandon()


def _packed(packing: Packing, target: Target) -> Target:
    if packing is Packing.GZIP:
        return _Packer(target, zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS | 16))
    if packing is Packing.ZSTD:
        return _Packer(target, zstandard().ZstdCompressor().compressobj())
    return target
