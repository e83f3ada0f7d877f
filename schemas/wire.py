"""JSON in and out. One base class for everything that crosses a process."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from difflib import get_close_matches
from functools import cache
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import InvalidJson, InvalidRequest, MissingParameter

WIRE_VERSION = 1
MAX_SHOWN_CHARS = 80
SLIP = 0.75
"""From here on (difflib's ratio) an unknown name is taken for a known one that was written wrong."""

# JSON has one number type and pydantic is lenient: without these, true would pass as 1 and "5" as 5.
Int = Annotated[int, Field(strict=True)]
MAX_COUNT = 2**31 - 1
Count = Annotated[int, Field(strict=True, ge=0, le=MAX_COUNT)]
"""A number or an id of tokens: more than any model has, and it fits the integers of every layer below."""
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Bool = Annotated[bool, Field(strict=True)]


class Record(BaseModel):
    """A frozen record; ``from_json(to_json(x)) == x``. Unknown fields are refused.

    That is right for requests: what a reader does not know, it would silently not do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> str:
        """Compact JSON. Fields at their default are left out, but for those that say what the record is."""
        body = self.model_dump_json(exclude_defaults=True)
        names = _heads(type(self))
        if not names:
            return body
        head = ",".join([f'"{name}":{json.dumps(getattr(self, name))}' for name in names])
        return "{" + head + ("}" if body == "{}" else "," + body[1:])

    @classmethod
    def from_json(cls, data: str | bytes) -> Self:
        """Raises InvalidJson (not JSON, not UTF-8) or InvalidRequest (names the first bad field)."""
        return cls.from_python(loads(data))

    @classmethod
    def from_python(cls, data: Any, *, beside: Collection[str] = ()) -> Self:
        """Like ``from_json`` for data that is parsed already.

        ``beside``: names that were taken out of it before, for "did you mean".
        """
        try:
            return cls.model_validate(data)
        except ValidationError as exc:
            raise invalid_request(exc, {*cls.model_fields, *beside}) from exc


@cache
def _heads(kind: type[Record]) -> tuple[str, ...]:
    """The fields that say what a record is: its JSON begins with them."""
    return tuple(name for name in ("v", "kind") if name in kind.model_fields)


class Answer(Record):
    """A record that tells of a job, a worker or a model. Unknown fields are dropped.

    Its writer may be newer than its reader, and what was added is nothing that the reader asked for.
    """

    model_config = ConfigDict(extra="ignore")


def loads(data: str | bytes) -> Any:
    """Parse one JSON value strictly: UTF-8 only, no NaN, no Infinity. Raises InvalidJson."""
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
    except UnicodeDecodeError as exc:
        raise InvalidJson(f"not UTF-8: byte 0x{data[exc.start]:02x} at position {exc.start:,}") from exc
    try:
        value = _DECODER.decode(text)
        if "\\ud" in text or "\\uD" in text:  # half a surrogate pair parses, and cannot be written again
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeEncodeError as exc:
        raise InvalidJson("not Unicode: an escape \\ud800 to \\udfff without its other half") from exc
    except json.JSONDecodeError as exc:
        what = exc.msg.removesuffix(" at")  # "Unterminated string starting at"
        where = f" at column {exc.colno:,}" if exc.doc else ""
        raise InvalidJson(f"not JSON: {what}{where}") from exc
    except RecursionError as exc:
        raise InvalidJson("not accepted: JSON nested too deep") from exc
    except ValueError as exc:  # Python reads no integer that long: its digits would take quadratic time
        limit = sys.get_int_max_str_digits()
        raise InvalidJson(f"not accepted: an integer of more than {limit:,} digits") from exc


def _refuse_constant(name: str) -> float:
    raise json.JSONDecodeError(f"{name} is not a JSON number", "", 0)  # the parser does not say where


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)  # json.loads would make one for every line


def _in_json_words(message: str) -> str:
    for python, word in (("tuple", "list"), ("Tuple", "List"), ("dictionary", "JSON object")):
        message = message.replace(python, word)
    return message


def kind_of(value: Any) -> str:
    """What JSON calls a value's type: what a user is told instead of the value."""
    names: dict[Any, str] = {
        type(None): "null",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        bytes: "bytes",
    }
    return names.get(type(value), "a list" if isinstance(value, list | tuple) else "an object")


def shown(name: str) -> str:
    """A name of the caller's choosing as part of a message: one short line, and nothing a terminal obeys."""
    if len(name) > MAX_SHOWN_CHARS:
        name = name[:MAX_SHOWN_CHARS] + "…"
    return name if name.isprintable() else repr(name)[1:-1]


def invalid_request(exc: ValidationError, known: Collection[str]) -> InvalidRequest:
    """The first problem in one line, and how many more there are. Never quotes the prompt.

    ``known``: the fields of the outermost record; an unknown one may be a slip of the pen for one of them.
    """
    errors = exc.errors(include_input=False, include_url=False)
    first = errors[0]
    where = ".".join(shown(str(part)) for part in first["loc"]) or "request"
    if first["type"] == "extra_forbidden":
        meant = get_close_matches(where, sorted(known), n=1, cutoff=SLIP)
        text = f"unknown field '{where}'; " + (f"did you mean '{meant[0]}'?" if meant else "remove it")
    else:
        text = f"{where}: {_in_json_words(first['msg'].removeprefix('Value error, '))}"
    if len(errors) > 1:
        text += f" (and {len(errors) - 1:,} more problem{'s' * (len(errors) > 2)})"
    kind = MissingParameter if first["type"] == "missing" else InvalidRequest
    return kind(text, param=where)
