"""Intake: one input, read and checked, on its way to segments. START HERE.

First pass: ``read`` checks every record and spools it. Second pass: ``cuts`` hands out segments. In between
its digest is known, and with it the id of the batch: the same input is the same batch, however often it is
submitted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

from ...schemas.errors import BadInput
from ...schemas.job import Job
from ...schemas.result import ErrorInfo
from . import check, molds
from .check import Checked, Refusal, Rules
from .copies import Copies
from .cutting import Cut, Sent, cut, with_copies
from .order import in_order, windows, work_s
from .records import Record, as_line, read_records
from .sources import FileName, open_input
from .spool import Spool, Spooled
from .twins import Twins

LAYOUT = 1
"""Goes up when the same input would be cut in other places: an id stands for segments, too."""

Taken = Callable[[Spooled], bool]
"""Told of a row that is about to be sent; True: it needs no worker."""


class InvalidInput(BadInput):
    """The input has lines that are no requests, and nothing ran."""

    code = "invalid_input"

    def __init__(self, invalid: int, rows: int, errors: Sequence[Refusal] = ()) -> None:
        super().__init__(
            f"{invalid:,} of {rows:,} lines not valid, nothing ran; fix the input, or use --on-invalid skip"
        )
        self.invalid, self.rows, self.errors = invalid, rows, tuple(errors)


class Intake:
    """A context manager: what it has read lies in temporary files until it is left."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.checked = Checked()
        self._spool = Spool(indexed=rules.dedupe)
        self._copies = Copies()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._copies.__exit__()
        self._spool.__exit__()

    # ---- first pass

    def read(self, name: FileName) -> Checked:
        """A file. Raises BadInput, StoreUnavailable, Misconfigured."""
        limit = check.line_limit(self.rules.settings)
        with open_input(name, self.rules.settings) as file:
            return self.take(read_records(file, name.form, limit, self.rules.shape))

    def take_requests(self, requests: Iterable[Mapping[str, Any]]) -> Checked:
        """Requests as a program has them, numbered from 1: what a line of JSON may say, they may."""
        return self.take((number, as_line(each)) for number, each in enumerate(requests, 1))

    def take(self, records: Iterable[tuple[int, Record]]) -> Checked:
        """All records of an input."""
        with ExitStack() as stack:
            same = stack.enter_context(Twins()) if self.rules.dedupe else None
            self.checked = check.check(records, self.rules, self._spool, same)
            if same is not None:
                self._copies.find(same, self.checked.duplicates)
                self.checked.copies = self._copies.count
        return self.checked

    def take_jobs(self, jobs: Iterable[Job]) -> Checked:
        """Rows of an earlier batch, under the lines they had. They were checked then."""
        found = self.checked
        for job in jobs:
            line = int(job.id.rpartition(".")[2])
            prompt, output = molds.estimate(job)
            body = molds.body_of(job)
            self._spool.add(Spooled(line, job.custom_id or "", body, False, prompt, output))
            found.rows += 1
            found.prompt_tokens += prompt
            found.output_tokens += output
            found.endpoint = found.endpoint or job.endpoint.value
        found.digest = self._spool.digest
        return found

    def batch_id(self, prefix: str, *parts: object) -> str:
        """Follows from what the input says and ``parts``."""
        named = json.dumps([LAYOUT, self.checked.digest, self.rules.dedupe, *parts], sort_keys=True)
        return prefix + hashlib.sha256(named.encode()).hexdigest()[:24]

    # ---- second pass

    @property
    def work_s(self) -> float:
        """Estimated seconds of one worker's work."""
        found = self.checked
        return work_s(Spooled(0, "", b"", False, found.prompt_tokens, found.output_tokens)) + (
            work_s(Spooled(0, "", b"")) * max(0, found.rows - 1)
        )

    def cuts(self, refused: Callable[[Refusal], None], taken: Taken | None = None) -> Iterator[Cut]:
        """The segments, in order. Refused and taken rows are told on the way, as the input has them."""
        return cut(self._sent(refused, taken), self.work_s)

    def _sent(self, refused: Callable[[Refusal], None], taken: Taken | None) -> Iterator[Sent]:
        copies: dict[int, list[int]] = {}
        for window in windows(self._wanted(refused, taken, copies)):
            for row in in_order(window):
                yield from with_copies(row, map(self._spool.at, copies.pop(row.ordinal)))

    def _wanted(
        self, refused: Callable[[Refusal], None], taken: Taken | None, copies: dict[int, list[int]]
    ) -> Iterator[Spooled]:
        """Rows that go to workers by themselves; ``copies`` gets those that go with them."""
        for row in self._spool.rows():
            if row.refused:
                refused(Refusal(row.line, row.custom_id, ErrorInfo.from_json(row.body)))
            elif row.ordinal in self.checked.duplicates:
                refused(check.duplicate(row.line, row.custom_id))
            elif taken is not None and taken(row):  # its copies are, too, each in its turn
                continue
            elif row.ordinal not in self._copies:
                copies[row.ordinal] = self._copies.of(row.ordinal)
                yield row
