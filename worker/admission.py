"""Admission: whether a job can run here, and as what."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from ..engine.guided.checker import GrammarChecker
from ..engine.messages import Processors
from ..engine.tokenizer import Tokenizer
from ..schemas.job import Job
from ..schemas.result import FinishReason
from . import intake, wishes
from .engine_client import EngineClient
from .failures import condemn
from .generation import Generation
from .settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class Fit:
    """What a job is to the engine."""

    prompt_ids: list[int]
    max_tokens: int
    processors: Processors | None


class Admission:
    """Thread-safe. The same job is told the same, whoever asks and when: before a batch runs, say."""

    engine: EngineClient
    """Set by ``JobHandler.attach``."""
    fingerprint: str | None = None
    """Of what answers here; set once the engine is ready."""

    def __init__(self, settings: WorkerSettings, tokenizer: Tokenizer) -> None:
        self._settings, self.tokenizer = settings, tokenizer
        self._checker: GrammarChecker | None = None  # made with the first grammar
        self._checker_lock = threading.Lock()

    def fit(self, job: Job, default_max_tokens: int = 0) -> Fit:
        """Raises BadInput. ``default_max_tokens``: what an earlier worker allowed who names no number."""
        info, settings = self.engine.info, self._settings
        prompt_ids = intake.encode(job, self.tokenizer, info.vocab_size)
        allowed = intake.budget(
            job,
            len(prompt_ids),
            info.max_model_len,
            default_max_tokens or settings.default_max_tokens,
            max_input_tokens=settings.max_input_tokens,
            knob=info.length_knob,
        )
        wishes.check_limits(job.sampling, settings)
        wishes.check_ids(job.sampling, info)
        processors = wishes.processors(job.sampling, self.tokenizer, info.vocab_size, settings)
        if job.sampling.grammar is not None or job.tools is not None:
            intake.check_grammar(job, self._grammar_checker(info.vocab_size), allowed)
        return Fit(prompt_ids, allowed, processors)

    def admit(
        self, generation: Generation, now: float, over: FinishReason | None = None, fit: Fit | None = None
    ) -> None:
        """Make it ready to run, or end it if that is over. Raises BadInput.

        ``fit``: what ``fit`` said of it before, if its log says nothing that changes that.
        """
        if generation.history.strikes >= self._settings.max_attempts:
            condemn(generation, now)
        elif over is not None:
            generation.end_early(over, now)
        else:
            if fit is None or generation.max_tokens:
                fit = self.fit(generation.job, generation.max_tokens)
            generation.processors = fit.processors
            generation.admit(fit.prompt_ids, fit.max_tokens, now)

    def _grammar_checker(self, vocab_size: int) -> GrammarChecker:
        with self._checker_lock:
            if self._checker is None:
                self._checker = GrammarChecker(str(self.tokenizer.path), vocab_size)
            return self._checker
