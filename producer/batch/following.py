"""Follow a batch: what happened so far, then what happens, until it is final."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator

from ...backends.state import AsyncState
from ...schemas.batch import Batch, BatchEvent, StatusChanged
from ...schemas.events import EntryId
from ..link import Link
from .answers import find

PAGE = 500
SILENCE_S = 15.0
"""Pub/sub promises nothing: so often the log is read, whatever the channel says."""


def follow(link: Link, batch_id: str, last: EntryId | None) -> Iterator[tuple[EntryId, BatchEvent]]:
    """Every event once, in order, from after ``last``. Raises JobNotFound, BrokerUnavailable."""
    batches = link.state.batches
    find(link, batch_id)
    final = False
    with batches.subscribe(batch_id) as channel:
        while True:
            page = batches.read_events(batch_id, last, PAGE)
            for last, event in page:
                yield last, event
                if isinstance(event, StatusChanged) and event.status.final:
                    return
            if page:
                continue
            if final:  # its log is over before it was followed
                return
            final = find(link, batch_id).status.final  # then what it said last may have come meanwhile
            if not final:
                channel.get(SILENCE_S)


async def follow_async(
    state: AsyncState, batch_id: str, last: EntryId | None, look: Callable[[], Awaitable[Batch]]
) -> AsyncGenerator[tuple[EntryId, BatchEvent]]:
    """``follow`` for asyncio. ``look``: where it stands; raises JobNotFound."""
    await look()
    final = False
    async with state.subscribe_batch(batch_id) as channel:
        while True:
            page = await state.batch_events(batch_id, last, PAGE)
            for last, event in page:
                yield last, event
                if isinstance(event, StatusChanged) and event.status.final:
                    return
            if page:
                continue
            if final:
                return
            final = (await look()).status.final
            if not final:
                await channel.get_raw(SILENCE_S)
