"""Generation: one job's attempt, from token ids to journal entries. Pure: no I/O, no torch, no clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..engine.messages import Output, Processors
from ..engine.tokenizer import Tokenizer
from ..schemas import logprobs
from ..schemas.events import (
    Candidate,
    Crashed,
    Delta,
    Done,
    EntryId,
    Event,
    Prompt,
    Started,
    Trial,
    decisive,
)
from ..schemas.job import Job
from ..schemas.logprobs import TokenLogprobs
from ..schemas.result import ErrorInfo, FinishReason, Result, Timings, TokenLogprob, Usage
from .completion import Completion
from .history import History
from .told import spelled, text_of

STREAM_FLUSH_S = 0.05
JOURNAL_TOKENS, JOURNAL_S = 16, 0.5
ENTRY_TOKENS = 512
"""Of a prompt, or of a choice that turned out best, in one entry."""
LONG_LOG_ENTRIES, LONG_JOURNAL_TOKENS, LONG_JOURNAL_S = 2_000, 64, 1.0
CHOICE_MARK = "#"
"""Stands before a choice's number in the name of its request."""

_Logged = Prompt | Delta | Candidate | Crashed | Trial | Done


@dataclass(slots=True, frozen=True)
class Entry:
    """One journal entry, ready to be written; written again unchanged until the write is confirmed."""

    seq: int
    event: _Logged


@dataclass(slots=True, eq=False)
class Generation:
    """One attempt at a job: its choices, what is told of its prompt, and what the journal has of both.

    A choice that has ended stays as it is, whoever continues the others. An error of one is the job's: the
    others end with it. With ``best_of`` nobody is shown a choice before all have ended; then the best are
    written as what is shown, numbered anew.

    Invariant: what was given to the journal stands in the log or in ``_unconfirmed``.
    """

    job: Job
    attempt: int
    attempts: int
    started_at: float
    tokenizer: Tokenizer
    owner: str | None = None
    """Whose attempt it is: a row's segment; None: the job's own."""
    fingerprint: str | None = None
    """Of what answers it."""
    prompt_ids: list[int] = field(default_factory=list[int])
    max_tokens: int = 0
    processors: Processors | None = None
    """What the job wants changed in its logits."""
    completions: list[Completion] = field(init=False)
    """All that are made, by their number in the sampler's noise."""
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    """Of the prompt's tokens but the first, as far as they have come, if the job asks."""
    prompt_first: int | None = None
    """That first one, if the job asks."""
    prompt_rest: list[int] = field(default_factory=list[int])
    """Tokens of ``prompt_logprobs``: a complete log has to be enough for a result."""
    flushed_at: float = 0.0
    cached_tokens: int | None = None
    """Of the prompt, as the attempt found that made the first token; None: there is no token yet."""
    history: History = field(default_factory=History)
    """What died with it so far."""
    on_trial: bool = False
    """The log says that it runs alone, and not yet what came of it."""

    _prompt_journalled: int = 0
    _first_journalled: bool = False
    _pending_since: float | None = None
    _seq: int = 0
    _entries: int = 0
    _marks: list[Crashed | Trial] = field(default_factory=list[Crashed | Trial])
    _unconfirmed: list[Entry] = field(default_factory=list[Entry])
    _shown: list[Done] = field(default_factory=list[Done])
    """How the choices that are returned ended, as far as the journal was told."""

    def __post_init__(self) -> None:
        count = self.job.sampling.choices
        self.completions = [Completion(self.job, self.tokenizer, index) for index in range(count)]

    @property
    def request_id(self) -> str:
        """What the engine calls this attempt: tokens of an earlier one must never be taken for ours.

        It is one request, or if there are several choices what their names begin with.
        """
        return f"{self.job.id}@{self.attempt}"

    @property
    def running(self) -> Iterator[tuple[str, Completion]]:
        """The choices that have not ended, and what the engine calls them."""
        for one in self.completions:
            if one.done is None:
                mark = f"{CHOICE_MARK}{one.index}" if len(self.completions) > 1 else ""
                yield self.request_id + mark, one

    @property
    def tokens(self) -> int:
        """Of output, of all choices."""
        return sum(len(one.ids) for one in self.completions)

    @property
    def first_token_at(self) -> float | None:
        """Of whichever choice was first."""
        return min((one.first_token_at for one in self.completions if one.first_token_at), default=None)

    @property
    def done(self) -> Done | None:
        """How the job ended: as the worst of its choices. None: some go on."""
        ends = [one.done for one in self.completions if one.done is not None]
        return decisive(ends) if len(ends) == len(self.completions) else None

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
            self._prompt_journalled = len(self.prompt_logprobs)
        if self.job.sampling.ranked:
            self._replay_the_best()

    def _replay_the_best(self) -> None:
        if not self._all_shown:
            self._shown.clear()  # they are written in one go, or all again
        for _, one in self.running if self._shown else ():  # a keeper ended the job
            one.replay_end(decisive(self._shown).model_copy(update={"choice": one.index, "text": ""}))

    def _take_over(self, event: Event) -> None:
        self._entries += 1
        match event:
            case Prompt():
                self.prompt_first, self._first_journalled = (
                    self.prompt_first if event.first is None else event.first,
                    True,
                )
                self._take_prompt(event.offset, event.ids, logprobs.unpack(event.logprobs, len(event.ids)))
            case Delta() if not self.job.sampling.ranked:
                self._replay(event)
            case Candidate():
                self._replay(event)
                if event.end is not None:
                    self.completions[event.choice].replay_end(event.end)
            case Done():
                self._shown.append(event)
                if not self.job.sampling.ranked:
                    self.completions[event.choice].replay_end(event)
            case Started():
                self.started_at = min(self.started_at, event.at)
            case _:
                pass

    def _replay(self, event: Delta | Candidate) -> None:
        if self.cached_tokens is None:
            self.cached_tokens = event.cached_tokens
        self.max_tokens = event.max_tokens or self.max_tokens
        self.completions[event.choice].replay(event, self.started_at)

    def admit(self, prompt_ids: list[int], max_tokens: int, now: float) -> None:
        """Say what runs. Tokens of earlier attempts may have used up ``max_tokens`` already."""
        self.prompt_ids, self.max_tokens = prompt_ids, max_tokens
        if self.job.sampling.prompt_logprobs is not None:
            self.prompt_first = prompt_ids[0]
        free = (
            self.job.sampling.grammar is None and self.job.tools is None
        )  # else the engine knows how it ended
        for _, one in self.running:
            if self.job.sampling.echo and not one.ids:  # else it was shown with the first of them
                one.show(self._prompt_text())
            if len(one.ids) >= max_tokens and free:
                one.finish(FinishReason.LENGTH, now=now)

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

    # ---- what the engine reports

    def push(self, output: Output, now: float) -> str | None:
        """Take one step's tokens of one choice. Returns what the engine must be told to end because of them:
        that request, or the whole attempt.
        """
        one = self.completions[int(output.id.partition(CHOICE_MARK)[2] or 0)]
        if one.done is not None:
            return None
        if self.cached_tokens is None:
            self.cached_tokens = output.cached_tokens
        if output.prompt_logprobs:
            self._push_prompt(output.prompt_from, output.prompt_logprobs)
        if self._pending_since is None and (output.token_ids or output.prompt_logprobs):
            self._pending_since = now
        stopped = one.push(output, now)
        if one.done is not None and one.done.error is not None and any(self.running):
            self.fail(one.done.error, now)
            return self.request_id
        return output.id if stopped else None

    def _push_prompt(self, start: int, told: list[TokenLogprobs]) -> None:
        ids = self.prompt_ids[start : start + len(told)]
        self._take_prompt(start, ids, logprobs.rounded(told))
        self._prompt_journalled = min(self._prompt_journalled, start - 1)

    def fail(self, error: ErrorInfo, now: float) -> None:
        """End the job with an error; its partial texts stay in the log."""
        for _, one in self.running:
            one.fail(error, now)

    def end_early(self, reason: FinishReason, now: float) -> None:
        """Cancelled or expired: keep the partial texts."""
        for _, one in self.running:
            one.finish(reason, now=now)

    def note(self, event: Crashed | Trial) -> None:
        """Put on record, behind the tokens so far, what happened to this attempt."""
        self.history.take(event)
        self._marks.append(event)

    # ---- what goes into the journal

    def due_at(self) -> float | None:
        """When pending tokens should be written; None: nothing to write. Past: now."""
        if self._unconfirmed or self._marks:
            return 0.0
        if any(one.done is not None and not one.end_journalled for one in self.completions):
            return 0.0
        if self.done is not None:
            return None if self._all_shown else 0.0
        if self._pending_since is None:
            return None
        if self._entries >= LONG_LOG_ENTRIES:
            tokens, wait_s = LONG_JOURNAL_TOKENS, LONG_JOURNAL_S
        elif self.on_trial:  # the others wait until the log says that it lived
            return 0.0
        elif self.job.stream and not self.job.sampling.ranked:
            begins = any(one.ids and not one.journalled for one in self.completions)
            return 0.0 if begins or not self.tokens else self.flushed_at + STREAM_FLUSH_S
        else:
            tokens, wait_s = JOURNAL_TOKENS, JOURNAL_S
        pending = max(one.pending for one in self.completions)
        return 0.0 if pending >= tokens else self._pending_since + wait_s

    def take_entries(self, now: float) -> list[Entry]:
        """Entries to write now, oldest first. Until ``confirm``, the same ones come again."""
        if not self._unconfirmed:
            self._pending_since = None
            self._add_prompt()
            self._add_tokens()
            for mark in self._marks:
                self._add(mark)
            self._marks.clear()
            self._add_ends()
            self.flushed_at = now
        return list(self._unconfirmed)

    def _add_tokens(self) -> None:
        limit = self.max_tokens if self.job.sampling.max_tokens is None else None
        for one in self.completions:
            if any(other.journalled for other in self.completions):
                event = one.take_tokens()
            else:
                event = one.take_tokens(max_tokens=limit, cached_tokens=self.cached_tokens or 0)
            if event is not None:
                self._add(event)

    def _add_ends(self) -> None:
        for one in self.completions:
            event = one.take_end(self._counted)
            if event is not None:
                self._add(event)
            if isinstance(event, Done):
                self._shown.append(event)
        if self.job.sampling.ranked and self.done is not None and not self._all_shown:
            for rank, one in enumerate(self._best()):
                self._add_best(one, rank)

    def _add_best(self, one: Completion, rank: int) -> None:
        """A choice that turned out best, as what is shown: its tokens, then its whole text."""
        done = self._end_of(one, rank)
        for start in range(0, len(one.ids), ENTRY_TOKENS):
            some = slice(start, start + ENTRY_TOKENS)
            told = None if self.job.sampling.logprobs is None else logprobs.pack(one.logprobs[some])
            at = None if start else one.first_token_at
            self._add(Delta(choice=rank, offset=start, ids=tuple(one.ids[some]), logprobs=told, at=at))
        self._shown.append(done.model_copy(update={"text": one.text}))
        self._add(self._shown[-1])

    def _best(self) -> list[Completion]:
        found = logprobs.likeliest([one.logprobs for one in self.completions], self.job.sampling.n)
        return [self.completions[index] for index in found]

    def _end_of(self, one: Completion, rank: int) -> Done:
        """How a choice that turned out best ended. Where the job ended early or failed, that is how."""
        job, own = self.done, one.done
        assert job is not None, f"job {self.job.id}: ranked before its choices had ended"
        assert own is not None, f"job {self.job.id}: choice {one.index} was ranked and goes on"
        said = own if job.reason.state is own.reason.state else job
        return said.model_copy(update={"choice": rank, "usage": self._counted, "stop_tokens": 0})

    def _add_prompt(self) -> None:
        """What is known of the prompt and not in the log, in entries of a bounded size."""
        new = self.prompt_first is not None and not self._first_journalled
        while new or self._prompt_journalled < len(self.prompt_rest):
            new = False
            some = slice(self._prompt_journalled, self._prompt_journalled + ENTRY_TOKENS)
            ids = tuple(self.prompt_rest[some])
            first = None if self._prompt_journalled else self.prompt_first
            packed = logprobs.pack(self.prompt_logprobs[some])
            self._add(Prompt(offset=some.start + 1, ids=ids, logprobs=packed, first=first))
            self._prompt_journalled += len(ids)
            self._first_journalled = True

    def _add(self, event: _Logged) -> None:
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
    def _all_shown(self) -> bool:
        return len(self._shown) >= self.job.sampling.n

    @property
    def complete(self) -> bool:
        """The log ends in a confirmed ``Done`` of the last choice: the result may be committed."""
        return self._all_shown and not self._unconfirmed

    # ---- what comes out

    @property
    def usage(self) -> Usage:
        """Tokens so far, over all attempts and choices; the prompt once."""
        return self._shown[-1].usage if self._all_shown else self._counted

    @property
    def _counted(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=sum(one.tokens for one in self.completions),
            cached_tokens=self.cached_tokens or 0,
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
        if job.sampling.ranked:
            returned = [(one, self._end_of(one, rank)) for rank, one in enumerate(self._best())]
        else:
            returned = [(one, one.done) for one in self.completions if one.done is not None]
        return Result(
            job_id=job.id,
            model=job.model,
            state=done.reason.state,
            endpoint=job.endpoint,
            choices=tuple(one.choice(end) for one, end in returned),
            prompt_logprobs=self._told_of_prompt(),
            usage=self.usage,
            timings=Timings(
                submitted_at=job.submitted_at,
                started_at=self.started_at,
                first_token_at=self.first_token_at,
                finished_at=max(one.done.at for one in self.completions if one.done is not None),
            ),
            error=done.error,
            attempts=self.attempts,
            seed=job.seed,
            fingerprint=self.fingerprint,
            custom_id=job.custom_id,
            retry_of=job.retry_of,
            metadata=job.metadata,
            crashes=tuple(self.history.crashes),
        )
