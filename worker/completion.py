"""Completion: one choice of a job's attempt, from token ids to text and journal entries. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..engine.detokenizer import Detokenizer
from ..engine.messages import Output
from ..engine.stopping import StopMatcher
from ..engine.tokenizer import Tokenizer
from ..schemas import logprobs
from ..schemas.events import Candidate, Delta, Done
from ..schemas.job import Job
from ..schemas.logprobs import TokenLogprobs
from ..schemas.result import Choice, ErrorInfo, FinishReason, Usage
from ..schemas.tools import ToolCall, calls_in
from .told import spelled


@dataclass(slots=True, eq=False)
class Completion:
    """One choice's tokens and text.

    Invariants: ``ids[:journalled]`` have been given to the journal; joined ``parts`` is what a follower has
    been or will be shown; once ``done`` is set no token is added.
    """

    job: Job
    tokenizer: Tokenizer
    index: int = 0
    ids: list[int] = field(default_factory=list[int])
    parts: list[str] = field(default_factory=list[str])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    """One for each of ``ids``, if the job asks or its choices are ranked."""
    done: Done | None = None
    first_token_at: float | None = None
    stop_tokens: int = 0
    """1 once an end or stop token was drawn: it counts as usage and has no text."""
    journalled: int = 0
    end_journalled: bool = False

    _detokenizer: Detokenizer = field(init=False)
    _stop: StopMatcher = field(init=False)
    _pending_text: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        sampling = self.job.sampling
        self._detokenizer = Detokenizer(
            self.tokenizer, sampling.skip_special_tokens, continues=self.job.messages is None
        )
        self._stop = StopMatcher(sampling.stop, include_stop=sampling.include_stop)

    @property
    def text(self) -> str:
        """So far."""
        return "".join(self.parts)

    @property
    def tokens(self) -> int:
        """As usage counts them."""
        return len(self.ids) + self.stop_tokens

    @property
    def pending(self) -> int:
        """Tokens that the journal was not given yet."""
        return len(self.ids) - self.journalled

    # ---- continuing from the journal

    def replay(self, event: Delta | Candidate, started_at: float) -> None:
        """Take over tokens that an earlier attempt logged, with the text as it was shown."""
        fresh = event.ids[max(0, len(self.ids) - event.offset) :]
        assert event.offset <= len(self.ids), f"job {self.job.id}: gap in the log before token {event.offset}"
        if not fresh:
            return
        if self.first_token_at is None:
            self.first_token_at = event.at
        self.parts.append(event.text)
        if event.logprobs is not None:
            self.logprobs += logprobs.unpack(event.logprobs, len(event.ids))[len(event.ids) - len(fresh) :]
        try:
            self._replay_ids(fresh, started_at)
        finally:
            self.journalled = len(self.ids)

    def _replay_ids(self, fresh: Sequence[int], started_at: float) -> None:
        """They rebuild the detokeniser and the stop matcher."""
        for token in fresh:
            self.ids.append(token)
            if self.done is None:
                _, matched = self._match(token)
                if matched is not None:
                    self._set_done(FinishReason.STOP, now=started_at, stop_reason=matched)

    def replay_end(self, done: Done) -> None:
        """It had ended."""
        self.done, self.stop_tokens, self.end_journalled = done, done.stop_tokens, True
        self.parts.append(done.text)

    # ---- what the engine reports

    def push(self, output: Output, now: float) -> bool:
        """Take one step's tokens. True: a stop string ended it, and the engine does not know."""
        for index, token in enumerate(output.token_ids):
            if self.first_token_at is None:
                self.first_token_at = now
            self.ids.append(token)
            if output.logprobs:
                self.logprobs += logprobs.rounded([output.logprobs[index]])
            text, matched = self._match(token)
            self.show(text)
            if matched is not None:
                self._set_done(FinishReason.STOP, now=now, stop_reason=matched)
                return output.finish is None
        if output.finish is not None:
            self._end_by(output, now)
        return False

    def _match(self, token: int) -> tuple[str, str | None]:
        """Text that ``token``, the last of ``ids``, makes safe to show, and the stop string it completes."""
        text = self._detokenizer.push([token])
        if len(self.ids) <= self.job.sampling.min_tokens:
            return self._stop.pass_over(text), None
        return self._stop.push(text)

    def _end_by(self, output: Output, now: float) -> None:
        if output.finish == "error":
            code, message = (
                output.error_code or "engine_error",
                output.error or "the engine refused this request",
            )
            self.fail(ErrorInfo(code=code, message=message), now)
        elif output.finish == "stop":
            self.stop_tokens = int(output.stop_token_id is not None)
            if self.first_token_at is None:
                self.first_token_at = now
            eos = output.stop_token_id is None or output.stop_token_id in self.tokenizer.eos_token_ids
            self.finish(FinishReason.STOP, now=now, stop_reason=None if eos else output.stop_token_id)
        elif output.finish == "length":
            self.finish(FinishReason.LENGTH, now=now, closed=output.closed)

    def fail(self, error: ErrorInfo, now: float) -> None:
        """End it with an error; its partial text stays in the log.

        Text that is held back is left out: making text of tokens may be what went wrong.
        """
        if self.done is None:
            self._set_done(FinishReason.ERROR, now=now, error=error)

    def finish(
        self,
        reason: FinishReason,
        *,
        now: float,
        stop_reason: str | int | None = None,
        closed: bool | None = None,
    ) -> None:
        """End it, unless it has ended, with the text that was held back."""
        if self.done is not None:
            return
        text, matched = self._stop.push(self._detokenizer.finish())
        if matched is None:
            text += self._stop.finish()
        self.show(text)
        self._set_done(reason, now=now, stop_reason=stop_reason, closed=closed)

    def _set_done(
        self,
        reason: FinishReason,
        *,
        now: float,
        stop_reason: str | int | None = None,
        closed: bool | None = None,
        error: ErrorInfo | None = None,
    ) -> None:
        self.done = Done(
            reason=reason,
            choice=self.index,
            stop_reason=stop_reason,
            closed=closed,
            tool_calls=self._tool_calls(),
            error=error,
            at=now,
        )

    def _tool_calls(self) -> tuple[ToolCall, ...] | None:
        if self.job.tools is None:
            return None
        return calls_in(self.text, self.job.id, self.index) or None

    def show(self, text: str) -> None:
        """Text for followers and for the result."""
        if text:
            self.parts.append(text)
            self._pending_text.append(text)

    # ---- what goes into the journal

    def take_tokens(
        self, *, max_tokens: int | None = None, cached_tokens: int = 0
    ) -> Delta | Candidate | None:
        """What the journal was not given yet. The keywords: see Delta. Text without tokens waits for them: a
        prompt that is echoed.
        """
        if not self.pending:
            return None
        sampling, start = self.job.sampling, self.journalled
        told = sampling.logprobs is not None or sampling.ranked
        kind = Candidate if sampling.ranked else Delta
        self.journalled = len(self.ids)
        return kind(
            choice=self.index,
            offset=start,
            ids=tuple(self.ids[start:]),
            text=self._take_text(),
            logprobs=logprobs.pack(self.logprobs[start:]) if told else None,
            at=None if start else self.first_token_at,
            max_tokens=max_tokens,
            cached_tokens=cached_tokens,
        )

    def take_end(self, usage: Usage) -> Done | Candidate | None:
        """Behind its last tokens: how it ended, once. ``usage``: of the job so far."""
        if self.done is None or self.end_journalled:
            return None
        self.end_journalled = True
        counted = self.stop_tokens if self.job.sampling.choices > 1 else 0
        more = {"text": self._take_text(), "usage": usage, "stop_tokens": counted}
        self.done = self.done.model_copy(update=more)
        if not self.job.sampling.ranked:
            return self.done
        return Candidate(choice=self.index, offset=len(self.ids), ids=(), end=self.done)

    def _take_text(self) -> str:
        text = "".join(self._pending_text)
        self._pending_text.clear()
        return text

    # ---- what comes out

    def choice(self, done: Done) -> Choice:
        """For the result. ``done``: how it ended, and under which number."""
        sampling = self.job.sampling
        told: Sequence[TokenLogprobs] | None = self.logprobs if sampling.logprobs is not None else None
        return Choice(
            index=done.choice,
            text=self.text,
            finish_reason=done.reason,
            stop_reason=done.stop_reason,
            closed=done.closed,
            tool_calls=done.tool_calls,
            echo=sampling.echo,
            token_ids=tuple(self.ids) if sampling.return_token_ids else None,
            logprobs=None if told is None else spelled(self.tokenizer, self.ids, told),
        )
