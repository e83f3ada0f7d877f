"""What rank 0 tells the others. They cross the same kind of pipe as the consumer's messages (``pipe.py``)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Run:
    """Rows ``first : end`` use the adapter whose files have this digest."""

    first: int
    end: int
    digest: str


@dataclass(frozen=True, slots=True)
class Feed:
    """Run this step. The arrays of ``batch.Arrays``, in their bytes; ``tables`` has a row for each count."""

    tokens: bytes
    positions: bytes
    slots: bytes
    wanted: bytes | None
    first_row: bytes
    counts: bytes
    starts: bytes
    tables: bytes
    scored: int
    """How many of the wanted rows, the last ones, are a scorer's."""
    fed: list[Run]
    wanted_rows: list[Run]
    """Adapters of rows among those that are wanted."""


@dataclass(frozen=True, slots=True)
class Adapt:
    """Read an adapter, and forget those that are not ``kept``."""

    directory: str
    digest: str
    kept: list[str]
    """Digests."""


@dataclass(frozen=True, slots=True)
class Reserve:
    """Make room for so many blocks in the host's memory."""

    slots: int


@dataclass(frozen=True, slots=True)
class Save:
    """Copy a block to a slot there …"""

    block: int
    slot: int


@dataclass(frozen=True, slots=True)
class Load:
    """… and back."""

    slot: int
    block: int


Told = Feed | Adapt | Reserve | Save | Load
