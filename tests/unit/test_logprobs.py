"""Log probabilities: which tokens are told depends on their scores alone."""

from __future__ import annotations

import pytest
import torch
from gristmill.engine.logprobs import _best  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("most", [0, 1, 5, 299, 300])
def test_of_equally_likely_tokens_the_lowest_ids_are_told(most: int) -> None:
    """Deterministic mode told others beside a neighbour: in bfloat16 many are equal, and topk takes any."""
    draw = torch.Generator().manual_seed(1)
    scores = torch.randint(-9, 9, (40, 300), generator=draw).float()
    scores[3] = torch.arange(300.0)
    scores[4] = 0.0
    values, ids = _best(scores, most)
    for row, found, told in zip(scores.tolist(), ids.tolist(), values.tolist(), strict=True):
        assert found == sorted(range(300), key=lambda token: (-row[token], token))[:most]
        assert told == [row[token] for token in found]
