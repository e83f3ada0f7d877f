"""Assemble: accepted objects of finished rows become one file of lines, create-only and with its checksum.

Dying at any moment is safe: the file appears whole or not at all, who comes next begins again, and whoever
finds it standing reads its checksum from it. The same objects give the same bytes, so it does not matter who
wrote them. Memory is flat in the number of rows: READ_AHEAD_BYTES and a few parts, or ``line_merge``'s bound.
"""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ..schemas.batch_manifest import BatchFile
from ..schemas.errors import ResultsDamaged
from . import line_merge
from .line_merge import Piece, check_piece, merged
from .object_lines import gone, object_spans
from .object_writer import ObjectWriter
from .store import ResultStore

READ_AHEAD_BYTES = 48 * 1024 * 1024
READERS = 16
CHUNK_BYTES = 1024 * 1024

Scratch = Callable[[int], str]
"""The n-th name for what is only there while a file is assembled."""


def assemble(
    store: ResultStore, name: str, pieces: Sequence[Piece], *, in_order: bool, scratch: Scratch
) -> BatchFile:
    """Make the file ``name`` of all lines of ``pieces``; ``in_order``: in the order of the input.

    Otherwise in theirs, those first that S3 can copy within itself. Raises ResultsDamaged if a piece is not
    what was accepted, or the name is taken by something else; StoreUnavailable, Misconfigured.
    """
    rows, size = sum(piece.rows for piece in pieces), sum(piece.size for piece in pieces)
    if store.size(name) is not None:
        return _standing(store, name, rows, size)
    if not in_order:
        return _concatenated(store, name, pieces)

    joined: list[str] = []

    def join(group: Sequence[Piece]) -> Piece:
        made = _in_order(store, scratch(len(joined)), group)
        joined.append(made.name)
        first, last = min(piece.first for piece in group), max(piece.last for piece in group)
        return Piece(made.name, made.bytes, made.rows, first, last, made.sha256)

    whole = _in_order(store, name, line_merge.fewer(pieces, join))
    for each in joined:
        store.remove(each)
    return whole


def lines(store: ResultStore, piece: Piece) -> Iterator[bytes]:
    """The finished rows of one object, each a line with its end. Raises ResultsDamaged."""
    yield from io.BytesIO(_read(store, piece))


def _concatenated(store: ResultStore, name: str, pieces: Sequence[Piece]) -> BatchFile:
    size = sum(piece.size for piece in pieces)
    with store.writer(name, size) as writer:
        least = writer.copy_bytes
        copied_first = sorted(pieces, key=lambda piece: least is not None and piece.size < least)

        def copy(take: Callable[[bytes], object]) -> int:
            count = 0
            for piece, body in _bodies(store, copied_first):
                take(body)
                writer.append_object(piece.name, body)
                count += piece.rows
            return count

        return _written(store, name, size, writer, copy)


def _in_order(store: ResultStore, name: str, pieces: Sequence[Piece]) -> BatchFile:
    size, rows = sum(piece.size for piece in pieces), sum(piece.rows for piece in pieces)
    if store.size(name) is not None:  # joined before whoever did it died
        return _standing(store, name, rows, size)
    with store.writer(name, size) as writer:

        def copy(take: Callable[[bytes], object]) -> int:
            count, chunk, held = 0, list[bytes](), 0
            for line in merged(store, pieces):
                chunk.append(line)
                count, held = count + 1, held + len(line)
                if held >= CHUNK_BYTES:
                    data = b"".join(chunk)
                    take(data)
                    writer.append(data)
                    chunk, held = [], 0
            data = b"".join(chunk)
            take(data)
            writer.append(data)
            return count

        return _written(store, name, size, writer, copy)


def _written(
    store: ResultStore,
    name: str,
    size: int,
    writer: ObjectWriter,
    copy: Callable[[Callable[[bytes], object]], int],
) -> BatchFile:
    """What ``copy`` hands to the writer, and to its argument for a digest, made durable; it returns rows."""
    digest = hashlib.sha256()
    rows = copy(digest.update)
    made = BatchFile(name=name, rows=rows, bytes=size, sha256=digest.hexdigest())
    if writer.commit():
        return made
    standing = _standing(store, name, rows, size)
    if standing.sha256 != made.sha256:
        raise _taken(name, "other content")
    return standing


def _standing(store: ResultStore, name: str, rows: int, size: int) -> BatchFile:
    """A file that an earlier attempt finished, read for its checksum."""
    held = store.size(name)
    if held != size:
        raise _taken(name, f"{held or 0:,} bytes where {size:,} were accepted")
    digest, count = hashlib.sha256(), 0
    for data in object_spans(store, name):
        digest.update(data)
        count += data.count(b"\n")
    if count != rows:
        raise _taken(name, f"{count:,} lines where {rows:,} were accepted")
    return BatchFile(name=name, rows=rows, bytes=size, sha256=digest.hexdigest())


def _taken(name: str, why: str) -> ResultsDamaged:
    return ResultsDamaged(f"{name} stands already, with {why}; move it away, and it is made anew")


def _bodies(store: ResultStore, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, bytes]]:
    """Each piece with its content, checked; the next ones are being read, as far as memory allows."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="assemble") as threads:
        under_way: deque[tuple[Piece, Future[bytes]]] = deque()
        held = 0
        for piece in pieces:
            while under_way and (held + piece.size > READ_AHEAD_BYTES or len(under_way) >= READERS):
                done, body = under_way.popleft()
                held -= done.size
                yield done, body.result()
            held += piece.size
            under_way.append((piece, threads.submit(_read, store, piece)))
        while under_way:
            done, body = under_way.popleft()
            yield done, body.result()


def _read(store: ResultStore, piece: Piece) -> bytes:
    body = store.get(piece.name)
    if body is None:
        raise gone(piece.name)
    check_piece(piece, rows=body.count(b"\n"), size=len(body), sha256=hashlib.sha256(body).hexdigest())
    return body
