"""Follow one job: its log first, then live, without a gap or a repetition, to its end.

``Replica`` knows what the log says and what the caller was shown, ``_protocol`` decides what comes next;
neither does any I/O. ``follow`` and ``follow_async`` carry out what ``_protocol`` asks for.
``schemas/README.md`` describes the same protocol for other languages.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ..backends.state import LOG_PAGE, AsyncState, Entry, Resubscribed, State
from ..schemas import keys
from ..schemas.errors import (
    BrokerUnavailable,
    GristmillError,
    JobNotFound,
    StoreUnavailable,
    WaitTimeout,
)
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
from ..schemas.status import JobStatus
from ..schemas.tools import ToolCall

IDLE_S = 15.0
"""Silence after which the log and the job's state are looked at."""
OUTAGE_S = 60.0
"""How long a state server may be away before the follower gives up."""
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.05, 2.0

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


# ---- what to do next


@dataclass(frozen=True, slots=True)
class _Subscribe:
    """To the job's channel, and wait for the confirmation. Answer: None."""


@dataclass(frozen=True, slots=True)
class _ReadLog:
    """One page of it. Answer: entries."""

    after: EntryId | None


@dataclass(frozen=True, slots=True)
class _Next:
    """The channel's next message. Answer: an entry, Resubscribed, or None after ``timeout_s``."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class _Status:
    """Answer: JobStatus or None."""


@dataclass(frozen=True, slots=True)
class _Fetch:
    """Answer: the result's JSON, or None."""


@dataclass(frozen=True, slots=True)
class _Sleep:
    """Answer: None."""

    seconds: float


_Ask: TypeAlias = _Subscribe | _ReadLog | _Next | _Status | _Fetch | _Sleep
_Steps: TypeAlias = Generator[_Ask | Item, Any, None]


def _protocol(
    job_id: str, last: EntryId | None, timeout_s: float | None, idle_s: float, clock: Callable[[], float]
) -> _Steps:
    """Subscribe, read the log, go on live; after a break of the connection do the same again."""
    replica = Replica(last)
    deadline = float("inf") if timeout_s is None else clock() + timeout_s
    away_since: float | None = None
    pause_s = RECONNECT_MIN_S
    while True:
        try:
            yield _Subscribe()
            yield from _catch_up(replica)
            if replica.after is None:
                yield from _look_up(job_id, replica)
            away_since, pause_s = None, RECONNECT_MIN_S
            while replica.end is None:
                yield from _live(job_id, replica, deadline, idle_s, clock)
            yield from _conclude(job_id, replica)
            return
        except BrokerUnavailable:
            away_since = clock() if away_since is None else away_since
            if clock() >= min(deadline, away_since + OUTAGE_S):
                raise
            yield _Sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, RECONNECT_MAX_S)


def _catch_up(replica: Replica) -> _Steps:
    """Read the log from where we are to its end, or to the job's."""
    while replica.end is None:
        entries: list[Entry] = yield _ReadLog(replica.after)
        yield from replica.read(entries)
        if len(entries) < LOG_PAGE:
            break
    yield from replica.caught_up()


def _live(
    job_id: str, replica: Replica, deadline: float, idle_s: float, clock: Callable[[], float]
) -> _Steps:
    """One message, or the lack of one."""
    message: Entry | Resubscribed | None = yield _Next(max(0.0, min(idle_s, deadline - clock())))
    pieces = replica.live(*message) if isinstance(message, tuple) else None
    if pieces is not None:
        yield from pieces
    else:  # a gap, a new attempt, a new connection, or a long silence
        yield from _catch_up(replica)
    if replica.end is None and clock() >= deadline:
        raise WaitTimeout(f"job {job_id} has not ended yet; it goes on, follow it from {replica.after or 0}")
    if message is None and replica.end is None:
        yield from _look_up(job_id, replica)


def _look_up(job_id: str, replica: Replica) -> _Steps:
    """Nothing comes: is the job still to end? Queued or running it is, whoever runs it now or next."""
    status: JobStatus | None = yield _Status()
    if status is not None and not status.state.final:
        return
    yield from _catch_up(replica)  # it may have ended while we asked
    if replica.end is not None:
        return
    body: str | bytes | None = yield _Fetch()
    if body is None:
        raise JobNotFound(f"job {job_id} is unknown here: it expired, or its result's time is over")
    yield from replica.snapshot(Result.from_json(body))


def _conclude(job_id: str, replica: Replica) -> _Steps:
    assert replica.end is not None
    if not replica.complete:
        body: str | bytes | None = yield _Fetch()
        if body is None:
            raise StoreUnavailable(
                f"job {job_id} has ended; a part of its log is lost and its result cannot be read here"
            )
        yield from replica.snapshot(Result.from_json(body))
    yield Final(replica.after or BEGINNING, replica.end)


# ---- doing it


def follow(
    state: State,
    job_id: str,
    last: EntryId | None = None,
    *,
    fetch: Callable[[str], str | bytes | None] | None = None,
    timeout_s: float | None = None,
    idle_s: float = IDLE_S,
    on_silence: Callable[[], object] = lambda: None,
) -> Iterator[Item]:
    """Yield a job's pieces as they are made, then one Final. Attach early, late, or again from ``last``.

    ``fetch`` finds the result by job id where the log is gone; by default only the state server is asked.
    ``on_silence`` is called when nothing has come for ``idle_s``, again and again.
    Raises JobNotFound, WaitTimeout after ``timeout_s`` in all, BrokerUnavailable after an outage of
    ``OUTAGE_S``, StoreUnavailable. A failed job is no exception here: the Final says so.
    """
    steps = _protocol(job_id, last, timeout_s, idle_s, time.monotonic)
    with ExitStack() as stack:
        subscription = None
        answer: Any = None
        error: GristmillError | None = None
        while True:
            try:
                step = steps.send(answer) if error is None else steps.throw(error)
            except StopIteration:
                return
            answer = error = None
            try:
                match step:
                    case Chunk() | Final():
                        yield step
                    case _Next(seconds):
                        assert subscription is not None
                        answer = subscription.get(seconds)
                    case _ReadLog(after):
                        answer = state.read_log(job_id, after)
                    case _Subscribe():
                        stack.close()
                        subscription = stack.enter_context(state.subscribe(job_id))
                    case _Status():
                        answer = state.status(job_id)
                        on_silence()
                    case _Fetch():
                        answer = (fetch or state.result)(job_id)
                    case _Sleep(seconds):
                        time.sleep(seconds)
            except BrokerUnavailable as exc:
                error = exc


async def follow_async(
    state: AsyncState,
    job_id: str,
    last: EntryId | None = None,
    *,
    fetch: Callable[[str], Awaitable[str | bytes | None]] | None = None,
    timeout_s: float | None = None,
    idle_s: float = IDLE_S,
    on_silence: Callable[[], Awaitable[object]] | None = None,
) -> AsyncGenerator[Item]:
    """``follow`` for asyncio. Close it (``contextlib.aclosing``) if you leave before the end."""
    steps = _protocol(job_id, last, timeout_s, idle_s, time.monotonic)
    async with AsyncExitStack() as stack:
        subscription = None
        answer: Any = None
        error: GristmillError | None = None
        while True:
            try:
                step = steps.send(answer) if error is None else steps.throw(error)
            except StopIteration:
                return
            answer = error = None
            try:
                match step:
                    case Chunk() | Final():
                        yield step
                    case _Next(seconds):
                        assert subscription is not None
                        answer = await subscription.get(seconds)
                    case _ReadLog(after):
                        answer = await state.read_log(job_id, after)
                    case _Subscribe():
                        await stack.aclose()
                        subscription = await stack.enter_async_context(state.subscribe(job_id))
                    case _Status():
                        answer = await state.status(job_id)
                        if on_silence is not None:
                            await on_silence()
                    case _Fetch():
                        answer = await (fetch or state.result)(job_id)
                    case _Sleep(seconds):
                        await asyncio.sleep(seconds)
            except BrokerUnavailable as exc:
                error = exc
