"""What a request wishes of the sampler, as the engine takes it: texts become tokens, and limits are kept."""

from __future__ import annotations

from functools import lru_cache

from ..engine.messages import Dry, EngineInfo, Processors, Watermark
from ..engine.tokenizer import Tokenizer
from ..schemas.errors import InvalidRequest, with_a_greater
from ..schemas.sampling import SamplingParams
from .settings import WorkerSettings

KEPT_TEXTS = 1024
"""Texts whose tokens are remembered: many requests have the same ones."""


def check_limits(sampling: SamplingParams, settings: WorkerSettings) -> None:
    """Raises InvalidRequest naming the limit, the value and the knob."""
    wanted = (
        ("stop", len(sampling.stop), "max_stop_sequences", "stop strings"),
        ("logprobs", sampling.logprobs or 0, "max_top_n_tokens", "likely tokens"),
        ("prompt_logprobs", sampling.prompt_logprobs or 0, "max_top_n_tokens", "likely tokens"),
        ("n" if sampling.best_of is None else "best_of", sampling.choices, "max_best_of", "choices"),
    )
    for param, value, knob, things in wanted:
        limit: int = getattr(settings, knob)
        if value > limit:
            raise InvalidRequest(
                f"{param} asks for {value:,} {things} and this worker allows {limit:,} ({knob}); "
                f"ask for at most {limit:,}, or {with_a_greater(knob)}",
                param=param,
            )


def check_ids(sampling: SamplingParams, info: EngineInfo) -> None:
    """Raises InvalidRequest for a token id the model does not have."""
    for name, ids in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", tuple(sampling.logit_bias)),
        ("allowed_token_ids", sampling.allowed_token_ids or ()),
    ):
        worst = max(ids, default=0)
        if worst >= info.vocab_size:
            raise InvalidRequest(
                f"{name} holds {worst:,} and the vocabulary ends at {info.vocab_size - 1:,}", param=name
            )


def processors(
    sampling: SamplingParams, tokenizer: Tokenizer, vocab_size: int, settings: WorkerSettings
) -> Processors | None:
    """None: nothing that touches logits is asked for."""
    dry = None
    if sampling.dry_multiplier > 0.0:
        found = [_breakers(tokenizer, text, vocab_size) for text in sampling.dry_sequence_breakers]
        dry = Dry(
            multiplier=sampling.dry_multiplier,
            base=sampling.dry_base,
            allowed_length=sampling.dry_allowed_length,
            range=sampling.dry_range,
            breakers=[list(one) for one in dict.fromkeys(one for some in found for one in some)],
        )
    mark = None
    if sampling.watermark:
        mark = Watermark(gamma=settings.watermark_gamma, delta=settings.watermark_delta)
    words = [word for text in sampling.bad_words for word in _spellings(tokenizer, text, vocab_size)]
    allowed = sampling.allowed_token_ids
    asked = Processors(
        watermark=mark,
        logit_bias=dict(sampling.logit_bias),
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        dry=dry,
        bad_words=[list(word) for word in dict.fromkeys(words)],
        allowed_token_ids=None if allowed is None else list(allowed),
        typical_p=sampling.typical_p,
    )
    return None if asked == Processors() else asked


@lru_cache(KEPT_TEXTS)
def _spellings(tokenizer: Tokenizer, text: str, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Tokens of the text at the start of a line and behind a blank: most tokenizers know two spellings."""
    bare = text.lstrip(" ") or text
    both = [tuple(tokenizer.encode(one, add_special_tokens=False)) for one in (bare, " " + bare)]
    return tuple(ids for ids in dict.fromkeys(both) if ids and max(ids) < vocab_size)


@lru_cache(KEPT_TEXTS)
def _breakers(tokenizer: Tokenizer, text: str, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Every token that holds the text, and the text's own tokens if they are several."""
    wanted = text.encode()
    size = min(tokenizer.vocab_size, vocab_size)
    found = [(token,) for token in range(size) if wanted in tokenizer.token_bytes(token)]
    spelled = _spellings(tokenizer, text, vocab_size)
    return tuple(dict.fromkeys((*found, *(ids for ids in spelled if len(ids) > 1))))
