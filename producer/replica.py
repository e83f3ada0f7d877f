"""What a follower has been shown of a job, and what its log says: pieces, and what they lack. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ..backends.state import Entry
from ..schemas import keys
from ..schemas.events import (
    Candidate,
    Crashed,
    Delta,
    Done,
    End,
    EntryId,
    Event,
    Prompt,
    Released,
    Started,
    Trial,
    Unknown,
)
from ..schemas.job import JobState
from ..schemas.logprobs import TokenLogprobs, unpack
from ..schemas.result import Choice, FinishReason, Result
from ..schemas.tools import ToolCall

BEGINNING = EntryId(0, 0)


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one choice's text. Joined, and begun anew at a ``reset``, pieces are the result's text."""

    text: str
    """May be empty: the tokens stand for half a character, or for what may become a stop string."""
    ids: tuple[int, ...]
    choice: int
    offset: int
    """Tokens of this choice before ``ids``."""
    id: EntryId
    """Pass it as ``last`` to continue after this piece."""
    reset: bool = False
    """Forget this choice's text so far: it changed, and this piece begins it anew. Rare: see Replica."""
    finish_reason: FinishReason | None = None
    """Set on the last piece of a choice."""
    tool_calls: tuple[ToolCall, ...] | None = None
    """Set on the last piece, if the choice's text has calls of the request's tools."""
    stop_reason: str | int | None = None
    """Set on the last piece: the stop string or the stop token id that matched."""
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One for each of ``ids``, if the request asks and there are ids: a stored result's piece has none."""


@dataclass(frozen=True, slots=True)
class Final:
    """The job has ended and its result is durable. The last thing a follower yields."""

    id: EntryId
    end: End


Item: TypeAlias = Chunk | Final


@dataclass(slots=True)
class _Choice:
    tokens: int = 0
    parts: list[str] = field(default_factory=list[str])
    shown: str | None = None
    """What the caller has, where that is not ``parts``: an attempt began anew and is not that far yet."""
    ids: list[int] = field(default_factory=list[int])
    """All of them, while pieces are held back; empty otherwise."""
    begin_anew: bool = False
    finished: FinishReason | None = None
    done: Done | None = None
    told: list[TokenLogprobs] = field(default_factory=list[TokenLogprobs])
    """Of ``ids``."""

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def restart(self) -> None:
        if self.shown is None:
            self.shown = self.text
        self.parts, self.ids, self.told, self.tokens, self.finished = [], [], [], 0, None


class Replica:
    """What the log says, against what the caller was shown.

    An attempt continues where the log ends, so pieces only ever append. Should a log start over all the same
    (the server lost it, and the job was run again), pieces are held back while the new text repeats the shown
    one, and a ``reset`` goes out only if it differs. A caller that resumes from an id which the log does not
    hold gets a ``reset`` too: nobody can tell what it was shown.
    """

    def __init__(self, last: EntryId | None = None) -> None:
        self.after: EntryId | None = None
        """The last entry seen."""
        self.end: End | None = None
        self._choices: dict[int, _Choice] = {}
        self._whole = True
        self._resume_at = None if last == BEGINNING else last
        """While set: pieces up to here were shown by somebody else; they are only remembered."""
        self._begin_anew = False

    @property
    def complete(self) -> bool:
        """Whether the log holds the whole text. Call it at the end."""
        assert self.end is not None
        if self.end.state is not JobState.SUCCEEDED:
            return self._whole
        return self._whole and bool(self._choices) and all(c.finished for c in self._choices.values())

    @property
    def running(self) -> bool:
        """Whether more text must come."""
        return any(choice.finished is None for choice in self._choices.values())

    def read(self, entries: Sequence[Entry]) -> Iterator[Chunk]:
        """Take what the log holds after ``after``."""
        for entry_id, event in entries:
            if self.after is None or entry_id > self.after:
                yield from self._take(entry_id, event)

    def caught_up(self) -> Iterator[Chunk]:
        """The log has been read to its end."""
        if self._resume_at is not None:
            yield from self._resume_failed()

    def live(self, entry_id: EntryId, event: Event) -> Iterator[Chunk] | None:
        """Take an entry from the channel. None: something is missing before it, read the log."""
        if self.after is not None and entry_id <= self.after:
            return iter(())
        if self.after is None or entry_id != (self.after.attempt, self.after.seq + 1):
            return None
        return self._take(entry_id, event)

    def snapshot(self, result: Result) -> Iterator[Chunk]:
        """Show what is missing of a result, without a log."""
        at = self.after or BEGINNING
        for given in result.choices:
            choice = self._choices.setdefault(given.index, _Choice(begin_anew=self._begin_anew))
            shown = choice.text if choice.shown is None else choice.shown
            if choice.finished and choice.shown is None and not choice.begin_anew and shown == given.text:
                continue
            reset = choice.begin_anew or not given.text.startswith(shown)
            text = given.text if reset else given.text[len(shown) :]
            choice.parts, choice.shown, choice.finished = [given.text], None, given.finish_reason
            offset = 0 if reset else choice.tokens
            yield _chunk(text, (), given.index, offset, at, reset, given, None)
        self._whole = True
        if self.end is None:
            self.end = End(
                state=result.state,
                finish_reason=result.finish_reason,
                usage=result.usage,
                error=result.error,
                result=keys.result_object(result.job_id),
            )

    def _take(self, entry_id: EntryId, event: Event) -> Iterator[Chunk]:
        if self._resume_at is not None and entry_id > self._resume_at:
            yield from self._resume_failed()
        self.after = entry_id
        match event:
            case Delta():
                yield from self._delta(entry_id, event)
            case Done() if self._whole:
                choice = self._choice(event.choice)
                choice.parts.append(event.text)
                choice.finished = event.reason
                choice.done = event
                yield from self._show(entry_id, event.choice, choice.tokens, (), event.text, event.reason)
            case End():
                self.end = event
            case Started() | Prompt() | Candidate() | Released() | Trial() | Crashed() | Done() | Unknown():
                pass
        if entry_id == self._resume_at:
            self._resume_at = None
            for choice in self._choices.values():
                if choice.shown is None:
                    choice.ids.clear()
                    choice.told.clear()

    def _choice(self, index: int) -> _Choice:
        return self._choices.setdefault(index, _Choice(begin_anew=self._begin_anew))

    def _delta(self, entry_id: EntryId, event: Delta) -> Iterator[Chunk]:
        choice = self._choice(event.choice)
        if event.offset == 0 and choice.tokens:
            choice.restart()
        if event.offset != choice.tokens:
            self._whole = False  # entries were lost for good; the result will tell
        if not self._whole:
            return
        choice.tokens += len(event.ids)
        choice.parts.append(event.text)
        told = None if event.logprobs is None else tuple(unpack(event.logprobs, len(event.ids)))
        if self._resume_at is not None or choice.shown is not None:
            choice.ids += event.ids
            choice.told += told or ()
        yield from self._show(entry_id, event.choice, event.offset, event.ids, event.text, told=told)

    def _show(
        self,
        entry_id: EntryId,
        index: int,
        offset: int,
        ids: tuple[int, ...],
        text: str,
        finish_reason: FinishReason | None = None,
        told: tuple[TokenLogprobs, ...] | None = None,
    ) -> Iterator[Chunk]:
        choice = self._choices[index]
        if self._resume_at is not None:
            return
        reset, choice.begin_anew = choice.begin_anew, False
        if choice.shown is not None:
            now = choice.text
            if len(now) < len(choice.shown) and choice.shown.startswith(now) and finish_reason is None:
                return
            if now.startswith(choice.shown):
                text = now[len(choice.shown) :]
            else:
                text, ids, offset, reset = now, tuple(choice.ids), 0, True
                told = tuple(choice.told) or None
            choice.shown, choice.ids, choice.told = None, [], []
        done = choice.done if finish_reason else None
        yield _chunk(text, ids, index, offset, entry_id, reset, done, told)

    def _resume_failed(self) -> Iterator[Chunk]:
        """The log does not hold the entry to resume from: show everything, from the beginning."""
        self._resume_at = None
        self._begin_anew = True
        for index, choice in self._choices.items():
            ids, choice.ids = tuple(choice.ids), []
            told, choice.told = tuple(choice.told) or None, []
            choice.shown = None
            done = choice.done if choice.finished else None
            yield _chunk(choice.text, ids, index, 0, self.after or BEGINNING, True, done, told)


def _chunk(
    text: str,
    ids: tuple[int, ...],
    choice: int,
    offset: int,
    at: EntryId,
    reset: bool,
    done: Done | Choice | None,
    told: tuple[TokenLogprobs, ...] | None,
) -> Chunk:
    """``done``: how the choice ended, if this is its last piece."""
    chunk = Chunk(text, ids, choice, offset, at, reset, logprobs=told)
    if done is None:
        return chunk
    reason = done.reason if isinstance(done, Done) else done.finish_reason
    return replace(chunk, finish_reason=reason, stop_reason=done.stop_reason, tool_calls=done.tool_calls)
