"""The lines of an object in the result store, one by one: in spans, so that its size does not matter."""

from __future__ import annotations

from collections.abc import Iterator

from ..schemas.errors import ResultsDamaged
from .store import ResultStore

SPAN_BYTES = 4 * 1024 * 1024


def object_lines(store: ResultStore, name: str) -> Iterator[bytes]:
    """Each line without its end. Raises ResultsDamaged if there is no such object; and as the store."""
    rest = b""
    for data in object_spans(store, name):
        *lines, rest = (rest + data).split(b"\n")
        yield from lines
    if rest:
        yield rest


def object_spans(store: ResultStore, name: str) -> Iterator[bytes]:
    """Its content in pieces. Raises as ``object_lines``."""
    start = 0
    while True:
        data = store.read(name, start, SPAN_BYTES)
        if data is None:
            raise gone(name)
        if data:
            yield data
        if len(data) < SPAN_BYTES:
            return
        start += SPAN_BYTES


def gone(name: str) -> ResultsDamaged:
    """An object that should be there and is not."""
    return ResultsDamaged(f"{name} is gone from the store; put it back from a backup or a version")
