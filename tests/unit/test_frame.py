"""A decode step in memory that stays where it is says what the packed batch says."""

from __future__ import annotations

import torch
from gristmill.engine.batch import Frame, pack

from ..support.feeding import Fed, Piece

CPU = torch.device("cpu")


def decoding(*lengths: int, block: int = 4) -> list[Piece]:
    """One token more for sequences of so many, in blocks that nobody shares."""
    return [
        Piece(Fed([0] * n, [10 * i + j for j in range(-(-n // block))], n - 1), 1)
        for i, n in enumerate(lengths)
    ]


def test_a_frame_holds_the_batch_and_padding_behind_it() -> None:
    frame = Frame.allocate(5, 16, 4, CPU)
    parts = (frame.positions, frame.slots, frame.contexts, frame.tables)
    places = [part.data_ptr() for part in parts]
    for lengths in ([16, 1, 5, 4, 8], [3, 12]):
        batch = pack(decoding(*lengths), 4, CPU)
        assert frame.fits(batch)
        frame.fill(batch)
        step, n = frame.step(torch.zeros(5, dtype=torch.int64)), len(lengths)
        assert torch.equal(step.positions[:n], batch.positions)
        assert torch.equal(step.slots[:n], batch.slots)
        assert frame.contexts.tolist() == lengths + [0] * (5 - n)
        assert (step.slots[n:] == -1).all()
        for row, blocks in zip(frame.tables.tolist(), batch.tables.tolist(), strict=False):
            assert row[: len(blocks)] == blocks
    assert places == [
        part.data_ptr() for part in (frame.positions, frame.slots, frame.contexts, frame.tables)
    ]


def test_what_has_too_many_rows_or_keys_does_not_fit() -> None:
    frame = Frame.allocate(2, 8, 4, CPU)
    assert frame.fits(pack(decoding(8, 8), 4, CPU))
    assert not frame.fits(pack(decoding(9), 4, CPU))
    assert not frame.fits(pack(decoding(1, 1, 1), 4, CPU))
    assert not frame.fits(pack([Piece(Fed([0] * 2, [0]), 2)], 4, CPU))
