"""What stands in a job's log and on its channel: tokens, ends, what went wrong, and what later versions add.

The log is a Redis Stream ``gm:{job}:out``; each entry has one field ``d``, the JSON of one event, and an id
``<attempt>-<seq>``. The channel of the same name carries ``<id> <json>``. ``schemas/README.md`` is the guide
for subscribers in other languages.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Self, TypeAlias, cast

from .errors import InvalidRequest
from .job import JobState
from .result import Crash, ErrorInfo, FinishReason, Usage
from .tools import ToolCall
from .wire import Answer, Bool, Float, Int, loads

_ENTRY_ID = re.compile("([0-9]{1,20})-([0-9]{1,20})")


class EntryId(NamedTuple):
    """``<attempt>-<seq>``: orders entries, and fences: a log never accepts an id below its top."""

    attempt: int
    seq: int

    @classmethod
    def parse(cls, text: str | bytes) -> Self:
        """Raises InvalidRequest unless ``text`` is ``<number>-<number>``, each of 64 bits at most."""
        given = text.decode("ascii", "replace") if isinstance(text, bytes) else text
        found = _ENTRY_ID.fullmatch(given)
        numbers = [int(digits) for digits in found.groups()] if found else []
        if not numbers or max(numbers) >= 2**64:
            raise InvalidRequest("an entry id looks like 1700000000000-12", param="last_id")
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.attempt}-{self.seq}"


class Started(Answer):
    """An attempt began. The first entry of each attempt, always with seq 0."""

    kind: Literal["started"] = "started"
    worker: str
    at: Float
    """Unix seconds by the state server's clock."""


class _Tokens(Answer):
    """New tokens of one choice. ``text`` may be empty: half a character, or a possible stop string, waits.

    ``offset`` counts the tokens of this choice before ``ids``: a reader that knows how many tokens it has
    can tell a repetition (offset below), a continuation (equal) and a gap (above).
    """

    choice: Int = 0
    offset: Int
    ids: tuple[Int, ...]
    text: str = ""
    at: Float | None = None
    """Unix seconds when the first of these tokens was sampled; set on the first delta of a choice."""
    logprobs: str | None = None
    """Of these tokens, packed: see ``logprobs.py``. None: the request did not ask."""
    max_tokens: Int | None = None
    """What the worker allowed a job that named no number, so that the next worker allows the same; set on the
    job's first delta.
    """
    cached_tokens: Int = 0
    """Of the prompt, that the first attempt need not compute; set on the job's first delta."""


class Delta(_Tokens):
    """New tokens of a choice that is shown."""

    kind: Literal["delta"] = "delta"


class Prompt(Answer):
    """Log probabilities of prompt tokens, if the request asks: of ``ids``, which begin at ``offset``.

    The prompt's first token has none, so the first piece has offset 1. A piece that begins before the end of
    the one before it comes from a later attempt, and what is behind its offset counts no more.
    """

    kind: Literal["prompt"] = "prompt"
    offset: Int
    ids: tuple[Int, ...]
    logprobs: str
    """Packed: see ``logprobs.py``."""
    first: Int | None = None
    """The prompt's first token; set on a first piece."""


class Released(Answer):
    """The attempt ended in good order and without a result: its worker had to leave."""

    kind: Literal["released"] = "released"
    at: Float
    """Unix seconds by the state server's clock."""


class Trial(Answer):
    """From here on this attempt runs alone until it has made a token: something died with it before."""

    kind: Literal["trial"] = "trial"
    at: Float


class Crashed(Crash):
    """The engine died; the attempt lives on in the next one, if its worker does."""

    kind: Literal["crashed"] = "crashed"


class Done(Answer):
    """A choice has ended. With the last one the log is complete: the result can be built from it alone."""

    kind: Literal["done"] = "done"
    reason: FinishReason
    choice: Int = 0
    text: str = ""
    """What the detokeniser or the stop matcher still held back."""
    stop_reason: str | Int | None = None
    closed: Bool | None = None
    """As in ``Choice``."""
    tool_calls: tuple[ToolCall, ...] | None = None
    """As in ``Choice``."""
    error: ErrorInfo | None = None
    stop_tokens: Int = 0
    """1: an end or stop token was drawn, which counts as usage and has no text. Told where a job has several
    choices, so that an attempt which goes on with the others can count.
    """
    usage: Usage = Usage()
    """Of the whole job so far; the last choice's is the job's."""
    at: Float


class Candidate(_Tokens):
    """The same of a choice that may not be shown: the best of several will be (``best_of``).

    Once all have ended, the best are told as ``Delta`` and ``Done``, numbered anew.
    """

    kind: Literal["candidate"] = "candidate"
    end: Done | None = None
    """How it ended, on its last entry; ``text`` in there is its last."""


class End(Answer):
    """The result is durable. The last entry of a log."""

    kind: Literal["end"] = "end"
    state: JobState
    finish_reason: FinishReason | None = None
    usage: Usage = Usage()
    error: ErrorInfo | None = None
    result: str | None = None
    """Name of the object in the result store."""


class Unknown(Answer):
    """An event of a kind that a later version writes. It takes its place in the log and tells us nothing."""

    kind: str


Event: TypeAlias = Started | Prompt | Delta | Candidate | Released | Trial | Crashed | Done | End | Unknown
_KINDS: dict[str, type[Started | Prompt | Delta | Candidate | Released | Trial | Crashed | Done | End]] = {
    "started": Started,
    "prompt": Prompt,
    "delta": Delta,
    "candidate": Candidate,
    "released": Released,
    "trial": Trial,
    "crashed": Crashed,
    "done": Done,
    "end": End,
}


def decisive(ends: Iterable[Done]) -> Done:
    """Of the ends of a job's choices the one that is the job's: the first error, else the first
    that came from outside, else the first. At least one.
    """
    told = list(ends)
    for bad in (JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED):
        if (found := next((one for one in told if one.reason.state is bad), None)) is not None:
            return found
    return told[0]


def event_from_json(data: str | bytes) -> Event:
    """Raises InvalidJson or InvalidRequest."""
    body = loads(data)
    kind: Any = cast("dict[str, Any]", body).get("kind") if isinstance(body, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest("an event is an object with a kind", param="kind")
    known = _KINDS.get(kind)
    return Unknown(kind=kind) if known is None else known.from_python(body)
