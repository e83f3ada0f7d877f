"""Which tokens a watermark favours, and how to find it in a text again. Pure: no torch.

The green list of Kirchenbauer et al. 2023 (algorithm 2), as TGI has it, but for the list itself: a token is
green if a hash of (key, token before, token) is small, so that no permutation of the vocabulary is drawn for
each token, and any implementation of ``noise.py`` finds the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from .noise import M32, noise_bits, noise_key

CHOICE = M32
"""Keys with this choice are the watermark's: no request samples with it."""


def green_key(key: int, before: int) -> tuple[int, int]:
    """The noise key of the green list behind the token ``before``."""
    return noise_key(key, CHOICE, before)


def green_below(gamma: float) -> int:
    """A token is green if its 32 bits are below this."""
    return min(M32, round(gamma * 2.0**32))


def z_score(tokens: Sequence[int], *, gamma: float, key: int) -> float:
    """By how many standard deviations there are more green tokens than chance would have.

    Above 4, a text is watermarked with all but certainty. 0 for less than two tokens.
    """
    count = len(tokens) - 1
    if count < 1:
        return 0.0
    below = green_below(gamma)
    green = sum(noise_bits(green_key(key, before), token) < below for before, token in pairwise(tokens))
    return (green - gamma * count) / math.sqrt(count * gamma * (1 - gamma))
