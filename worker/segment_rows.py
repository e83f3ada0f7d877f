"""SegmentRows: the rows of a segment that are still to run, in order, read one by one. Pure."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator

from ..schemas.batch import LineSet, SegmentInfo, pack_lines, row_of, unpack_lines
from ..schemas.errors import InvalidRequest
from ..schemas.job import Job

# As Record.to_json writes a job: its id comes first.
_HEAD = re.compile(rb'\{"v":1,"id":"[A-Za-z0-9_-]+\.([0-9]+)"')


class SegmentRows:
    """``body``: the object with its jobs, a line each. Holds that, and three numbers a row."""

    def __init__(self, body: bytes, info: SegmentInfo, ended: LineSet) -> None:
        self._body = memoryview(body)
        self._info = info
        own = None if info.lines is None else set(unpack_lines(info.lines))
        self._own: list[int] = []
        self._places: dict[int, tuple[int, int]] = {}
        self._waiting: deque[int] = deque()
        for start, end in _lines(body):
            line = _line_of(body, start, end)
            if own is None or line in own:
                self._own.append(line)
                if line not in ended:
                    self._places[line] = start, end
                    self._waiting.append(line)

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def take(self) -> tuple[int, bytes]:
        """The next one's line number, and the JSON of its job."""
        line = self._waiting.popleft()
        start, end = self._places.pop(line)
        return line, bytes(self._body[start:end])

    def give_away(self, count: int) -> list[int]:
        """Take ``count`` from the end, for somebody else to run. Their line numbers, ascending."""
        given = [self._waiting.pop() for _ in range(count)]
        for line in given:
            del self._places[line]
        mine = set(given)
        self._own = [line for line in self._own if line not in mine]
        return sorted(given)

    def keep(self) -> SegmentInfo:
        """What the segment is made of now."""
        return _made_of(self._info, sorted(self._own))

    def give(self, segment_id: str, lines: list[int]) -> SegmentInfo:
        """What a segment of ``lines`` is made of."""
        child = self._info.model_copy(update={"id": segment_id, "parent": self._info.id})
        return _made_of(child, lines)


def parse_row(body: bytes) -> Job:
    """Raises BadInput: its client is newer than this worker, say."""
    job = Job.from_json(body)
    if row_of(job.id) is None:
        raise InvalidRequest(f"{job.id} is not the id of a row")
    return job


def _made_of(info: SegmentInfo, lines: list[int]) -> SegmentInfo:
    ends = {"first": lines[0], "last": lines[-1]} if lines else {}
    return info.model_copy(update={"lines": pack_lines(lines), "rows": len(lines), **ends})


def _lines(body: bytes) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(body):
        end = body.find(b"\n", start)
        end = len(body) if end < 0 else end
        if end > start:
            yield start, end
        start = end + 1


def _line_of(body: bytes, start: int, end: int) -> int:
    found = _HEAD.match(body, start, end)
    if found is not None:
        return int(found[1])
    where = row_of(parse_row(body[start:end]).id)
    assert where is not None, "parse_row lets only rows pass"
    return where[1]
