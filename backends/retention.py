"""Retention: what in the result store is old enough to go, and why.

Ages are by the store's own times. How long a batch is kept its own ``batch.json`` says, so a state server
that lost its data, or is the wrong one, takes nothing along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Literal

from ..schemas import keys
from ..schemas.batch import DAY_S, Batch, OpenedBatch
from ..schemas.errors import BadInput
from ..schemas.settings import Settings
from .calls import EXPIRY_GRACE_S
from .state import State
from .store import LeftOver, ResultStore, Stored

PAGE = 500
UNOPENED_S = 7 * DAY_S
"""Segments of a batch that was never opened: whoever uploaded them has given up."""
FOR_EVER_S = 1e12
LEFT_OVER_S = DAY_S
"""An upload that has not ended by then has nobody who goes on with it."""


@dataclass(frozen=True, slots=True)
class Old:
    """Something to be removed: a name, or all names with a prefix that ends in ``/``."""

    kind: Literal["result", "request", "batch", "left_over"]
    name: str
    objects: int
    size: int
    age_s: float
    why: str
    left_over: LeftOver | None = None


def find_old(store: ResultStore, state: State, settings: Settings, now: float) -> Iterator[Old]:
    """Everything that may go at ``now``, unix seconds. Raises StoreUnavailable, BrokerUnavailable.

    Memory: a page of names, and what is summed up of each batch.
    """
    for folder in ("results/", "jobs/", "batches/"):  # a bucket may have other users
        for left in store.left_overs(folder):
            if (age := now - left.begun_at) > LEFT_OVER_S:
                yield Old("left_over", left.name, 1, left.size, age, "its writer is gone", left)
    if settings.results_keep_s is not None:
        why = f"kept for {settings.results_keep_s / DAY_S:g} days"
        yield from _ended(store, state, "result", now, settings.results_keep_s, why)
    yield from _ended(store, state, "request", now, settings.job_ttl_s + EXPIRY_GRACE_S, "its job has ended")
    yield from _old_batches(store, state, now)


def remove(store: ResultStore, old: Old) -> None:
    """Take it away. What a batch ended in goes last: if this is interrupted, it is found again."""
    if old.left_over is not None:
        store.sweep(old.left_over)
    elif old.name.endswith("/"):
        own = {f"{old.name}{name}" for name in ("manifest.json", "batch.json")}
        rest = (name for name in store.list(old.name) if name not in own)
        while page := list(islice(rest, PAGE)):
            store.remove_many(page)
        store.remove_many(sorted(own, reverse=True))
    else:
        store.remove(old.name)


_PREFIXES: dict[Literal["result", "request"], str] = {"result": "results/", "request": "jobs/"}


def _ended(
    store: ResultStore,
    state: State,
    kind: Literal["result", "request"],
    now: float,
    keep_s: float,
    why: str,
) -> Iterator[Old]:
    """Objects of jobs that are older than that, but for jobs that have not ended."""
    found = (each for each in store.stored(_PREFIXES[kind]) if now - each.modified_at > keep_s)
    while page := list(islice(found, PAGE)):
        named = [(each, _job_of(each.name, _PREFIXES[kind])) for each in page]
        states = state.states([job_id for _, job_id in named])
        for (each, _), now_is in zip(named, states, strict=True):
            if now_is is None or now_is.final:
                yield Old(kind, each.name, 1, each.size, now - each.modified_at, why)


def _job_of(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).removesuffix(".json").replace("/", ".")


@dataclass(slots=True)
class _Sum:
    """Of all objects of a batch."""

    objects: int = 0
    size: int = 0
    newest: float = 0.0

    @classmethod
    def of(cls, found: Iterable[Stored]) -> _Sum:
        whole = cls()
        for each in found:
            whole.objects += 1
            whole.size += each.size
            whole.newest = max(whole.newest, each.modified_at)
        return whole


def _old_batches(store: ResultStore, state: State, now: float) -> Iterator[Old]:
    """Those whose time is over, but for what a batch that stays is a retry of: both are read as one."""
    found: dict[str, tuple[Old | None, str | None]] = {}
    for batch_id, group in groupby(store.stored("batches/"), key=lambda each: each.name.split("/")[1]):
        found[batch_id] = _looked_at(store, state, batch_id, _Sum.of(group), now)
    read: set[str] = set()
    for old, before in list(found.values()):
        while old is None and before is not None and before not in read:
            read.add(before)
            before = found.get(before, (None, None))[1]
    for batch_id, (old, _) in found.items():
        if old is not None and batch_id not in read:
            yield old


def _looked_at(
    store: ResultStore, state: State, batch_id: str, whole: _Sum, now: float
) -> tuple[Old | None, str | None]:
    """What is to go of it, and what it is a retry of. A batch that is known is never old: the state server
    forgets it when its time is over."""
    if (known := state.batches.get(batch_id)) is not None:
        return None, known.retry_of
    age, opened = now - whole.newest, _opened(store, batch_id)
    before = None if opened is None else opened.retry_of
    if opened is None:
        keep_s, why = UNOPENED_S, "it was never opened"
    elif store.exists(keys.batch_file(batch_id, "manifest.json")):
        keep_s = opened.options.retention_s
        why = f"it ended, and was to be kept for {keep_s / DAY_S:g} days"
    else:  # it failed, or its record was lost: then it may be recovered for as long as it would have run
        keep_s = opened.options.retention_s + opened.completion_window_s
        why = f"nothing is known of it, and it has no files after {keep_s / DAY_S:g} days"
    if age <= keep_s:
        return None, before
    return Old("batch", f"batches/{batch_id}/", whole.objects, whole.size, age, why), before


def _opened(store: ResultStore, batch_id: str) -> Batch | None:
    body = store.get(keys.batch_file(batch_id, "batch.json"))
    try:
        return None if body is None else OpenedBatch.from_json(body).batch
    except BadInput:  # of a version that we do not know, or no batch of ours: not ours to take away
        return Batch(id="unknown", model="-", completion_window_s=FOR_EVER_S)
