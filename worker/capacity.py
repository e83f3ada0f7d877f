"""Which classes of jobs a worker may claim now. Pure: what is in hand and what the engine said go in."""

from __future__ import annotations

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
    """Of the prompt and of all outputs; 0 until the prompt is known."""
    started: bool
    """It has made a token."""
    sequences: int = 1
    """Its choices that have not ended: so many places in the engine."""


def claimable(
    held: Sequence[Held], info: EngineInfo, stats: Stats | None, most: int | None = None
) -> list[Priority]:
    """The classes of which the engine could start another job soon, the most urgent first.

    A job counts only against its own class and those below: what a more urgent one may evict is no obstacle
    to it. So interactive work is claimed by a worker that is full of batch work, and each class is given no
    more once ``max_places`` choices of its own and more urgent ones are here. ``most``:
    max_concurrent_requests.
    """
    places = max_places(info, stats, most)
    return [priority for priority in Priority if _has_room(priority.rank, held, info, stats, places)]


def max_places(info: EngineInfo, stats: Stats | None = None, most: int | None = None) -> int:
    """Choices that a class may have in hand: those that run, and a few so that a place is never empty.

    Fewer run once memory ran out, as ``stats`` says; without it, the most there can be.
    """
    running = stats.max_running if stats and stats.max_running else info.max_num_seqs
    places = running + max(1, running // 16)
    return places if most is None else min(places, most)


def _has_room(rank: int, held: Sequence[Held], info: EngineInfo, stats: Stats | None, places: int) -> bool:
    """Beyond this an idle neighbour should have the next one."""
    firm = [job for job in held if job.rank <= rank]  # the others would make way
    if sum(job.sequences for job in firm) >= places:
        return False
    unstarted = [job for job in firm if not job.started]
    if stats is not None and stats.waiting:
        free = stats.total_blocks - stats.firm_blocks[rank] - _blocks(unstarted, info)
        if free * KV_MARGIN < stats.total_blocks:
            return False
    prefill = sum(job.tokens for job in unstarted)
    step_tokens = stats.step_tokens if stats and stats.step_tokens else info.step_tokens
    return prefill < PREFILL_STEPS * step_tokens and len(unstarted) < MAX_UNSTARTED


def _blocks(jobs: Sequence[Held], info: EngineInfo) -> int:
    """What these need at most, a cautious guess: what they share with those who run is not known yet.

    The prompt's are shared by a job's choices, each of which writes to a last one of its own.
    """
    return sum(-(-job.tokens // info.block_size) + max(0, job.sequences - 1) for job in jobs)
