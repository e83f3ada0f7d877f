"""One step's work as packed arrays: every token of every sequence in a row, nothing padded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

UNKNOWN = 0
"""Stands where a token belongs that only the device knows."""


class Feedable(Protocol):
    """What the runner reads of a sequence."""

    @property
    def tokens(self) -> Sequence[int]: ...
    @property
    def length(self) -> int:
        """Tokens, and those that are coming from the step before."""
        ...

    @property
    def computed(self) -> int: ...
    @property
    def block_table(self) -> Sequence[int]: ...
    @property
    def adapter(self) -> str | None: ...


class Piece(Protocol):
    """Feed ``count`` of ``seq.tokens + guesses``, from ``computed`` on."""

    @property
    def seq(self) -> Feedable: ...
    @property
    def count(self) -> int: ...
    @property
    def guesses(self) -> Sequence[int]: ...


@dataclass(slots=True)
class Fed:
    """A sequence that no scheduler knows: a warm-up's, a trial's, a text's."""

    tokens: Sequence[int]
    block_table: Sequence[int]
    computed: int = 0
    adapter: str | None = None

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class Feed:
    """A piece of one."""

    seq: Fed
    count: int
    guesses: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrays:
    """Rows of all sequences one after another, in plan order: S sequences, T tokens. All on the host."""

    tokens: Int64
    """[T]."""
    positions: Int64
    """[T]: place within the sequence."""
    slots: Int64
    """[T]: block * block_size + offset, where the token's key and value go."""
    wanted: Int64 | None
    """[R]: rows whose logits are wanted. None: every row."""
    first_row: Int32
    counts: Int32
    starts: Int32
    """Position of each sequence's first fed token; keys before it are in the cache already."""
    tables: Int32
    """[S, widest]: block ids; a row's rest is zero, and its keys are never read."""


@dataclass(frozen=True, slots=True)
class Batch:
    """``Arrays`` as attention and decoder take them: tensors on the device, the others still on the host."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    wanted: Tensor | None
    rows: int
    first_row: Int32
    counts: Int32
    starts: Int32
    tables: Int32
    frame: Frame | None = None
    """Where attention finds this step's numbers instead of in the arrays, which then say nothing."""

    @property
    def contexts(self) -> Int32:
        """[S]: keys each sequence has once this step's are written."""
        return self.starts + self.counts


@dataclass(frozen=True, slots=True)
class Frame:
    """Device memory that describes a decode step: one token of each of up to ``rows`` sequences.

    It is overwritten in place, so that a CUDA graph captured over ``step(tokens)`` serves every batch that
    fits: ``fill(batch)``, then replay. Rows behind the batch's are padding: they see no key, write none, and
    zeros come out. Shapes of kernels depend on ``rows`` and ``longest`` alone.
    """

    positions: Tensor
    """[rows] int64."""
    slots: Tensor
    """[rows] int64; -1: padding."""
    contexts: Tensor
    """[rows] int32: keys a sequence has, the step's own included; 0: padding."""
    tables: Tensor
    """[rows, blocks of the longest] int32."""
    longest: int
    """Keys that a sequence may have at most."""
    block_size: int
    memory: Tensor
    """Bytes: all of the above, one behind the other."""

    @classmethod
    def allocate(cls, rows: int, longest: int, block_size: int, device: torch.device) -> Frame:
        """All padding."""
        width = -(-longest // block_size)
        memory = torch.zeros(rows * (8 + 8 + 4 + 4 * width), dtype=torch.uint8, device=device)
        frame = cls(*_cut(memory, rows), longest, block_size, memory)
        frame.slots.fill_(-1)
        return frame

    @property
    def rows(self) -> int:
        return len(self.contexts)

    def fits(self, batch: Arrays | Batch) -> bool:
        alone = len(batch.counts) <= self.rows and len(batch.tokens) == len(batch.counts)
        return alone and int(batch.starts.max()) < self.longest

    def fill(self, batch: Arrays | Batch) -> None:
        """Make this step ``batch``, which fits, in one copy that nothing waits for: it takes its place among
        the device's work. Of the batch only host arrays are read."""
        n, starts, tables = len(batch.counts), batch.starts, batch.tables
        staged = torch.zeros(len(self.memory), dtype=torch.uint8, pin_memory=self.memory.is_cuda)
        at, slots, contexts, blocks = _cut(staged, self.rows)
        slots.fill_(-1)
        places = tables[np.arange(n), starts // self.block_size].astype(np.int64) * self.block_size
        at[:n] = torch.from_numpy(starts)  # pyright: ignore[reportUnknownMemberType]
        slots[:n] = torch.from_numpy(places + starts % self.block_size)  # pyright: ignore[reportUnknownMemberType]
        contexts[:n] = torch.from_numpy(starts + 1)  # pyright: ignore[reportUnknownMemberType]
        blocks[:n, : tables.shape[1]] = torch.from_numpy(tables)  # pyright: ignore[reportUnknownMemberType]
        self.memory.copy_(staged, non_blocking=True)

    def step(self, tokens: Tensor) -> Batch:
        """What the decoder runs. tokens: [rows] int64, on the device; padding takes any token."""
        nothing = np.zeros(0, np.int32)
        return Batch(
            tokens=tokens,
            positions=self.positions,
            slots=self.slots,
            wanted=None,
            rows=self.rows,
            first_row=nothing,
            counts=nothing,
            starts=nothing,
            tables=nothing.reshape(0, 0),
            frame=self,
        )


def _cut(memory: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A frame's bytes as positions, slots, contexts and tables."""
    longs, ints = memory[: 16 * rows].view(torch.int64), memory[16 * rows :].view(torch.int32)
    return longs[:rows], longs[rows:], ints[:rows], ints[rows:].view(rows, -1)


@dataclass(frozen=True, slots=True)
class Coming:
    """What the step before has sampled, or is about to: ids on the device, and whose they are."""

    ids: Tensor
    """[n] int64; negative: not a token, and nobody will care what comes of it."""
    seqs: Sequence[Feedable | None]
    """One for each; None: it is fed another one, which the host knows."""

    def put(self, tokens: Tensor, work: Sequence[Piece]) -> None:
        """Write each id where it is fed. tokens: those of ``work``, on the device."""
        if len(work) == len(self.seqs) and all(
            piece.seq is seq for piece, seq in zip(work, self.seqs, strict=True)
        ):
            torch.clamp_min(self.ids, 0, out=tokens[: len(work)])  # they decode on, nobody else does
            return
        place = {id(seq): index for index, seq in enumerate(self.seqs)}
        pairs: list[tuple[int, int]] = []
        end = 0
        for piece in work:
            end += piece.count
            if piece.seq.computed + piece.count > len(piece.seq.tokens) + len(piece.guesses):
                pairs.append((end - 1, place[id(piece.seq)]))
        if pairs:
            rows, places = tensor(np.array(pairs, np.int64).T.copy(), tokens.device)
            tokens.index_copy_(0, rows, self.ids[places].clamp_min_(0))


def pack(work: Sequence[Piece], block_size: int, device: torch.device, also: Sequence[int] = ()) -> Batch:
    """``gather`` and ``upload``."""
    return upload(gather(work, block_size, also), device)


def upload(arrays: Arrays, device: torch.device) -> Batch:
    """The arrays as a batch on the device; on the CPU in the same memory."""
    return Batch(
        tokens=tensor(arrays.tokens, device),
        positions=tensor(arrays.positions, device),
        slots=tensor(arrays.slots, device),
        wanted=None if arrays.wanted is None else tensor(arrays.wanted, device),
        rows=len(arrays.tokens),
        first_row=arrays.first_row,
        counts=arrays.counts,
        starts=arrays.starts,
        tables=arrays.tables,
    )


def gather(work: Sequence[Piece], block_size: int, also: Sequence[int] = ()) -> Arrays:
    """A plan as arrays. O(tokens + blocks); called once per step.

    ``also``: rows that are wanted, too, behind those of the last tokens that sequences have. UNKNOWN stands
    where a token is fed that is coming.
    """
    n = len(work)
    counts = np.fromiter((piece.count for piece in work), np.int32, n)
    starts = np.fromiter((piece.seq.computed for piece in work), np.int32, n)
    ends = starts + counts
    first_row = np.zeros(n, np.int32)
    np.cumsum(counts[:-1], out=first_row[1:])
    total = int(counts.sum())
    if total == n:
        tokens = np.fromiter((_next(piece.seq) for piece in work), np.int64, n)
        owner, positions = np.arange(n), starts.astype(np.int64)
    else:
        tokens = np.fromiter(_fed(work), np.int64, total)
        owner = np.repeat(np.arange(n), counts)
        positions = np.arange(total) - np.repeat(first_row - starts, counts)
    tables = _tables(work, ends, block_size)
    slots = tables[owner, positions // block_size].astype(np.int64) * block_size + positions % block_size
    lengths = np.fromiter((piece.seq.length for piece in work), np.int32, n)
    known = counts - np.fromiter((len(piece.guesses) for piece in work), np.int32, n)
    wanted = (first_row + known - 1)[starts + known == lengths]
    if also:
        wanted = np.concatenate([wanted, np.asarray(also, np.int32)])
    return Arrays(
        tokens=tokens,
        positions=positions,
        slots=slots,
        wanted=None if len(wanted) == total and not also else wanted.astype(np.int64),
        first_row=first_row,
        counts=counts,
        starts=starts,
        tables=tables,
    )


def tensor(array: Int64 | Int32, device: torch.device) -> Tensor:
    """The array on the device, copied without waiting for the device; on the CPU the same memory."""
    here = torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]  (numpy untyped there)
    if device.type == "cpu":
        return here
    return here.pin_memory().to(device, non_blocking=True)  # torch keeps pinned memory until it is copied


def _fed(work: Sequence[Piece]) -> Iterable[int]:
    for piece in work:
        seq, known = piece.seq, piece.count - len(piece.guesses)
        fed = seq.tokens[seq.computed : seq.computed + known]
        yield from fed
        yield from [UNKNOWN] * (known - len(fed))
        yield from piece.guesses


def _next(seq: Feedable) -> int:
    return seq.tokens[seq.computed] if seq.computed < len(seq.tokens) else UNKNOWN


def guess_rows(work: Sequence[Piece]) -> list[int]:
    """Rows of guesses among all that a step feeds."""
    rows: list[int] = []
    end = 0
    for piece in work:
        end += piece.count
        rows += range(end - len(piece.guesses), end)
    return rows


def _tables(work: Sequence[Piece], ends: Int32, block_size: int) -> Int32:
    """Block tables, cut to the blocks this step reads or writes. Asserts that enough were reserved."""
    needed = -(-ends // block_size)
    tables = np.zeros((len(work), int(needed.max())), np.int32)
    for row, piece, count in zip(tables, work, needed.tolist(), strict=True):
        blocks = piece.seq.block_table
        assert len(blocks) >= count, f"{count} blocks needed, {len(blocks)} in the sequence's table"
        row[:count] = blocks[:count]
    return tables
