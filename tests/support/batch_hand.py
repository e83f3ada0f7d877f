"""A batch on a fleet, and what a worker would do with its segments: real server, real store, no engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from gristmill.backends.batches import Accepted, Refused, SegmentClaim
from gristmill.backends.state import State
from gristmill.backends.store import ResultStore
from gristmill.keeper.finisher import Finisher
from gristmill.schemas import keys
from gristmill.schemas.batch import (
    Batch,
    BatchStatus,
    LineProblem,
    Phase,
    RequestCounts,
    ResultObject,
    SegmentInfo,
    pack_lines,
    row_id,
    row_of,
    segment_id,
)
from gristmill.schemas.batch_lines import OutputLine, Response
from gristmill.schemas.job import Priority
from gristmill.schemas.result import Usage

from .journal import make_job

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def open_batch(state: State, store: ResultStore, segments: Sequence[Sequence[int]], **fields: Any) -> Batch:
    """A batch of these lines in each segment, whose inputs are in the store."""
    batch_id = fields.setdefault("id", "batch_1")
    total = fields.pop("total", sum(map(len, segments)))
    batch = Batch(**{"model": "tiny", "request_counts": RequestCounts(total=total), **fields})
    infos = [put_segment(store, batch_id, number, lines) for number, lines in enumerate(segments, 1)]
    assert state.batches.open(batch, infos)
    return batch


def put_segment(store: ResultStore, batch_id: str, number: int, lines: Sequence[int]) -> SegmentInfo:
    name = segment_id(batch_id, number)
    jobs = [
        make_job(id=row_id(batch_id, line), custom_id=f"row-{line}", priority=Priority.BATCH)
        for line in lines
    ]
    body = "".join(job.to_json() + "\n" for job in jobs)
    assert store.put_new(keys.segment_object(name), body.encode())
    return SegmentInfo(
        id=name, input=keys.segment_object(name), rows=len(lines), first=min(lines), last=max(lines)
    )


def answer(batch_id: str, line: int, text: str = "x") -> bytes:
    job = row_id(batch_id, line)
    choice = {"index": 0, "text": f"{text} {line}", "finish_reason": "stop"}
    body = {"object": "text_completion", "created": 1, "choices": [choice], "usage": USAGE}
    response = Response(status_code=200, request_id=f"req_{job}", body=body)
    return OutputLine(id=f"batch_req_{job}", custom_id=f"row-{line}", response=response).to_line()


def failure(batch_id: str, line: int) -> bytes:
    job = row_id(batch_id, line)
    response = Response(status_code=500, request_id=f"req_{job}", body={"error": {"code": "engine_died"}})
    return OutputLine(id=f"batch_req_{job}", custom_id=f"row-{line}", response=response).to_line()


@dataclass
class Hand:
    """A worker's part in one batch."""

    state: State
    store: ResultStore
    batch_id: str = "batch_1"
    worker: str = "w1"
    written: int = field(default=0)

    def claim(self, segment: str | int) -> SegmentClaim:
        name = segment if isinstance(segment, str) else segment_id(self.batch_id, segment)
        claim = self.state.batches.claim_segment(name, self.worker)
        assert isinstance(claim, SegmentClaim), claim
        return claim

    def validate(self, number: int, problems: Sequence[LineProblem] = ()) -> None:
        claim = self.claim(number)
        assert claim.phase is Phase.VALIDATE
        rows = claim.info.rows - len(problems)
        said: dict[str, Any] = {"rows": rows, "tokens": 3 * rows, "problems": problems}
        assert self.state.batches.validated(
            claim.info.id, claim.attempt, **said, count=len(problems), told=100
        )

    def finish(self) -> None:
        """All of it, as workers and a keeper would, from wherever it stands."""
        batches = self.state.batches
        batch = batches.get(self.batch_id)
        assert batch is not None, self.batch_id
        names = sorted(info.id for info in batches.segments(self.batch_id))
        if batch.status is BatchStatus.VALIDATING:
            for number in range(1, len(names) + 1):
                self.validate(number)
            batches.begin(batch)
        for name in names:
            self.run(name)
        assert Finisher(batches, self.store, "k1", 30.0).finish(self.batch_id) is BatchStatus.COMPLETED

    def lines(self, claim: SegmentClaim) -> list[int]:
        """Rows of a segment that have not ended."""
        body = self.store.get(claim.info.input) or b""
        found = [row_of(json.loads(line)["id"]) for line in body.splitlines()]
        return claim.ended.missing([row[1] for row in found if row])

    def put(self, claim: SegmentClaim, lines: Collection[int], kind: Any = "output") -> ResultObject:
        """An object of finished rows, not yet accepted."""
        self.written += 1
        make = answer if kind == "output" else failure
        body = b"".join(make(self.batch_id, line) for line in sorted(lines))
        name = keys.rows_object(claim.info.id, claim.attempt, self.written, kind)
        assert self.store.put_new(name, body)
        tokens = len(lines) if kind == "output" else 0
        return ResultObject(
            segment=claim.info.id,
            attempt=claim.attempt,
            kind=kind,
            name=name,
            rows=len(lines),
            bytes=len(body),
            sha256=hashlib.sha256(body).hexdigest(),
            lines=pack_lines(sorted(lines)),
            usage=Usage(prompt_tokens=3 * tokens, completion_tokens=2 * tokens),
        )

    def accept(self, claim: SegmentClaim, *objects: ResultObject) -> Accepted | Refused | None:
        return self.state.batches.accept(claim.info.id, claim.attempt, objects)

    def run(
        self, segment: str | int, only: Collection[int] | None = None, failing: Collection[int] = ()
    ) -> SegmentClaim:
        """Run its rows, or ``only`` these; it is ended only with the last."""
        claim = self.claim(segment)
        left = self.lines(claim)
        rows = [line for line in left if only is None or line in only]
        for kind, some in (
            ("output", [line for line in rows if line not in failing]),
            ("errors", [line for line in rows if line in failing]),
        ):
            if some:
                assert isinstance(self.accept(claim, self.put(claim, some, kind)), Accepted)
        if len(rows) == len(left):
            assert self.state.batches.end_segment(claim.info.id, claim.attempt)
        return claim


def numbers(body: bytes | None) -> list[int]:
    """Lines of the input that a file answers, in its order."""
    found = [row_of(json.loads(line)["id"].removeprefix("batch_req_")) for line in (body or b"").splitlines()]
    return [row[1] for row in found if row]
