"""A scheduler driven as the engine does it, with the same token for everybody."""

from __future__ import annotations

from collections.abc import Iterable

from gristmill.engine.scheduler import Scheduler
from gristmill.engine.sequence import Sequence


def tokens_fed(it: Scheduler, seqs: Iterable[Sequence] = ()) -> int:
    """Add ``seqs`` and run until everybody has ended; how many tokens went through the model."""
    for seq in seqs:
        it.add(seq)
    fed = 0
    while it.has_work:
        plan = it.plan()
        fed += plan.tokens
        sampling = [work.seq for work in plan.work if work.samples]
        it.advance(plan)
        for seq in sampling:
            seq.tokens.append(7)
            if len(seq.tokens) == seq.limit:
                it.remove(seq)
        it.check()
    return fed
