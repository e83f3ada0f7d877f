"""Batches: many rows that are submitted, run and answered as one. Their records, states and events.

A row is job ``<batch>.<line>``; a segment ``<batch>.s<k>`` is what one message carries: rows that one worker
runs. Times are unix seconds by the state server's clock.
"""

from __future__ import annotations

import base64
import math
import re
import zlib
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeAlias, cast

from pydantic import Field, StringConstraints

from .errors import InvalidRequest
from .job import DEFAULT_TENANT, JobId, Tenant
from .result import ErrorInfo, Usage
from .webhook import WebhookUrl
from .wire import WIRE_VERSION, Answer, Bool, Float, Int, loads

BATCH_ID_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$"
BatchId = Annotated[str, StringConstraints(pattern=BATCH_ID_PATTERN)]
DAY_S = 86_400.0
MAX_REPORTED = 100
"""Problems of an input that a batch's record tells, unless its options say otherwise."""

_SEGMENT = re.compile(r"(?P<batch>[A-Za-z0-9][A-Za-z0-9_-]{0,63})\.(?P<root>s[0-9]{1,10})(-[0-9a-f]{8})?")
_ROW = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]{0,63})\.([0-9]{1,10})")


class BatchStatus(StrEnum):
    """OpenAI's names, which are the wire's."""

    VALIDATING = "validating"
    FAILED = "failed"
    """The input was not valid, and nothing ran. Failed rows do not make a batch failed."""
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Nothing follows."""
        return not NEXT_STATUS[self]


NEXT_STATUS: dict[BatchStatus, frozenset[BatchStatus]] = {
    # OpenAI draws no way from here to cancelling or expired; a batch that waits for a worker needs both.
    BatchStatus.VALIDATING: frozenset(
        {BatchStatus.IN_PROGRESS, BatchStatus.FAILED, BatchStatus.CANCELLING, BatchStatus.EXPIRED}
    ),
    BatchStatus.IN_PROGRESS: frozenset({BatchStatus.FINALIZING, BatchStatus.CANCELLING, BatchStatus.EXPIRED}),
    BatchStatus.FINALIZING: frozenset({BatchStatus.COMPLETED}),
    BatchStatus.CANCELLING: frozenset({BatchStatus.CANCELLED}),
    **dict.fromkeys(
        (BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED),
        frozenset[BatchStatus](),
    ),
}


class LineProblem(Answer):
    """Why a line of the input cannot run."""

    code: str
    message: str
    param: str | None = None
    line: Int | None = None
    """From 1, empty lines counted; None: the whole file."""


class RequestCounts(Answer):
    """Rows. ``total`` counts those that were refused, too, if the others run all the same."""

    total: Int = 0
    completed: Int = 0
    """Answered."""
    failed: Int = 0
    """Ended without an answer: failed, refused, cancelled, expired."""


class BatchOptions(Answer):
    """What a batch is to do, beyond running its rows."""

    on_invalid: Literal["fail", "skip"] = "fail"
    max_errors: Annotated[int, Field(strict=True, ge=1, le=10_000)] = MAX_REPORTED
    """Problems of the input that are told."""
    stop_after_failed: Annotated[int, Field(strict=True, ge=1)] | None = None
    """Cancel the batch once so many rows have failed."""
    stop_after_share: Annotated[float, Field(strict=True, gt=0.0, le=1.0)] | None = None
    """The same as a share of all rows."""
    input_order: Bool = False
    """The output's lines stand in the order of the input's."""
    webhook: WebhookUrl | None = None
    """Where to send an event when it is final."""
    webhook_every_percent: Annotated[int, Field(strict=True, ge=1, le=99)] | None = None
    """Tell it of the start, too, and each time so many percent more of the rows have ended."""
    retention_s: Annotated[float, Field(gt=0.0, le=3650 * DAY_S, allow_inf_nan=False)] = 30 * DAY_S
    """How long its record and files are kept once it is final."""


class Batch(Answer):
    """A batch as it is submitted, and as it stands. A client that opens one sets what it asks for, and
    ``request_counts.total``; the state server sets the rest.
    """

    v: Literal[1] = WIRE_VERSION
    id: BatchId
    model: Annotated[str, Field(min_length=1, max_length=256)]
    endpoint: str = "/v1/completions"
    tenant: Tenant = DEFAULT_TENANT
    input: str = ""
    """What the input was called: a path, a URL, a file's id."""
    input_digest: str = ""
    """Of its rows as they are sent: the same input has the same, in whatever form."""
    completion_window_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = DAY_S
    metadata: dict[str, str] = Field(default_factory=dict[str, str], max_length=16)
    options: BatchOptions = BatchOptions()

    retry_of: BatchId | None = None
    """The batch whose failed rows these are: its other lines are part of the answer."""

    status: BatchStatus = BatchStatus.VALIDATING
    paused: Bool = False
    reason: ErrorInfo | None = None
    """Why it was cancelled, if nobody asked for it."""
    trouble: ErrorInfo | None = None
    """What keeps it from becoming final: a person must mend that …"""
    trouble_at: Float | None = None
    """… and when that was last seen."""
    errors: tuple[LineProblem, ...] = ()
    """The first problems of the input."""
    problems: Int = 0
    """All of them."""
    request_counts: RequestCounts = RequestCounts()
    usage: Usage = Usage()
    planned_tokens: Int = 0
    """Of the prompts that were validated."""
    validated: Int = 0
    """Rows that were."""
    segments: Int = 0
    created_at: Float | None = None
    in_progress_at: Float | None = None
    expires_at: Float | None = None
    finalizing_at: Float | None = None
    completed_at: Float | None = None
    failed_at: Float | None = None
    expired_at: Float | None = None
    cancelling_at: Float | None = None
    cancelled_at: Float | None = None
    output: str | None = None
    """Names in the result store, once they are whole."""
    error_output: str | None = None
    manifest: str | None = None


class Phase(StrEnum):
    """What a worker does with a segment's rows."""

    VALIDATE = "validate"
    """Everything that a run would refuse them for, before anything runs."""
    RUN = "run"


class Segment(Answer):
    """The body of a segment's message. What the state server says of it counts, not this."""

    v: Literal[1] = WIRE_VERSION
    kind: Literal["segment"] = "segment"
    phase: Phase = Phase.RUN
    id: JobId


class SegmentInfo(Answer):
    """What a segment is made of."""

    id: JobId
    input: str
    """Name of the object in the result store that holds its rows: a ``Job`` in JSON a line. What was split
    off shares it with the segment that it came from."""
    rows: Int
    first: Int
    """The lowest line …"""
    last: Int
    """… and the highest, of the batch's input."""
    lines: str | None = None
    """Packed: those of ``input`` that are its own; None: all."""
    parent: JobId | None = None
    """What it was split off from."""


class RowTimes(Answer):
    """When rows ran that began and ended with one worker. Unix seconds by its clock."""

    first_token_at: Float
    """The earliest …"""
    finished_at: Float
    """… and the latest."""
    completion_tokens: Int
    ttft: dict[str, Int] = Field(default_factory=dict[str, int])
    """How many rows had their first token how long after they began, by ``ttft_bin``."""


class ResultObject(Answer):
    """An object of finished rows, as it joins a batch: ``accept`` is the only way in."""

    v: Literal[1] = WIRE_VERSION
    segment: str
    """``client`` and ``keeper`` for rows that no worker ended."""
    attempt: Int = 0
    kind: Literal["output", "errors"]
    name: str
    """In the result store."""
    rows: Int
    bytes: Int
    sha256: str
    """Of its content, in hexadecimal."""
    lines: str
    """Packed, ascending; the object's lines stand in this order."""
    cancelled: str = ""
    """Those of ``lines`` that were cancelled, packed …"""
    expired: str = ""
    """… and those whose time ran out."""
    usage: Usage = Usage()
    times: RowTimes | None = None
    """None: no row of it was made by one worker from its first token to its last."""


class OpenedBatch(Answer):
    """A batch as it was opened, in the result store: its record can be made again from it."""

    v: Literal[1] = WIRE_VERSION
    batch: Batch
    segments: tuple[SegmentInfo, ...] = ()
    objects: tuple[ResultObject, ...] = ()
    """Of the rows that are in no segment, since its client refused or answered them."""


# ---- ids


def is_segment(job_id: str) -> bool:
    """Whether this is a segment's id."""
    return _SEGMENT.fullmatch(job_id) is not None


def segment_id(batch_id: str, number: int) -> str:
    """The id of a batch's segment. From 1 by custom, and never given twice."""
    return f"{batch_id}.s{number}"


def child_segment(parent: str, mark: str) -> str:
    """The id of what is split off a segment; ``mark``: eight hexadecimal digits that nobody else draws."""
    found = _SEGMENT.fullmatch(parent)
    assert found is not None, f"{parent} is no segment"
    return f"{found['batch']}.{found['root']}-{mark}"


def batch_of(job_id: str) -> str:
    """The batch of a row or a segment."""
    return job_id.partition(".")[0]


def row_id(batch_id: str, line: int) -> str:
    """The job id of a row."""
    return f"{batch_id}.{line}"


def row_of(job_id: str) -> tuple[str, int] | None:
    """Batch and line of a row; None: not a row's id."""
    found = _ROW.fullmatch(job_id)
    return None if found is None else (found[1], int(found[2]))


# ---- sets of lines


def pack_lines(lines: Sequence[int]) -> str:
    """Ascending line numbers in little space: their gaps as varints, compressed, in base64. "" for none."""
    if not lines:
        return ""
    packed, last = bytearray(), 0
    for line in lines:
        gap = line - last
        assert gap > 0, f"line {line} after {last}"
        last = line
        while gap > 0x7F:
            packed.append(gap & 0x7F | 0x80)
            gap >>= 7
        packed.append(gap)
    return base64.b64encode(zlib.compress(bytes(packed), 6)).decode()


def unpack_lines(packed: str) -> list[int]:
    """What ``pack_lines`` packed."""
    lines: list[int] = []
    if not packed:
        return lines
    line = gap = shift = 0
    for byte in zlib.decompress(base64.b64decode(packed)):
        gap |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            line += gap
            lines.append(line)
            gap = shift = 0
    return lines


class LineSet:
    """Line numbers as a bitmap of Redis: bit ``line % 8`` from the left of byte ``line // 8``."""

    def __init__(self, bits: bytes = b"", start: int = 0) -> None:
        self._bits, self._start = bits, start
        """``bits`` begins with byte number ``start``."""

    def __contains__(self, line: int) -> bool:
        at = (line >> 3) - self._start
        return 0 <= at < len(self._bits) and bool(self._bits[at] & (0x80 >> (line & 7)))

    def missing(self, lines: Iterable[int]) -> list[int]:
        """Those of ``lines`` that are not in it."""
        return [line for line in lines if line not in self]


# ---- times

_TTFT_FINEST_S, _TTFT_STEP = 1e-4, 1.1


def ttft_bin(seconds: float) -> int:
    """Which of bins that grow by a tenth; within 5 % of ``ttft_of``, from 0.1 ms up."""
    return max(0, round(math.log(max(seconds, _TTFT_FINEST_S) / _TTFT_FINEST_S, _TTFT_STEP)))


def ttft_of(number: int) -> float:
    """Seconds that a bin stands for."""
    return _TTFT_FINEST_S * _TTFT_STEP**number


# ---- events


class StatusChanged(Answer):
    """The batch went from one state to another, or was paused or resumed."""

    kind: Literal["status"] = "status"
    status: BatchStatus
    paused: Bool = False
    reason: ErrorInfo | None = None
    at: Float


class Validated(Answer):
    """A segment was validated."""

    kind: Literal["validated"] = "validated"
    segment: str
    rows: Int
    """Valid ones."""
    problems: Int = 0
    at: Float


class RowsEnded(Answer):
    """Rows ended: read them from the object. Also tells how far the batch is."""

    kind: Literal["rows"] = "rows"
    object: str
    """Its name in the result store."""
    output: Literal["output", "errors"]
    rows: Int
    counts: RequestCounts
    """Of the batch, these rows included."""
    at: Float


class UnknownEvent(Answer):
    """An event of a kind that a later version writes."""

    kind: str


BatchEvent: TypeAlias = StatusChanged | Validated | RowsEnded | UnknownEvent
_EVENTS: dict[str, type[StatusChanged | Validated | RowsEnded]] = {
    "status": StatusChanged,
    "validated": Validated,
    "rows": RowsEnded,
}


def batch_event_from_json(data: str | bytes) -> BatchEvent:
    """Raises InvalidJson or InvalidRequest."""
    body = loads(data)
    kind: Any = cast("dict[str, Any]", body).get("kind") if isinstance(body, dict) else None
    if not isinstance(kind, str):
        raise InvalidRequest("an event is an object with a kind", param="kind")
    known = _EVENTS.get(kind)
    return UnknownEvent(kind=kind) if known is None else known.from_python(body)
