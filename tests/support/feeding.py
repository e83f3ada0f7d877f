"""Drive a Runner without the scheduler: sequences, scattered blocks, any chunking."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from gristmill.engine.runner import Runner


@dataclass
class Fed:
    """A sequence as the runner reads it, and the logits row of each token it was given."""

    tokens: list[int]
    block_table: list[int] = field(default_factory=list)
    computed: int = 0
    adapter: str | None = None
    rows: list[torch.Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.tokens)


@dataclass
class Piece:
    seq: Fed
    count: int
    guesses: tuple[int, ...] = ()


@dataclass
class Plan:
    work: list[Piece]


def generate(
    runner: Runner, prompts: Sequence[Sequence[int]], steps: int, *, budget: int = 10_000, seed: int = 0
) -> list[Fed]:
    """Greedy: ``steps`` tokens for each prompt, at most ``budget`` tokens a step, mixed."""
    order = random.Random(seed)
    free = list(range(runner.num_blocks))
    order.shuffle(free)
    fed = [Fed(list(prompt)) for prompt in prompts]
    for seq in fed:
        blocks = -(-(len(seq.tokens) + steps) // runner.block_size)
        seq.block_table = [free.pop() for _ in range(blocks)]
    while unfinished := [seq for seq in fed if len(seq.rows) < steps]:
        feed(runner, unfinished, budget)
    return fed


def feed(runner: Runner, sequences: Sequence[Fed], budget: int) -> None:
    """One step, decode first; the best token of each row that comes back joins its sequence."""
    work: list[Piece] = []
    for seq in sorted(sequences, key=lambda seq: len(seq.tokens) - seq.computed):
        count = min(len(seq.tokens) - seq.computed, budget)
        if count:
            work.append(Piece(seq, count))
            budget -= count
    logits = iter(runner.forward(Plan(work)))
    for piece in work:
        piece.seq.computed += piece.count
        if piece.seq.computed == len(piece.seq.tokens):
            row = next(logits).float()
            piece.seq.rows.append(row)
            piece.seq.tokens.append(int(row.argmax()))
    assert next(logits, None) is None, "a logits row that belongs to nobody"
