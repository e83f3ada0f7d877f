"""Generation: one job's attempt, from token ids to journal entries. Pure: no I/O, no torch, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..engine.detokenizer import Detokenizer
from ..engine.messages import Output, Processors
from ..engine.stopping import StopMatcher
from ..engine.tokenizer import Tokenizer
from ..schemas import logprobs
from ..schemas.events import Crashed, Delta, Done, EntryId, Event, Prompt, Started, Trial
from ..schemas.job import Job
from ..schemas.logprobs import TokenLogprobs
from ..schemas.result import Choice, ErrorInfo, FinishReason, Result, Timings, TokenLogprob, Usage
from ..schemas.tools import ToolCall, calls_in
from .history import History
from .told import spelled, text_of

STREAM_FLUSH_S = 0.05
JOURNAL_TOKENS, JOURNAL_S = 16, 0.5
PROMPT_ENTRY_TOKENS = 512
LONG_LOG_ENTRIES, LONG_JOURNAL_TOKENS, LONG_JOURNAL_S = 2_000, 64, 1.0


@dataclass(slots=True, frozen=True)
class Entry:
    """One journal entry, ready to be written; written again unchanged until the write is confirmed."""

    seq: int
    event: Prompt | Delta | Crashed | Trial | Done


@dataclass(slots=True, eq=False)
class Generation:
    """One attempt's tokens and text.

    Invariants: ``ids[:_journalled]`` stand in the log or in ``_unconfirmed``; joined ``parts`` is what a
    follower has been or will be shown; once ``done`` is set no token is added.
    """

    job: Job
    attempt: int
    attempts: int
    started_at: float
    tokenizer: Tokenizer
    prompt_ids: list[int] = field(default_factory=list[int])
    max_tokens: int = 0
    processors: Processors | None = None
    """What the job wants changed in its logits."""
    ids: list[int] = field(default_factory=list[int])
    parts: list[str] = field(default_factory=list[str])
    logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    """One for each of ``ids``, if the job asks."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    """Of the prompt's tokens but the first, as far as they have come, if the job asks."""
    prompt_first: int | None = None
    """That first one, if the job asks."""
    prompt_rest: list[int] = field(default_factory=list[int])
    """Tokens of ``prompt_logprobs``: a complete log has to be enough for a result."""
    done: Done | None = None
    first_token_at: float | None = None
    flushed_at: float = 0.0
    cached_tokens: int | None = None
    """Of the prompt, as the attempt found that made the first token; None: there is no token yet."""
    stop_tokens: int = 0
    """1 once an end or stop token was drawn: it counts as usage and has no text."""
    history: History = field(default_factory=History)
    """What died with it so far."""
    on_trial: bool = False
    """The log says that it runs alone, and not yet what came of it."""

    _detokenizer: Detokenizer = field(init=False)
    _stop: StopMatcher = field(init=False)
    _journalled: int = 0
    _prompt_journalled: int = 0
    _first_journalled: bool = False
    _pending_text: list[str] = field(default_factory=list[str])
    _pending_since: float | None = None
    _seq: int = 0
    _entries: int = 0
    _marks: list[Crashed | Trial] = field(default_factory=list[Crashed | Trial])
    _unconfirmed: list[Entry] = field(default_factory=list[Entry])
    _done_written: bool = False

    def __post_init__(self) -> None:
        sampling = self.job.sampling
        self._detokenizer = Detokenizer(
            self.tokenizer, sampling.skip_special_tokens, continues=self.job.messages is None
        )
        self._stop = StopMatcher(sampling.stop, include_stop=sampling.include_stop)

    @property
    def request_id(self) -> str:
        """What the engine calls this attempt: tokens of an earlier one must never be taken for ours."""
        return f"{self.job.id}@{self.attempt}"

    # ---- continuing from the journal

    def replay(self, log: list[tuple[EntryId, Event]]) -> None:
        """Take over what earlier attempts logged. Call once, before anything else.

        Ids rebuild the detokeniser and the stop matcher; text that was shown is taken as it was shown.
        If the log ends in ``Done``, or in a stop string, ``done`` is set and nothing need run.
        """
        self.history = History(event for _, event in log)
        try:
            for _, event in log:
                self._take_over(event)
        finally:
            self._journalled, self._prompt_journalled = len(self.ids), len(self.prompt_logprobs)

    def _take_over(self, event: Event) -> None:
        self._entries += 1
        match event:
            case Prompt():
                self.prompt_first, self._first_journalled = (
                    self.prompt_first if event.first is None else event.first,
                    True,
                )
                self._take_prompt(event.offset, event.ids, logprobs.unpack(event.logprobs, len(event.ids)))
            case Delta():
                self._replay_delta(event)
            case Done():
                self.done, self._done_written = event, True
                self.parts.append(event.text)
            case Started():
                self.started_at = min(self.started_at, event.at)
            case _:
                pass

    def admit(self, prompt_ids: list[int], max_tokens: int, now: float) -> None:
        """Say what runs. Tokens of earlier attempts may have used up ``max_tokens`` already."""
        self.prompt_ids, self.max_tokens = prompt_ids, max_tokens
        if self.job.sampling.prompt_logprobs is not None:
            self.prompt_first = prompt_ids[0]
        if self.job.sampling.echo and not self.ids:  # else it was shown with the first of them
            self._show(self._prompt_text())
        if len(self.ids) >= max_tokens:
            self._finish(FinishReason.LENGTH, now=now)

    def _prompt_text(self) -> str:
        job = self.job
        if job.prompt is not None and job.sampling.truncate is None:
            return job.prompt
        return self.tokenizer.decode(self.prompt_ids, job.sampling.skip_special_tokens)

    @property
    def prompt_told(self) -> bool:
        """All that can be said of the prompt's tokens is known."""
        return len(self.prompt_logprobs) >= len(self.prompt_ids) - 1

    def _take_prompt(self, offset: int, ids: Sequence[int], told: list[TokenLogprobs]) -> None:
        """A piece for the tokens from position ``offset`` on; another attempt begins anew with the first."""
        have = len(self.prompt_rest) + 1
        assert offset <= have, f"job {self.job.id}: nothing was said of prompt tokens {have} to {offset}"
        self.prompt_logprobs[offset - 1 :], self.prompt_rest[offset - 1 :] = told, ids

    def _replay_delta(self, event: Delta) -> None:
        fresh = event.ids[max(0, len(self.ids) - event.offset) :]
        assert event.offset <= len(self.ids), f"job {self.job.id}: gap in the log before token {event.offset}"
        if not fresh:
            return
        if self.first_token_at is None:
            self.first_token_at = event.at
        if self.cached_tokens is None:
            self.cached_tokens = event.cached_tokens
        self.max_tokens = event.max_tokens or self.max_tokens
        self.parts.append(event.text)
        if event.logprobs is not None:
            self.logprobs += logprobs.unpack(event.logprobs, len(event.ids))[len(event.ids) - len(fresh) :]
        for token in fresh:
            self.ids.append(token)
            if self.done is None:
                _, matched = self._match(token)
                if matched is not None:
                    self._set_done(FinishReason.STOP, now=self.started_at, stop_reason=matched)

    # ---- what the engine reports

    def push(self, output: Output, now: float) -> bool:
        """Take one step's tokens. True: a stop string ended the job, and the engine must be told."""
        if self.done is not None:
            return False
        if self.cached_tokens is None:
            self.cached_tokens = output.cached_tokens
        if output.prompt_logprobs:
            self._push_prompt(output.prompt_from, output.prompt_logprobs, now)
        for index, token in enumerate(output.token_ids):
            if self.first_token_at is None:
                self.first_token_at = now
            if self._pending_since is None:
                self._pending_since = now
            self.ids.append(token)
            if output.logprobs:
                self.logprobs += logprobs.rounded([output.logprobs[index]])
            text, matched = self._match(token)
            self._show(text)
            if matched is not None:
                self._set_done(FinishReason.STOP, now=now, stop_reason=matched)
                return output.finish is None
        if output.finish is not None:
            self._end_by(output, now)
        return False

    def _push_prompt(self, start: int, told: list[TokenLogprobs], now: float) -> None:
        ids = self.prompt_ids[start : start + len(told)]
        self._take_prompt(start, ids, logprobs.rounded(told))
        self._prompt_journalled = min(self._prompt_journalled, start - 1)
        if self._pending_since is None:
            self._pending_since = now

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
            self._finish(FinishReason.STOP, now=now, stop_reason=None if eos else output.stop_token_id)
        elif output.finish == "length":
            self._finish(FinishReason.LENGTH, now=now, closed=output.closed)

    def fail(self, error: ErrorInfo, now: float) -> None:
        """End the job with an error; its partial text stays in the log.

        Text that is held back is left out: making text of tokens may be what went wrong.
        """
        if self.done is None:
            self._set_done(FinishReason.ERROR, now=now, error=error)

    def end_early(self, reason: FinishReason, now: float) -> None:
        """Cancelled or expired: keep the partial text."""
        self._finish(reason, now=now)

    def _finish(
        self,
        reason: FinishReason,
        *,
        now: float,
        stop_reason: str | int | None = None,
        closed: bool | None = None,
    ) -> None:
        if self.done is not None:
            return
        text, matched = self._stop.push(self._detokenizer.finish())
        if matched is None:
            text += self._stop.finish()
        self._show(text)
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
            stop_reason=stop_reason,
            closed=closed,
            tool_calls=self._tool_calls(),
            error=error,
            at=now,
        )

    def _tool_calls(self) -> tuple[ToolCall, ...] | None:
        if self.job.tools is None:
            return None
        return calls_in("".join(self.parts), self.job.id) or None

    def _show(self, text: str) -> None:
        if text:
            self.parts.append(text)
            self._pending_text.append(text)

    def note(self, event: Crashed | Trial) -> None:
        """Put on record, behind the tokens so far, what happened to this attempt."""
        self.history.take(event)
        self._marks.append(event)

    # ---- what goes into the journal

    def due_at(self) -> float | None:
        """When pending tokens should be written; None: nothing to write. Past: now."""
        if self._unconfirmed or self._marks:
            return 0.0
        if self.done is not None:
            return None if self._done_written else 0.0
        if self._pending_since is None:
            return None
        pending = len(self.ids) - self._journalled
        if self._entries >= LONG_LOG_ENTRIES:
            tokens, wait_s = LONG_JOURNAL_TOKENS, LONG_JOURNAL_S
        elif self.on_trial:  # the others wait until the log says that it lived
            return 0.0
        elif self.job.stream:
            return 0.0 if self._journalled == 0 else self.flushed_at + STREAM_FLUSH_S
        else:
            tokens, wait_s = JOURNAL_TOKENS, JOURNAL_S
        return 0.0 if pending >= tokens else self._pending_since + wait_s

    def take_entries(self, now: float) -> list[Entry]:
        """Entries to write now, oldest first. Until ``confirm``, the same ones come again."""
        if not self._unconfirmed:
            self._add_prompt()
            fresh, text = self.ids[self._journalled :], "".join(self._pending_text)
            if fresh:
                self._add(self._delta(tuple(fresh), text))
                self._journalled, text = len(self.ids), ""
            if fresh or self.done is not None:  # text without tokens waits for them: a prompt that is echoed
                self._pending_text.clear()
            self._pending_since = None
            for mark in self._marks:
                self._add(mark)
            self._marks.clear()
            if self.done is not None and not self._done_written:
                self.done = self.done.model_copy(update={"text": text, "usage": self.usage})
                self._add(self.done)
                self._done_written = True
            self.flushed_at = now
        return list(self._unconfirmed)

    def _delta(self, ids: tuple[int, ...], text: str) -> Delta:
        told = None
        if self.job.sampling.logprobs is not None:
            told = logprobs.pack(self.logprobs[self._journalled :])
        if self._journalled:
            return Delta(offset=self._journalled, ids=ids, text=text, logprobs=told)
        limit = self.max_tokens if self.job.sampling.max_tokens is None else None
        return Delta(
            offset=0,
            ids=ids,
            text=text,
            logprobs=told,
            at=self.first_token_at,
            max_tokens=limit,
            cached_tokens=self.cached_tokens or 0,
        )

    def _add_prompt(self) -> None:
        """What is known of the prompt and not in the log, in entries of a bounded size."""
        new = self.prompt_first is not None and not self._first_journalled
        while new or self._prompt_journalled < len(self.prompt_rest):
            new = False
            some = slice(self._prompt_journalled, self._prompt_journalled + PROMPT_ENTRY_TOKENS)
            ids = tuple(self.prompt_rest[some])
            first = None if self._prompt_journalled else self.prompt_first
            packed = logprobs.pack(self.prompt_logprobs[some])
            self._add(Prompt(offset=some.start + 1, ids=ids, logprobs=packed, first=first))
            self._prompt_journalled += len(ids)
            self._first_journalled = True

    def _add(self, event: Prompt | Delta | Crashed | Trial | Done) -> None:
        self._seq += 1
        self._entries += 1
        self._unconfirmed.append(Entry(self._seq, event))

    def confirm(self) -> bool:
        """The entries of the last ``take_entries`` are in the log. True: a trial began or ended by them."""
        told = False
        for entry in self._unconfirmed:
            begins = isinstance(entry.event, Trial)
            told |= begins or self.on_trial
            self.on_trial = begins or (self.on_trial and isinstance(entry.event, Prompt))
        self._unconfirmed.clear()
        return told

    @property
    def complete(self) -> bool:
        """The log ends in a confirmed ``Done``: the result may be committed."""
        return self._done_written and not self._unconfirmed

    # ---- what comes out

    @property
    def usage(self) -> Usage:
        """Tokens so far, over all attempts."""
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.ids) + self.stop_tokens,
            cached_tokens=self.cached_tokens or 0,
        )

    def _choice(self, done: Done) -> Choice:
        sampling = self.job.sampling
        told = None
        if sampling.logprobs is not None:
            told = spelled(self.tokenizer, self.ids, self.logprobs)
        return Choice(
            text="".join(self.parts),
            finish_reason=done.reason,
            stop_reason=done.stop_reason,
            closed=done.closed,
            tool_calls=done.tool_calls,
            echo=sampling.echo,
            token_ids=tuple(self.ids) if sampling.return_token_ids else None,
            logprobs=told,
        )

    def _told_of_prompt(self) -> tuple[TokenLogprob, ...] | None:
        if self.prompt_first is None:
            return None
        first, _ = text_of(self.tokenizer, self.prompt_first)
        rest = spelled(self.tokenizer, self.prompt_rest, self.prompt_logprobs)
        return (TokenLogprob(id=self.prompt_first, token=first), *rest)

    def result(self) -> Result:
        """The record to commit. Only once ``done`` is set."""
        done = self.done
        assert done is not None, f"job {self.job.id}: no result before its end"
        job = self.job
        return Result(
            job_id=job.id,
            model=job.model,
            state=done.reason.state,
            endpoint=job.endpoint,
            choices=(self._choice(done),),
            prompt_logprobs=self._told_of_prompt(),
            usage=done.usage if self._done_written else self.usage,
            timings=Timings(
                submitted_at=job.submitted_at,
                started_at=self.started_at,
                first_token_at=self.first_token_at,
                finished_at=done.at,
            ),
            error=done.error,
            attempts=self.attempts,
            seed=job.seed,
            custom_id=job.custom_id,
            retry_of=job.retry_of,
            metadata=job.metadata,
            crashes=tuple(self.history.crashes),
        )
