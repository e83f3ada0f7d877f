"""SamplingParams: what a request may ask of the sampler, validated here, once, for everybody."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from .wire import Bool, Count, Float, Int, Record

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024


class SamplingParams(Record):
    """How tokens are chosen and when to stop.

    ``temperature`` 0 is greedy. The order of filters is temperature, top_k, top_p, min_p, then Gumbel noise
    that depends on (seed, choice, position, token) only. Without ``seed`` it is derived from the job id.
    """

    max_tokens: Annotated[Count, Field(ge=1)] | None = None
    """Tokens of output at most. None: up to 1,024, or as many as the context leaves."""
    min_tokens: Count = 0
    temperature: Annotated[Float, Field(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[Float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Count = 0
    """0: off."""
    min_p: Annotated[Float, Field(ge=0.0, le=1.0)] = 0.0
    seed: Annotated[Int, Field(ge=0, lt=2**64)] | None = None
    stop: tuple[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)], ...] = Field(
        default=(), max_length=MAX_STOP_STRINGS
    )
    stop_token_ids: tuple[Count, ...] = Field(default=(), max_length=64)
    include_stop: Bool = False
    """Leave the matched stop string in the text."""
    ignore_eos: Bool = False

    @model_validator(mode="after")
    def _min_fits_max(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is more than max_tokens ({self.max_tokens})")
        return self
