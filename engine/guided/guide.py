"""Guide: the engine's side of guided generation: grammars compiled off the step path, masks beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence as Rows
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...schemas.errors import BadInput, InvalidSchema
from ..messages import Grammar
from ..sequence import Sequence
from .state import GuidedState, LeftTheGrammar

if TYPE_CHECKING:
    from .compiler import Compiler
    from .masks import Masker, Masks

log = logging.getLogger(__name__)

WAIT_S = 0.05
"""How long a step that has nothing else to do waits for a grammar."""


class Guide:
    """Compiles in a thread of its own, made with the first guided request, and the tokenizer with it."""

    def __init__(self, model_dir: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._model = (model_dir, vocab_size, eos_token_ids)
        self._compiler: Compiler | None = None
        self._masker: Masker | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: dict[Sequence, Future[_Prepared]] = {}

    @property
    def waiting(self) -> list[Sequence]:
        """Those whose grammar is being compiled."""
        return list(self._waiting)

    def begin(self, seq: Sequence, grammar: Grammar) -> None:
        """Start to compile; ``ready`` hands the sequence out again."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="guided-compile")
        self._waiting[seq] = self._thread.submit(self._prepare, seq, grammar)

    def forget(self, seq: Sequence) -> bool:
        """Stop waiting for it. False: it is not waiting."""
        future = self._waiting.pop(seq, None)
        return future is not None and (future.cancel() or True)

    def ready(self, *, patiently: bool) -> list[tuple[Sequence, list[int] | BadInput]]:
        """Sequences that are ready, each with the tokens it begins with, or with why it cannot run.

        They wait here until ``forget``. patiently: nothing else is to be done, so wait a little for one.
        """
        if not self._waiting:
            return []
        if patiently:
            wait(self._waiting.values(), WAIT_S, FIRST_COMPLETED)
        done = [(seq, future) for seq, future in self._waiting.items() if future.done()]
        return [(seq, self._take(seq, future)) for seq, future in done]

    def _take(self, seq: Sequence, future: Future[_Prepared]) -> list[int] | BadInput:
        try:
            prepared = future.result()
        except BadInput as exc:
            return exc
        except LeftTheGrammar as exc:
            return InvalidSchema(
                f"the {seq.output_len:,} tokens so far do not fit the grammar ({exc}); submit the job again"
            )
        seq.guided = prepared.state
        del seq.tokens[seq.prompt_len + prepared.kept :]
        return prepared.begins

    def _prepare(self, seq: Sequence, grammar: Grammar) -> _Prepared:
        """In the compiling thread."""
        if self._compiler is None:
            from .compiler import Compiler  # an engine without guided requests runs without llguidance
            from .masks import Masker

            self._compiler = Compiler(*self._model)
            self._masker = Masker(self._compiler.vocab_size)
        state = GuidedState(
            self._compiler.matcher(grammar), self._compiler.closer, grammar.close, fast=seq.fast_forward
        )
        output = seq.tokens[seq.prompt_len :]
        return _Prepared(state, *state.start(seq.limit - seq.prompt_len, output))

    def start(self, seqs: Rows[Sequence]) -> Masks | None:
        """Begin the masks of those of ``seqs`` that are guided. None: there are none."""
        if not any(seq.guided for seq in seqs):
            return None
        assert self._masker
        assert self._compiler
        return self._masker.start(seqs, self._compiler.eos_token_ids)


@dataclass(frozen=True, slots=True)
class _Prepared:
    state: GuidedState
    kept: int
    """So much of an earlier attempt's output stands; the rest is sampled again."""
    begins: list[int]
