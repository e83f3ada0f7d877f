"""A trial at start: transformers' code with our attention must say what transformers' code says by itself.

What a model computes beside attention we do not see. A state that is carried from token to token, positions
that are counted by row: whatever packing and chunking would break shows here, not in what is generated.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..attention.backend import Attention
from ..batch import Fed, Feed, pack
from .fallback import Fallback

STEPS = (((0, 11),), ((0, 9), (1, 10)), ((0, 4), (1, 6)), ((1, 1),))
"""How many tokens of which of two prompts each step feeds."""
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.1, torch.bfloat16: 0.25}
"""How far the logits of a row may be off: root mean square over standard deviation. Where something is
missing it is about one."""
TIMES_THEIR_OWN = 3
"""How much of what two of transformers' own attentions differ by is allowed, where that is more: models that
amplify rounding do so for everybody."""
AT_MOST = 0.75


def try_out(decoder: Fallback, attention: Attention, cache: Callable[[int], None], *, exact: bool) -> None:
    """Raise ModelInvalid if the two differ. ``cache`` makes blocks; ``exact``: in the engine's dtype."""
    prompts = _prompts(decoder, attention.block_size)
    cache(1 + max(block for prompt in prompts for block in prompt.block_table))
    ours: list[list[Tensor]] = [[] for _ in prompts]
    for steps in STEPS:
        work = [Feed(prompts[which], count) for which, count in steps]
        for (which, count), said in zip(steps, _feed(decoder, attention, work), strict=True):
            ours[which].append(said)
            prompts[which].computed += count
    theirs = [decoder.theirs(prompt.tokens) for prompt in prompts]
    worst = max(_apart(torch.cat(mine), said) for mine, said in zip(ours, theirs, strict=True))
    allowed = TOLERANCE[decoder.dtype if exact else torch.bfloat16]
    if worst > allowed and decoder.has_sdpa:
        also = [decoder.theirs(prompt.tokens, "sdpa") for prompt in prompts]
        own = max(_apart(b, a) for a, b in zip(theirs, also, strict=True))
        allowed = min(max(allowed, TIMES_THEIR_OWN * own), AT_MOST)
    if not worst <= allowed:
        kinds = ", ".join(sorted(set(decoder.layer_types) - {"full_attention", "sliding_attention"}))
        raise decoder.config.invalid(
            f"model type {decoder.spec.family!r} cannot be run in pieces: with our attention its logits "
            f"are {worst:.2g} standard deviations off transformers' own ({allowed:g} is allowed), so it does "
            f"more with tokens than attend to them{f' (layers of type {kinds})' if kinds else ''}; "
            "serve this model elsewhere"
        )


def _feed(decoder: Fallback, attention: Attention, work: Sequence[Feed]) -> Sequence[Tensor]:
    """One step; the logits of every row of each piece."""
    rows = sum(piece.count for piece in work)
    hidden = decoder.forward(pack(work, attention.block_size, decoder.device, range(rows)), attention)
    return torch.split(decoder.logits(hidden[-rows:]), [piece.count for piece in work])


def _prompts(decoder: Fallback, block_size: int) -> list[Fed]:
    draw, lengths = random.Random(0), [0, 0]
    for which, count in (step for steps in STEPS for step in steps):
        lengths[which] += count
    prompts: list[Fed] = []
    for which, length in enumerate(lengths):
        tokens = [draw.randrange(decoder.spec.vocab_size) for _ in range(length)]
        blocks = -(-length // block_size)
        prompts.append(Fed(tokens, [2 * i + which for i in range(blocks)]))
    return prompts


def _apart(ours: Tensor, theirs: Tensor) -> float:
    """Of the worst row."""
    ours, theirs = ours.float(), theirs.float()
    return ((ours - theirs).square().mean(-1).sqrt() / theirs.std(-1)).max().item()
