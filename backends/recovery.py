"""Recovery: a batch whose record was lost with the state server, made again from the result store.

Segments and options are in its ``batch.json``; which rows have ended, counts and usage are in the objects of
finished rows. Objects that no server ever accepted count, too: what a row gives depends on its request alone.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from ..schemas import keys
from ..schemas.batch import BatchStatus, OpenedBatch, ResultObject, pack_lines
from ..schemas.batch_lines import OutputLine
from ..schemas.errors import InvalidRequest, JobNotFound
from ..schemas.result import Usage
from .batches import Batches, Refused
from .line_merge import line_number
from .object_lines import gone
from .store import ResultStore

OURS = "recovered"
KINDS: tuple[Literal["output"], Literal["errors"]] = ("output", "errors")
"""A row that one attempt answered, and another did not, is answered."""


@dataclass(slots=True)
class Recovered:
    """What was found of a batch."""

    rows: int = 0
    """That have ended, and do not run again."""
    total: int = 0
    objects: int = 0
    doubled: int = 0
    """Lines left out, because another object has the row."""


def recover(batches: Batches, store: ResultStore, batch_id: str) -> Recovered:
    """Make the record again, and let the rest run. Safe to repeat after it was interrupted.

    The completion window begins again. Raises InvalidRequest if nothing is lost, JobNotFound if the store has
    nothing of it; BrokerUnavailable, StoreUnavailable: call again.
    """
    opened = _opened(batches, store, batch_id)
    clear_end(batches, store, batch_id)
    batches.open(opened.batch, opened.segments)
    batches.pause(batch_id)  # else rows whose objects come last would run again meanwhile
    found = Recovered(total=opened.batch.request_counts.total)
    stamp = time.time_ns() // 1_000_000
    for kind in KINDS:
        spare = (keys.rows_object(f"{batch_id}.{OURS}", stamp, n, kind) for n in count(1))
        for name in sorted(store.list(keys.batch_results(batch_id))):
            if name.endswith(f".{kind}.jsonl") and not name.startswith(keys.keeper_results(batch_id)):
                _join(batches, store, _Object(batch_id, name, kind), spare, found)
    batches.resume(batch_id)
    return found


def clear_end(batches: Batches, store: ResultStore, batch_id: str) -> None:
    """Take away what a keeper had made of a batch when its record was lost: files that may lack rows, parts
    of them, lines for rows that it gave up on, which run again. Without a manifest nobody was told of them.

    Only before it is opened anew; does nothing to a batch that is known, or final.
    """
    if batches.get(batch_id) is not None or store.exists(keys.batch_file(batch_id, "manifest.json")):
        return
    made = [keys.batch_file(batch_id, f"{kind}.jsonl") for kind in KINDS]
    for name in (*made, *list(store.list(keys.keeper_results(batch_id)))):
        store.remove(name)


def _opened(batches: Batches, store: ResultStore, batch_id: str) -> OpenedBatch:
    known = batches.get(batch_id)
    if known is not None and known.status is not BatchStatus.VALIDATING:
        raise InvalidRequest(
            f"batch {batch_id} is known and {known.status.value}; there is nothing to recover"
        )
    manifest = keys.batch_file(batch_id, "manifest.json")
    if store.exists(manifest):
        raise InvalidRequest(f"batch {batch_id} is final: {manifest} in {store.url} names its files")
    body = store.get(keys.batch_file(batch_id, "batch.json"))
    if body is None:
        raise JobNotFound(f"{store.url} has no batch {batch_id}; check the id and the store")
    return OpenedBatch.from_json(body)


@dataclass(frozen=True, slots=True)
class _Object:
    batch_id: str
    name: str
    kind: Literal["output", "errors"]


def _join(
    batches: Batches, store: ResultStore, found: _Object, spare: Iterator[str], told: Recovered
) -> None:
    """Let the rows of an object that have not ended join; in an object of their own if others have."""
    body = store.get(found.name)
    if body is None:
        raise gone(found.name)
    rows = {line_number(line): line for line in body.splitlines()}
    name, whole = found.name, len(rows)
    while rows:
        answer = batches.add(found.batch_id, [_described(found.kind, name, rows)])
        if answer is None:
            raise InvalidRequest(f"batch {found.batch_id} goes on by now; there is nothing more to recover")
        if not isinstance(answer, Refused):
            told.objects += 1
            break
        rows = {number: line for number, line in rows.items() if number not in answer.lines}
        if rows:
            name = next(name for name in spare if store.put_new(name, _body(rows)))
    told.rows += len(rows)
    told.doubled += whole - len(rows)


def _body(rows: dict[int, bytes]) -> bytes:
    return b"".join(rows[number] + b"\n" for number in sorted(rows))


def _described(kind: Literal["output", "errors"], name: str, rows: dict[int, bytes]) -> ResultObject:
    body, ended = _body(rows), {"batch_cancelled": list[int](), "batch_expired": list[int]()}
    usage = Usage()
    for number in sorted(rows):
        line = OutputLine.from_json(rows[number])
        code = line.error.get("code") if line.error else None
        if code in ended:
            ended[code].append(number)
        if line.response is not None:
            usage = _plus(usage, line.response.body.get("usage") or {})
    return ResultObject(
        segment=OURS,
        kind=kind,
        name=name,
        rows=len(rows),
        bytes=len(body),
        sha256=hashlib.sha256(body).hexdigest(),
        lines=pack_lines(sorted(rows)),
        cancelled=pack_lines(ended["batch_cancelled"]),
        expired=pack_lines(ended["batch_expired"]),
        usage=usage,
    )


def _plus(usage: Usage, said: dict[str, Any]) -> Usage:
    """And what the body of a response says that it took."""
    details: dict[str, int] = said.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=usage.prompt_tokens + said.get("prompt_tokens", 0),
        completion_tokens=usage.completion_tokens + said.get("completion_tokens", 0),
        cached_tokens=usage.cached_tokens + details.get("cached_tokens", 0),
    )
