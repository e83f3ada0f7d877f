"""Grammar → matcher, for one model's tokenizer; the last compiled ones are kept."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from ...schemas.errors import InvalidSchema, Unsupported
from ..messages import Grammar
from ..tokenizer import Tokenizer
from .closing import Closer
from .source import to_source
from .state import PLAN_FROM

CACHED_GRAMMARS = 64
MAX_ITEMS = 20_000
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": MAX_ITEMS,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,  # they would hold the grammar and the output
}
"""They bound the work of a step to some 10 ms and a matcher's memory; compiling they do not bound in time
(``checker.py`` does)."""


class Compiler:
    """Compiles grammars for one tokenizer. Threads may use it at once.

    ``vocab_size`` is the model's: masks have a bit for each of its logits.
    """

    def __init__(self, model_dir: str | Path, vocab_size: int, eos_token_ids: tuple[int, ...] = ()) -> None:
        """Reads the tokenizer, which takes half a second for 50,000 tokens. Raises ModelInvalid,
        ModelNotFound, Unsupported (no end token, or a tokenizer llguidance cannot use)."""
        tokenizer = Tokenizer(model_dir)
        self.eos_token_ids = tuple(dict.fromkeys((*eos_token_ids, *tokenizer.eos_token_ids)))
        if not self.eos_token_ids:
            raise Unsupported("this model names no end token, and guided generation needs one")
        self.vocab_size = max(vocab_size, tokenizer.vocab_size)
        self.tokens = _tokens(tokenizer, Path(model_dir), self.vocab_size, self.eos_token_ids)
        self.closer = Closer(self.tokens, self.vocab_size)
        self._cache: OrderedDict[bytes, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the start of ``grammar``, the caller's own. Raises InvalidSchema."""
        key = hashlib.sha256(f"{grammar.kind}\0{grammar.text}".encode()).digest()
        with self._lock:
            known = self._cache.get(key)
            if known is not None:
                self._cache.move_to_end(key)
                return known.deep_copy()
        made = self._compile(grammar)
        with self._lock:
            self._cache[key] = made
            while len(self._cache) > CACHED_GRAMMARS:
                self._cache.popitem(last=False)
        return made.deep_copy()

    def shortest(self, grammar: Grammar) -> int | None:
        """Tokens of the shortest text found (not proven the shortest). None: more than a search looks at."""
        plan = self.closer.find(self.matcher(grammar), PLAN_FROM)
        return None if plan is None else len(plan)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        source = to_source(grammar)
        matcher = LLMatcher(self.tokens, source, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            raise InvalidSchema(explain(matcher))
        matcher.compute_bitmask()  # the first is the dearest, and copies start from what it has found out
        if matcher.is_error():
            raise InvalidSchema(explain(matcher))
        return matcher


def explain(matcher: LLMatcher) -> str:
    """What went wrong in a matcher, in a line."""
    what = " ".join(matcher.get_error().split("<non-verbose/>")[0].split())[:300]
    return f"the grammar cannot be used: {what}"


def _tokens(tokenizer: Tokenizer, path: Path, vocab_size: int, eos: tuple[int, ...]) -> LLTokenizer:
    try:
        text = (path / "tokenizer.json").read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos))
    except ValueError:  # a kind of tokenizer that it does not know: tell it the bytes of each token
        wrapper = TokenizerWrapper(_Bytes(tokenizer, vocab_size, eos[0]))
    try:
        return LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=list(eos))
    except ValueError as exc:
        raise Unsupported(f"guided generation cannot use this model's tokenizer: {exc}") from exc


class _Bytes:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos: int) -> None:
        self.eos_token_id = eos
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_ids)
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False)
