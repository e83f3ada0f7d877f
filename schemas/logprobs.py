"""Log probabilities of tokens: as numbers, and packed for a job's log.

Packed, in base64: for each token its log probability as float32 and, for each of the likeliest, the id as
uint32 and its log probability as float32; all little-endian, the same number of likely ones for each token.
"""

from __future__ import annotations

import math
import struct
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import InvalidRequest

LEAST = -9999.0
"""What stands for everything below it, minus infinity as well: JSON has no such number. OpenAI's choice."""
_ONE, _TOP = struct.Struct("<f"), struct.Struct("<If")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """How likely the model, by itself, thought a token, and which ones it thought most likely."""

    logprob: float
    top_ids: list[int] = field(default_factory=list[int])
    top_logprobs: list[float] = field(default_factory=list[float])
    """Descending."""


def pack(told: Sequence[TokenLogprobs]) -> str:
    """One piece of a log. All of ``told`` have the same number of likely tokens."""
    body = bytearray()
    for one in told:
        body += _ONE.pack(max(LEAST, one.logprob))
        for token, logprob in zip(one.top_ids, one.top_logprobs, strict=True):
            body += _TOP.pack(token, max(LEAST, logprob))
    return b64encode(body).decode("ascii")


def unpack(packed: str, count: int) -> list[TokenLogprobs]:
    """What ``pack`` made of ``count`` tokens. Raises InvalidRequest for anything else."""
    try:
        body = b64decode(packed, validate=True)
    except ValueError as exc:
        raise InvalidRequest("logprobs is not base64", param="logprobs") from exc
    size = len(body) // count if count else 0
    top, rest = divmod(size - _ONE.size, _TOP.size) if count else (0, 0)
    if len(body) != count * size or top < 0 or rest:
        raise InvalidRequest(
            f"logprobs of {count:,} tokens cannot be {len(body):,} bytes long", param="logprobs"
        )
    return [_unpack(body, index * size, top) for index in range(count)]


def rounded(told: Sequence[TokenLogprobs]) -> list[TokenLogprobs]:
    """As they come back from a log, so that it makes no difference whether they do."""
    return unpack(pack(told), len(told))


def likeliest(choices: Sequence[Sequence[TokenLogprobs]], count: int) -> list[int]:
    """Which ``count`` of these outputs the model, by itself, thought most likely: positions, the best first.

    By mean log probability a token, as OpenAI and TGI choose, so that short ones have no advantage. Equals
    stay in order; one without tokens comes last.
    """
    means = [sum(one.logprob for one in told) / len(told) if told else -math.inf for told in choices]
    return sorted(range(len(means)), key=lambda index: -means[index])[:count]


def _unpack(body: bytes, at: int, top: int) -> TokenLogprobs:
    pairs = list(_TOP.iter_unpack(body[at + _ONE.size : at + _ONE.size + top * _TOP.size]))
    return TokenLogprobs(
        logprob=_ONE.unpack_from(body, at)[0],
        top_ids=[token for token, _ in pairs],
        top_logprobs=[logprob for _, logprob in pairs],
    )
