"""Log probabilities with their tokens' texts, as a result has them. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.tokenizer import Tokenizer
from ..schemas.logprobs import TokenLogprobs
from ..schemas.result import TokenLogprob, TopLogprob


def spelled(
    tokenizer: Tokenizer, tokens: Sequence[int], told: Sequence[TokenLogprobs]
) -> tuple[TokenLogprob, ...]:
    """One record for each token."""
    return tuple(_one(tokenizer, token, one) for token, one in zip(tokens, told, strict=True))


def _one(tokenizer: Tokenizer, token: int, told: TokenLogprobs) -> TokenLogprob:
    pairs = zip(told.top_ids, told.top_logprobs, strict=True)
    text, raw = text_of(tokenizer, token)
    return TokenLogprob(
        id=token,
        token=text,
        logprob=told.logprob,
        raw=raw,
        special=token in tokenizer.special_ids,
        top=tuple(_top(tokenizer, token, logprob) for token, logprob in pairs),
    )


def _top(tokenizer: Tokenizer, token: int, logprob: float) -> TopLogprob:
    text, raw = text_of(tokenizer, token)
    return TopLogprob(id=token, token=text, logprob=logprob, raw=raw, special=token in tokenizer.special_ids)


def text_of(tokenizer: Tokenizer, token: int) -> tuple[str, str | None]:
    """The token's text, and its bytes in hexadecimal where that is not all of it."""
    body = tokenizer.token_bytes(token)
    try:
        return body.decode(), None
    except UnicodeDecodeError:
        return body.decode("utf-8", "replace"), body.hex()
