"""Flight: a step from its launch until what it draws has been recorded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from .batch import Coming
from .device_sampler import Ids
from .logprobs import PromptScorer, Scores
from .scheduler import StepPlan, Work
from .sequence import Ahead, Later, Row, Sequence

if TYPE_CHECKING:
    from .guided.masks import Masks


@dataclass(frozen=True, slots=True)
class Flight:
    """A step that has been launched, and what it draws."""

    plan: StepPlan
    works: list[Work]
    """Those that sample."""
    drawn: list[int | None] | Ids
    """One token for each of ``works``, then one for each of their guesses."""
    logits: Tensor
    masks: Masks | None
    scores: Scores | None
    scorer: PromptScorer | None
    began: float
    decodes: bool
    """Everybody had one token to go, and nobody waited."""
    void: set[Sequence] = field(default_factory=set[Sequence])
    """They were fed a token that turned out to be another: what was drawn for them says nothing."""

    @property
    def ahead(self) -> Ids | None:
        """The tokens, if the host has not waited for them."""
        return self.drawn if isinstance(self.drawn, Ids) else None

    @property
    def coming(self) -> Coming | None:
        """The same, for those who are fed them."""
        if not isinstance(self.drawn, Ids):
            return None
        return Coming(self.drawn.ids, [None if w.seq in self.void else w.seq for w in self.works])

    def tokens(self) -> list[int | None]:
        """Waits for the step, and for none behind it."""
        return self.drawn.wait() if isinstance(self.drawn, Ids) else self.drawn


def rows_of(sampling: list[Work]) -> list[Row]:
    """Whose next token each row of the logits says: each sequence, then those with guesses behind."""
    first: list[Row] = [Later(work.seq) if work.seq.coming else work.seq for work in sampling]
    return first + [Ahead(w.seq, w.guesses[:n]) for w in sampling for n in range(1, len(w.guesses) + 1)]


def draws_alone(work: Work) -> bool:
    """The device needs nobody's help with this row."""
    seq = work.seq
    return seq.plain and not work.guesses and seq.output_len + seq.coming >= seq.request.min_tokens
