"""Which classes of jobs a worker may claim now. Pure: what is in hand and what the engine said go in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..engine.messages import EngineInfo, Stats
from ..schemas.job import Priority

PREFILL_STEPS = 4
"""Prompts that were claimed and have not started may be so many steps' work …"""
MAX_UNSTARTED = 64
"""… and so many jobs."""
KV_MARGIN = 20
"""With jobs waiting in the engine, no more come once less than this part of the cache is free: 1/20."""


@dataclass(frozen=True, slots=True)
class Held:
    """A job in hand that the engine still works on, or is about to."""

    rank: int
    """Of its class; 0 is the most urgent."""
    tokens: int
    """Of the prompt; 0 until that is known, and once it has started."""
    started: bool
    """It has made a token, in this attempt or an earlier one."""
    sequences: int = 1
    """Its choices that have not ended: so many places in the engine."""


@dataclass(slots=True)
class Room:
    """What a class may still be given, at one moment; ``take`` counts down."""

    sequences: int
    unstarted: int
    tokens: int
    """Of prompts."""
    blocks: float
    """Of the cache; infinite as long as nobody waits for any."""
    block_size: int

    def take(self, tokens: int, sequences: int) -> bool:
        """Whether one more may start; then it is counted. As for a claim, its own size is no obstacle."""
        if self.sequences <= 0 or self.unstarted <= 0 or self.tokens <= 0 or self.blocks < 0:
            return False
        self.sequences -= sequences
        self.unstarted -= 1
        self.tokens -= tokens
        self.blocks -= -(-tokens // self.block_size) + sequences - 1
        return True


def claimable(
    held: Sequence[Held], info: EngineInfo, stats: Stats | None, most: int | None = None
) -> list[Priority]:
    """The classes of which the engine could start another job soon, the most urgent first.

    A job counts only against its own class and those below: what a more urgent one may evict is no obstacle
    to it. So interactive work is claimed by a worker that is full of batch work, and each class is given no
    more once ``max_places`` choices of its own and more urgent ones are here. ``most``:
    max_concurrent_requests.
    """
    return [priority for priority in Priority if room(priority.rank, held, info, stats, most).take(0, 0)]


def max_places(info: EngineInfo, stats: Stats | None = None, most: int | None = None) -> int:
    """Choices that a class may have in hand: those that run, and a few so that a place is never empty.

    Fewer run once memory ran out, as ``stats`` says; without it, the most there can be.
    """
    running = stats.max_running if stats and stats.max_running else info.max_num_seqs
    places = running + max(1, running // 16)
    return places if most is None else min(places, most)


def room(
    rank: int, held: Sequence[Held], info: EngineInfo, stats: Stats | None, most: int | None = None
) -> Room:
    """What more of a class could start soon. Beyond this an idle neighbour should have the next one."""
    firm = [job for job in held if job.rank <= rank]  # the others would make way
    unstarted = [job for job in firm if not job.started]
    blocks = math.inf
    if stats is not None and stats.waiting:
        free = stats.total_blocks - stats.firm_blocks[rank] - _blocks(unstarted, info)
        blocks = free - math.ceil(stats.total_blocks / KV_MARGIN)
    step_tokens = stats.step_tokens if stats and stats.step_tokens else info.step_tokens
    return Room(
        sequences=max_places(info, stats, most) - sum(job.sequences for job in firm),
        unstarted=MAX_UNSTARTED - len(unstarted),
        tokens=PREFILL_STEPS * step_tokens - sum(job.tokens for job in unstarted),
        blocks=blocks,
        block_size=info.block_size,
    )


def _blocks(jobs: Sequence[Held], info: EngineInfo) -> int:
    """What these need at most, a cautious guess: what they share with those who run is not known yet.

    The prompt's are shared by a job's choices, each of which writes to a last one of its own.
    """
    return sum(-(-job.tokens // info.block_size) + max(0, job.sequences - 1) for job in jobs)
