"""Sequence: one request while the engine works on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from .messages import Request

if TYPE_CHECKING:
    from .guided.state import GuidedState


class Row(Protocol):
    """What the sampler reads of a sequence."""

    @property
    def request(self) -> Request: ...
    @property
    def id(self) -> str: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def output_len(self) -> int: ...
    @property
    def end_ids(self) -> frozenset[int]: ...


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, how many of them have keys and values in the cache, and in which blocks.

    ``computed < length`` as long as it lives. Prefill, decode, resume and recomputation after a preemption
    are all the same thing: ``computed`` catching up.
    """

    request: Request
    limit: int
    """Ends when it has this many tokens, prompt and output."""
    end_ids: frozenset[int]
    """Sampling one of these ends it."""
    number: int = 0
    """Order of arrival at the engine: breaks ties."""
    fast_forward: bool = True
    """Take tokens that the grammar forces without sampling them."""
    guided: GuidedState | None = field(init=False, default=None)
    said: int = field(init=False)
    """So many tokens are the prompt, an earlier attempt's, or have been given out; ``tokens`` may be fewer
    while some of an earlier attempt's are sampled again."""
    sampled: bool = field(init=False, default=False)
    """A token of it was."""
    tokens: list[int] = field(init=False)
    coming: int = field(init=False, default=0)
    """So many more were sampled, and only the device knows which: ``Engine`` runs a step ahead."""
    computed: int = field(init=False, default=0)
    block_table: list[int] = field(init=False, default_factory=list[int])
    hashes: list[bytes] = field(init=False, default_factory=list[bytes])
    """Names of its full blocks' contents, the first ones; made by the prefix cache."""
    cached_tokens: int = field(init=False, default=0)
    """Of the prompt, found in the prefix cache before it was first preempted."""
    preempted: bool = field(init=False, default=False)
    """It has lost its blocks once."""
    prompt_scored: int = field(init=False, default=1)
    """Prompt tokens whose log probabilities have been told, if it asks: there is none for the first."""
    rank: tuple[int, float, int] = field(init=False)
    """Smaller is served first, and preempted last."""
    plain: bool = field(init=False)
    """Its logits, its noise and filters decide its tokens, once it has ``min_tokens``, and nobody asks for
    more than the tokens: the device draws them by itself."""

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_ids, *self.request.output_ids]
        self.said = len(self.tokens)
        self.rank = (self.request.priority, self.request.arrival, self.number)
        wants = self.request
        self.plain = not (wants.processors or wants.grammar or wants.logprobs is not None)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def adapter(self) -> str | None:
        """Name of its LoRA adapter."""
        return self.request.adapter

    @property
    def prompt_len(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def output_len(self) -> int:
        """Tokens of output so far, earlier attempts' included: the position of the next one."""
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def known(self) -> int | None:
        """The next token, if an earlier attempt has said it."""
        told = self.request.output_ids
        return told[self.output_len] if self.output_len < len(told) else None

    @property
    def wants_its_prompt_fed(self) -> bool:
        """Log probabilities of its prompt have still to be told, and a cache does not hold what they need."""
        return self.request.prompt_logprobs is not None and self.prompt_scored < self.prompt_len

    @property
    def length(self) -> int:
        """Tokens, those that are coming included."""
        return len(self.tokens) + self.coming

    @property
    def pending(self) -> int:
        """Tokens that still have to go through the model before the next one can be sampled; none once the
        last one is coming."""
        length = len(self.tokens) + self.coming
        return length - self.computed if length < self.limit else 0


@dataclass(frozen=True, slots=True)
class Later:
    """A sequence as it will be once the tokens that are coming have come. Only requests that do not look at
    tokens are sampled for in this way."""

    seq: Sequence

    @property
    def request(self) -> Request:
        return self.seq.request

    @property
    def id(self) -> str:
        return self.seq.id

    @property
    def end_ids(self) -> frozenset[int]:
        return self.seq.end_ids

    @property
    def tokens(self) -> list[int]:
        raise AssertionError(f"{self.id}: its last token is on the device only")

    @property
    def output_len(self) -> int:
        return self.seq.output_len + self.seq.coming


@dataclass(frozen=True, slots=True)
class Ahead:
    """A sequence as it will be once so many guesses about it have turned out right."""

    seq: Sequence
    guesses: tuple[int, ...]

    @property
    def request(self) -> Request:
        return self.seq.request

    @property
    def id(self) -> str:
        return self.seq.id

    @property
    def end_ids(self) -> frozenset[int]:
        return self.seq.end_ids

    @property
    def tokens(self) -> list[int]:
        return [*self.seq.tokens, *self.guesses]

    @property
    def output_len(self) -> int:
        return self.seq.output_len + len(self.guesses)
