"""Joining: an object of rows that no worker ends joins its batch, but for rows that have ended before."""

from __future__ import annotations

import hashlib
import time
from itertools import count

from ..schemas import keys
from ..schemas.batch import ResultObject, pack_lines, unpack_lines
from ..schemas.result import Usage
from .batches import Batches, Refused
from .line_merge import line_number
from .object_lines import object_lines
from .store import ResultStore


def join(
    batches: Batches, store: ResultStore, batch_id: str, made: ResultObject, owner: str, token: str = ""
) -> bool:
    """Let ``made``, which is in the store, join. False: it is not the caller's to say (any more).

    Rows that have ended before are rewritten out of it, in an object of ``owner``: an earlier try has told of
    those, and need not have put the same rows together. ``token``: see ``Batches.add``.
    """
    ended = frozenset[int]()
    while rest := [line for line in unpack_lines(made.lines) if line not in ended]:
        if len(rest) < made.rows:
            made = _only(store, batch_id, made, rest, owner)
        answer = batches.add(batch_id, [made], token)
        if not isinstance(answer, Refused):
            return answer is not None
        ended |= answer.lines
    return True


def _only(store: ResultStore, batch_id: str, made: ResultObject, rest: list[int], owner: str) -> ResultObject:
    """Another object, of ``rest`` alone. The first one stays: somebody else may be about to add it."""
    told = made.usage != Usage() or made.times or made.cancelled or made.expired
    assert not told, f"{made.name} has what cannot be cut: usage, times, or rows that were stopped"
    kept = set(rest)
    body = b"".join(line + b"\n" for line in object_lines(store, made.name) if line_number(line) in kept)
    stamp = time.time_ns() // 1_000_000
    names = (keys.rows_object(f"{batch_id}.{owner}", stamp, n, made.kind) for n in count())
    said = {"segment": owner, "rows": len(rest), "bytes": len(body), "lines": pack_lines(rest)}
    said["name"] = next(name for name in names if store.put_new(name, body))
    return made.model_copy(update=said | {"sha256": hashlib.sha256(body).hexdigest()})
