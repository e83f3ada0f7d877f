"""Records of a bulk input, one by one: lines of JSON, rows of CSV, rows of Parquet."""

from __future__ import annotations

import csv
import io
import json
import string
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from ...schemas.errors import BadInput, InvalidJson, InvalidRequest
from ...schemas.sampling import SamplingParams
from ...schemas.wire import loads, shown
from .sources import Form, pyarrow_parquet

Record = bytes | int | dict[str, Any] | BadInput
"""A line of JSON; of a line over the limit, its size; a table's row by column; or what is wrong with it."""

BOM = b"\xef\xbb\xbf"
PARQUET_ROWS = 1024
"""Read at once."""
HEAD_SHOWN = 20
_FIELDS = frozenset(
    [
        *("custom_id", "model", "prompt", "messages", "metadata"),
        *("tools", "tool_choice", "parallel_tool_calls"),
        *SamplingParams.model_fields,
    ]
)
"""Columns that may be fields of a request by their name; others serve templates."""
_TEXTS = frozenset(["custom_id", "model", "prompt", "adapter_id"])


class Lines(Protocol):
    """The one thing asked of a file of lines."""

    def readline(self, limit: int, /) -> bytes:
        """Up to ``limit`` bytes, to the next newline at most; empty at the end."""
        ...


def read_records(
    file: BinaryIO, form: Form, limit_bytes: int, shape: Shape | None = None
) -> Iterator[tuple[int, Record]]:
    """(number, record), blank lines left out. The number is what an editor shows; in Parquet the row's.

    ``shape``: what becomes of the records. Raises InvalidRequest for a table without a proper head, or
    without the columns that ``shape`` needs, BadInput for a file that is no Parquet.
    """
    shape = shape or Shape()
    if form is Form.JSONL:
        return read_lines(file, limit_bytes)
    if form is Form.PARQUET:
        return _parquet(file, shape)
    return _csv(file, "\t" if form is Form.TSV else ",", limit_bytes, shape)


def read_lines(file: Lines, limit_bytes: int) -> Iterator[tuple[int, bytes | int]]:
    """(number, line) of each line that is not blank; of a line over the limit, its size."""
    number = 0
    while piece := file.readline(limit_bytes + 1):
        number += 1
        if len(piece) <= limit_bytes or piece.endswith(b"\n"):
            if line := (piece.removeprefix(BOM) if number == 1 else piece).strip(b" \t\r\n"):
                yield number, line
            continue
        size = len(piece)
        while not piece.endswith(b"\n") and (piece := file.readline(1 << 20)):
            size += len(piece)
        yield number, size


def as_line(fields: Mapping[str, Any]) -> Record:
    """A program's mapping as the line of JSON that says the same."""
    try:
        return json.dumps(dict(fields)).encode()
    except (TypeError, ValueError, RecursionError) as exc:
        return InvalidJson(f"not to be written as JSON: {exc}")


# ---- tables


def _csv(file: BinaryIO, delimiter: str, limit_bytes: int, shape: Shape) -> Iterator[tuple[int, Record]]:
    csv.field_size_limit(limit_bytes)
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        lines = _TextLines(text, limit_bytes)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        if head := _head(rows):
            shape.check_head(head)
            yield from _table(head, rows, lines)
    finally:
        text.detach()  # the file is its opener's


class _TextLines:
    """Those of a table. One over the limit is an error that has its number, and is not held in memory."""

    def __init__(self, text: io.TextIOWrapper, limit_chars: int) -> None:
        self._text, self._limit = text, limit_chars
        self.number = 0
        self._row: list[str | None] = []
        """Lines of the row that is being read, at most as many as a cell may be large; None: one too long."""
        self._again = deque[str | None]()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else self._read()
        if line == "":
            raise StopIteration
        self.number += 1
        self._row.append(line)
        if line is None:
            raise csv.Error(f"a line of more than {self._limit:,} characters")
        return line

    def begin_row(self) -> int:
        """The next row begins. Returns its number."""
        self._row.clear()
        return self.number + 1

    def give_up_row(self) -> int:
        """Only the first line of this row was none; the others are read again. Returns how far it went."""
        last = self.number
        self._again.extendleft(reversed(self._row[1:]))
        self.number -= len(self._row[1:])
        return last

    def _read(self) -> str | None:
        line = self._text.readline(self._limit + 1)
        if len(line) <= self._limit or line.endswith(("\n", "\r")):
            return line
        while line and not line.endswith(("\n", "\r")):
            line = self._text.readline(1 << 20)
        return None


def _head(rows: Any) -> list[str]:
    """The first line that is not blank. Empty: there is none."""
    try:
        head: list[str] = next((row for row in rows if row), list[str]())
    except csv.Error as exc:
        raise InvalidRequest(f"line 1 is no head of a table: {exc}") from exc
    if len(set(head)) < len(head) or not all(head):
        raise InvalidRequest("line 1 names a column twice, or one without a name; it names the columns")
    return head


def _table(head: Sequence[str], rows: Any, lines: _TextLines) -> Iterator[tuple[int, Record]]:
    while True:
        number = lines.begin_row()
        try:
            cells = next(rows, None)
        except csv.Error as exc:
            last = lines.give_up_row()
            yield number, InvalidJson(_not_csv(exc, number, last))
            continue
        if cells is None:
            return
        if len(cells) != len(head) and lines.number > number:  # a stray quote has met another one
            last = lines.give_up_row()
            yield number, InvalidRequest(f"{_cells(head, cells)}; {_stray('ends in', last)}")
        elif cells:
            yield number, _row(head, cells)


def _not_csv(exc: csv.Error, number: int, last: int) -> str:
    if number == last:
        return f"not CSV: {exc}"
    return f"not CSV ({exc}): {_stray('would end in or after', last)}"


def _stray(ends: str, last: int) -> str:
    return f"a quote that is opened in this line {ends} line {last}; close it, or double it if it is text"


def _cells(head: Sequence[str], cells: Sequence[str]) -> str:
    return f"the row has {len(cells)} cells and the head has {len(head)}"


def _row(head: Sequence[str], cells: Sequence[str]) -> dict[str, Any] | BadInput:
    if len(cells) != len(head):
        return InvalidRequest(_cells(head, cells))
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return InvalidJson("not UTF-8")
    return {name: _value(name, cell) for name, cell in zip(head, cells, strict=True) if cell}


def _value(name: str, cell: str) -> Any:
    """A cell of a column that is a request's field and no text: a number, true, a JSON list or object."""
    if name not in _FIELDS or name in _TEXTS:
        return cell
    try:
        return loads(cell)
    except InvalidJson:
        return cell


def _parquet(file: BinaryIO, shape: Shape) -> Iterator[tuple[int, Record]]:
    parquet = pyarrow_parquet()
    number = 0
    try:
        table = parquet.ParquetFile(file)
        head: list[str] = table.schema_arrow.names
        shape.check_head(head)
        wanted = [name for name in head if shape.reads(name)]
        for piece in table.iter_batches(batch_size=PARQUET_ROWS, columns=wanted):
            for row in piece.to_pylist():
                number += 1
                yield number, {name: value for name, value in row.items() if value is not None}
    except (ValueError, OSError, NotImplementedError) as exc:  # pyarrow's own are one of them
        raise BadInput(f"cannot read Parquet after row {number:,}: {exc}") from exc


# ---- from a row to a request


@dataclass(frozen=True, slots=True)
class Shape:
    """How a table's row, or an object of any form, becomes a request.

    ``prompt_column`` holds the prompt; ``template`` makes it, with ``{column}`` for a column's value.
    ``chat`` sends it as a user's message, after ``system``. Where neither of the first two is given, columns
    are a request's fields by their names; else only those of ``field_columns``, and ``custom_id``: in a table
    that was made for something else ``n`` or ``user`` may mean anything.
    """

    prompt_column: str | None = None
    template: str | None = None
    id_column: str | None = None
    chat: bool = False
    system: str | None = None
    field_columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [name for name in self.field_columns if name not in _FIELDS]:
            raise InvalidRequest(
                f"'{shown(unknown[0])}' is no field of a request; those are {', '.join(sorted(_FIELDS))}",
                param="field_columns",
            )
        if self.template is not None:
            if self.prompt_column is not None:
                raise InvalidRequest("give a prompt column or a template, not both", param="template")
            self.columns()

    @property
    def active(self) -> bool:
        """Whether records are anything but requests already."""
        return any((self.prompt_column, self.template, self.id_column, self.chat, self.system))

    def columns(self) -> list[str]:
        """Those the template names. Raises InvalidRequest for what is no template."""
        try:
            parts = list(string.Formatter().parse(self.template or ""))
        except ValueError as exc:
            raise InvalidRequest(
                f"template: {exc}; write {{{{ and }}}} for braces", param="template"
            ) from exc
        for _, name, spec, conversion in parts:
            if name is not None and (not name or spec or conversion):
                raise InvalidRequest(
                    "template: name a column in braces, {like_this}, and nothing else", param="template"
                )
        return [name for _, name, _, _ in parts if name is not None]

    @property
    def _needed(self) -> list[str]:
        """Columns without which no row is a request."""
        return [name for name in (self._text_column, *self.columns(), self.id_column) if name is not None]

    @property
    def _text_column(self) -> str | None:
        wants_one = self.template is None and (self.chat or self.system is not None)
        return self.prompt_column or ("prompt" if wants_one else None)

    def reads(self, column: str) -> bool:
        """Whether anything is made of it."""
        return column in self._fields or column in self._needed

    @property
    def _fields(self) -> frozenset[str]:
        if self.prompt_column is None and self.template is None:
            return _FIELDS
        return frozenset(["custom_id", *self.field_columns])

    def check_head(self, head: Sequence[str]) -> None:
        """Raise InvalidRequest for a table whose rows would all lack the same."""
        has = f"it has {', '.join(shown(name) for name in head[:HEAD_SHOWN])}"
        if len(head) > HEAD_SHOWN:
            has += f" and {len(head) - HEAD_SHOWN:,} more"
        if missing := [name for name in self._needed if name not in head]:
            raise InvalidRequest(
                f"the table has no column '{shown(missing[0])}'; {has}; --prompt-column, --template and "
                "--id-column name those to be used",
                param=missing[0],
            )
        if not (self.prompt_column or self.template) and not {"prompt", "messages"} & set(head):
            raise InvalidRequest(
                f"the table has no column 'prompt' or 'messages'; {has}; "
                "--prompt-column names the one that holds the prompts",
                param="prompt",
            )

    def fields(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The request. Raises InvalidRequest: a column is missing or empty."""
        taken = self._fields
        fields = {name: value for name, value in row.items() if name in taken}
        if self.id_column is not None:
            fields["custom_id"] = str(self._cell(row, self.id_column))
        prompt = self._prompt(row)
        if prompt is None:
            return fields
        fields.pop("messages", None)
        if not self.chat and self.system is None:
            return fields | {"prompt": prompt}
        fields.pop("prompt", None)
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        return fields | {"messages": [*messages, {"role": "user", "content": prompt}]}

    def _prompt(self, row: Mapping[str, Any]) -> str | None:
        if self.template is not None:
            pieces = string.Formatter().parse(self.template)
            return "".join(
                text + ("" if name is None else str(self._cell(row, name))) for text, name, _, _ in pieces
            )
        column = self._text_column
        return None if column is None else str(self._cell(row, column))

    @staticmethod
    def _cell(row: Mapping[str, Any], name: str) -> Any:
        if name not in row:
            raise InvalidRequest(f"column '{shown(name)}' is empty or not there", param=name)
        return row[name]
