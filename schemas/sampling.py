"""SamplingParams: what a request may ask of the sampler, validated here, once, for everybody."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from .errors import InvalidRequest
from .grammar import GrammarSpec
from .wire import MAX_COUNT, Bool, Count, Float, Int, Record

MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_CHOICES = 128
MAX_BIASES = 4096
MAX_BAD_WORDS = 1024
DRY_BREAKERS = ("\n", ":", '"', "*")


def _id_of_key(key: Any) -> Any:
    """JSON has only strings for keys."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10 else key


_TokenKey = Annotated[int, BeforeValidator(_id_of_key), Field(strict=True, ge=0, le=MAX_COUNT)]
_Text = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
_Penalty = Annotated[Float, Field(ge=-2.0, le=2.0)]
_Probability = Annotated[Float, Field(gt=0.0, le=1.0)]


class SamplingParams(Record):
    """How tokens are chosen, when to stop, and what is told of them.

    ``temperature`` 0 is greedy. What changes logits comes first, in this order: watermark, logit_bias,
    repetition, frequency and presence penalties, DRY, bad_words, min_tokens, allowed_token_ids; then
    temperature, top_k, top_p, min_p, typical_p, then Gumbel noise that depends on (seed, choice, position,
    token) only. Without ``seed`` it is derived from the job id.
    """

    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    """Tokens of output at most. None: up to 1,024, or as many as the context leaves."""
    min_tokens: Count = 0
    temperature: Annotated[Float, Field(ge=0.0, le=100.0)] = 1.0
    top_p: _Probability = 1.0
    top_k: Count = 0
    """0: off."""
    min_p: Annotated[Float, Field(ge=0.0, le=1.0)] = 0.0
    typical_p: _Probability = 1.0
    seed: Annotated[Int, Field(ge=0, lt=2**64)] | None = None
    n: Annotated[Count, Field(ge=1, le=MAX_CHOICES)] = 1
    """Choices to return."""
    best_of: Annotated[Count, Field(ge=1, le=MAX_CHOICES)] | None = None
    """Choices to make, of which the ``n`` most likely are returned, by mean log probability a token and the
    best first. All of them count as usage. None: ``n``.
    """

    repetition_penalty: Annotated[Float, Field(ge=0.01, le=100.0)] = 1.0
    """Above 1: tokens of prompt and output become less likely."""
    frequency_penalty: _Penalty = 0.0
    """For each time a token is in the output."""
    presence_penalty: _Penalty = 0.0
    """For a token that is in the output at all."""
    dry_multiplier: Annotated[Float, Field(ge=0.0, le=100.0)] = 0.0
    """0: off. A token that would prolong a repetition of ``m`` tokens, ``m >= dry_allowed_length``, loses
    ``dry_multiplier * dry_base ** (m - dry_allowed_length)``.
    """
    dry_base: Annotated[Float, Field(ge=1.0, le=100.0)] = 1.75
    dry_allowed_length: Annotated[Count, Field(ge=1)] = 2
    dry_range: Count = 0
    """How many of the last tokens count; 0: all."""
    dry_sequence_breakers: tuple[_Text, ...] = Field(default=DRY_BREAKERS, max_length=64)
    """No repetition reaches across one of these."""
    logit_bias: dict[_TokenKey, Annotated[Float, Field(ge=-100.0, le=100.0)]] = Field(
        default_factory=dict[int, float], max_length=MAX_BIASES
    )
    """By token id, added to its logit."""
    allowed_token_ids: tuple[Count, ...] | None = Field(default=None, min_length=1)
    """No other token is sampled."""
    bad_words: tuple[_Text, ...] = Field(default=(), max_length=MAX_BAD_WORDS)
    """Texts that are never completed, at the start of a word or within one."""
    watermark: Bool = False
    """Favour tokens that a hash of the one before calls green; gamma and delta are the worker's."""

    stop: tuple[_Text, ...] = Field(default=(), max_length=MAX_STOP_STRINGS)
    stop_token_ids: tuple[Count, ...] = Field(default=(), max_length=64)
    include_stop: Bool = False
    """Leave the matched stop string in the text."""
    ignore_eos: Bool = False
    grammar: GrammarSpec | None = None
    """What the text must look like."""
    adapter_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Name of a LoRA adapter that the worker has. None: the model as it is."""

    logprobs: Count | None = None
    """Tell the log probability of each token, and of so many of the most likely ones. They are the model's
    own: before anything above changes them.
    """
    prompt_logprobs: Count | None = None
    """The same of the prompt's tokens."""
    echo: Bool = False
    """The text begins with the prompt."""
    truncate: Annotated[Count, Field(ge=1)] | None = None
    """Keep so many tokens of the prompt, the last ones."""
    skip_special_tokens: Bool = True
    return_token_ids: Bool = False

    @model_validator(mode="after")
    def _min_fits_max(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens}); lower it",
                param="min_tokens",
            )
        return self

    @model_validator(mode="after")
    def _choices_can_be_made(self) -> Self:
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequest(
                f"best_of ({self.best_of}) is less than n ({self.n}): make as many as you want",
                param="best_of",
            )
        if self.choices > 1 and self.temperature == 0.0:
            raise InvalidRequest(
                f"{self.choices} choices at temperature 0 are all the same; ask for one, or sample",
                param="best_of" if self.best_of else "n",
            )
        return self

    @property
    def choices(self) -> int:
        """How many are made."""
        return self.best_of or self.n

    @property
    def ranked(self) -> bool:
        """More are made than returned: nobody is shown any before the best are known."""
        return self.choices > self.n
