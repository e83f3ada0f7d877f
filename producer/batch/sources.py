"""Bulk inputs, wherever they are and however they are packed: a path, ``s3://bucket/key`` or ``-``.

A name's end says what is in it: ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet``, and behind that ``.gz`` or
``.zst``. Everything is read once, from beginning to end, in constant memory.
"""

from __future__ import annotations

import gzip
import io
import shutil
import sys
import tempfile
import zlib
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import StrEnum
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from ...schemas.errors import BadInput, InvalidRequest, Misconfigured
from ...schemas.settings import Settings

CHUNK_BYTES = 1 << 17
ZSTD_BYTES = 1 << 12
"""Of packed zstd at a time. Four of them may stand for 128 KiB: these are unpacked to 128 MiB at most."""
STANDARD = "-"
"""Standard input, or standard output."""


class Form(StrEnum):
    """How a file's records are written."""

    JSONL = "jsonl"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"


class Packing(StrEnum):
    """How its bytes are compressed."""

    NONE = ""
    GZIP = "gzip"
    ZSTD = "zstd"


_FORMS = {".csv": Form.CSV, ".tsv": Form.TSV, ".parquet": Form.PARQUET, ".pq": Form.PARQUET}
_PACKINGS = {".gz": Packing.GZIP, ".zst": Packing.ZSTD, ".zstd": Packing.ZSTD}


@dataclass(frozen=True, slots=True)
class FileName:
    """What a name says about its file."""

    text: str
    form: Form
    packing: Packing

    @classmethod
    def of(cls, text: str, form: Form | None = None) -> FileName:
        """``form`` wins over the name. What the name does not say is JSONL, not packed."""
        path = PurePosixPath(text)
        packing = _PACKINGS.get(path.suffix.lower(), Packing.NONE)
        suffix = PurePosixPath(path.stem).suffix if packing else path.suffix
        return cls(text, form or _FORMS.get(suffix.lower(), Form.JSONL), packing)


@contextmanager
def open_input(name: FileName, settings: Settings) -> Generator[BinaryIO]:
    """The file, unpacked. Seekable only if it must be, for Parquet: then it may be copied first.

    Raises BadInput, StoreUnavailable, Misconfigured.
    """
    with ExitStack() as stack:
        raw = stack.enter_context(_open(name.text, settings))
        file = stack.enter_context(_unpacked(raw, name))
        if name.form is Form.PARQUET and not file.seekable():
            copy = stack.enter_context(tempfile.TemporaryFile(prefix="gristmill-"))
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.seek(0)
            file = cast("BinaryIO", copy)
        yield file


def _open(text: str, settings: Settings) -> BinaryIO:
    from ...backends.object_stream import Object, is_object

    if text == STANDARD:
        return sys.stdin.buffer
    if is_object(text):
        return Object(text, settings).open()
    try:
        return Path(text).open("rb")
    except OSError as exc:
        raise BadInput(f"cannot read {text}: {exc.strerror}") from exc


@contextmanager
def _unpacked(raw: BinaryIO, name: FileName) -> Generator[BinaryIO]:
    """``raw`` is closed at the end, unless it is stdin."""
    errors: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error)  # how gzip says so
    file = raw
    if name.packing is Packing.GZIP:
        file = cast("BinaryIO", gzip.GzipFile(fileobj=raw, mode="rb"))
    elif name.packing is Packing.ZSTD:
        zstd = zstandard()
        errors = (*errors, zstd.ZstdError)
        file = io.BufferedReader(_Zstd(raw, zstd.ZstdDecompressor()), CHUNK_BYTES)
    try:
        yield file
    except errors as exc:
        raise BadInput(f"cannot read {name.text}: not whole, or not {name.packing}: {exc}") from exc
    finally:
        if raw is not sys.stdin.buffer:
            raw.close()


class _Zstd(io.RawIOBase):
    """Frames behind one another. The library's own reader takes a file that breaks off for a whole one."""

    def __init__(self, raw: BinaryIO, decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame: Any = None
        self._packed = self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        while not self._ready:
            self._packed = self._packed or memoryview(self._raw.read(CHUNK_BYTES))
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            piece, self._packed = self._packed[:ZSTD_BYTES], self._packed[ZSTD_BYTES:]
            self._ready = memoryview(self._frame.decompress(piece))
            if self._frame.eof:
                rest = len(self._frame.unused_data)
                self._packed, self._frame = memoryview(bytes(piece[len(piece) - rest :]) + self._packed), None
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def zstandard() -> Any:
    """The library. Raises Misconfigured where it is not installed."""
    try:
        return import_module("zstandard")
    except ImportError as exc:
        raise Misconfigured("zstd needs the package zstandard; run: pip install 'gristmill[bulk]'") from exc


def pyarrow_parquet() -> Any:
    """The library. Raises Misconfigured where it is not installed."""
    try:
        return import_module("pyarrow.parquet")
    except ImportError as exc:
        raise Misconfigured("Parquet needs the package pyarrow; run: pip install 'gristmill[bulk]'") from exc


def same_file(one: str, other: str) -> bool:
    """Whether two names are one file, as far as names can say."""
    if STANDARD in (one, other) or "://" in one or "://" in other:
        return one == other and one != STANDARD
    return Path(one).resolve() == Path(other).resolve()


def refuse_same_files(names: dict[str, str | None]) -> None:
    """``names``: what → the file. Raises Misconfigured if two are one: it would overwrite what it reads."""
    given = [(what, name) for what, name in names.items() if name is not None]
    for index, (what, name) in enumerate(given):
        for earlier, other in given[:index]:
            if same_file(name, other):
                raise Misconfigured(f"{earlier} and {what} are the same file ({name}); choose another name")


def parse_form(text: str | None) -> Form | None:
    """A form by its name; None: not said. Raises InvalidRequest."""
    if text is None:
        return None
    try:
        return Form(text.lower())
    except ValueError as exc:
        raise InvalidRequest(f"format {text!r} is none of {', '.join(Form)}", param="format") from exc
