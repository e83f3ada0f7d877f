"""Lines of bulk files: OpenAI's batch input, its output and error lines, and bare ``{"prompt": …}`` lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

from pydantic import Field

from . import errors
from .errors import (
    BadInput,
    GristmillError,
    InvalidMethod,
    InvalidRequest,
    ModelNotFound,
    PayloadTooLarge,
    Transient,
    UrlMismatch,
)
from .grammar import GRAMMAR_FIELDS, with_grammar
from .job import Endpoint, JobState
from .openai import PARSERS, Request, parse_messages, response_body
from .result import Choice, ErrorInfo, FinishReason, Result, Timings, Usage
from .sampling import SamplingParams
from .tools import TOOL_FIELDS, ToolCall, toolbox
from .wire import Record, loads

MAX_CUSTOM_ID_CHARS = 512
NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})
_URLS = {endpoint.value: endpoint for endpoint in PARSERS}
_ERRORS = {
    cls.code: cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, GristmillError)
}
_STATUS = {ModelNotFound.code: 404, PayloadTooLarge.code: 413}
"""HTTP status of an error code where its branch of the tree does not say it all."""


@dataclass(frozen=True, slots=True)
class Row:
    """One valid line of a bulk input."""

    number: int
    """Line number, from 1, empty lines counted: what an editor shows."""
    custom_id: str
    request: Request


class _Line(Record):
    """The envelope of an OpenAI batch line. The body is its endpoint's business."""

    custom_id: Annotated[str, Field(strict=True, min_length=1, max_length=MAX_CUSTOM_ID_CHARS)]
    method: Any = "POST"
    url: Any
    body: Any


class _BareLine(Record):
    """Our own short form: a prompt, and sampling under the names of SamplingParams beside it."""

    custom_id: Annotated[str, Field(strict=True, min_length=1, max_length=MAX_CUSTOM_ID_CHARS)] | None = None
    model: Annotated[str, Field(strict=True, min_length=1, max_length=256)] | None = None
    prompt: Annotated[str, Field(strict=True, min_length=1)] | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None


def parse_line(data: bytes, number: int, defaults: Mapping[str, Any] = NO_DEFAULTS) -> Row:
    """One line of a bulk input, which is not empty. Raises InvalidJson, or InvalidRequest or a subclass.

    ``defaults``: ``max_tokens`` and other sampling fields that both forms know, for lines that give none.
    """
    return parse_fields(fields_of(data), number, defaults)


def fields_of(data: bytes) -> dict[str, Any]:
    """A line's JSON object. Raises InvalidJson, InvalidRequest."""
    line = loads(data)
    if not isinstance(line, dict):
        raise InvalidRequest("the line is not a JSON object")
    return cast("dict[str, Any]", line)


def parse_fields(fields: dict[str, Any], number: int, defaults: Mapping[str, Any] = NO_DEFAULTS) -> Row:
    """``parse_line`` of what is JSON no more, or never was."""
    if "body" in fields or "url" in fields or "method" in fields:
        return _batch_row(fields, number, defaults)
    return _bare_row(_with_defaults(fields, defaults), number)


def claimed_custom_id(data: bytes) -> str | None:
    """The custom_id of a line that may be otherwise wrong, for its error line."""
    try:
        line: Any = json.loads(data)
    except (ValueError, RecursionError):
        return None
    found: Any = cast("dict[str, Any]", line).get("custom_id") if isinstance(line, dict) else None
    return found if isinstance(found, str) and 0 < len(found) <= MAX_CUSTOM_ID_CHARS else None


def default_custom_id(number: int) -> str:
    """The custom_id of a line that brings none."""
    return f"line-{number}"


def _with_defaults(fields: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    given = {name for name, value in fields.items() if value is not None}
    if "max_completion_tokens" in given:
        given.add("max_tokens")
    if not given.isdisjoint(GRAMMAR_FIELDS):
        given.update(GRAMMAR_FIELDS)
    return fields | {name: value for name, value in defaults.items() if name not in given}


def _batch_row(fields: dict[str, Any], number: int, defaults: Mapping[str, Any]) -> Row:
    line = _Line.from_python(fields)
    if line.method != "POST":
        raise InvalidMethod('method is not "POST", the only one there is', param="method")
    endpoint = _URLS.get(line.url) if isinstance(line.url, str) else None
    if endpoint is None:
        raise UrlMismatch(f"url is none of {', '.join(_URLS)}", param="url")
    body = line.body
    if isinstance(body, dict):
        body = _with_defaults(cast("dict[str, Any]", body), defaults)
    request = PARSERS[endpoint](body)
    if request.stream:
        raise InvalidRequest("body.stream is true; a file of requests is not streamed", param="body.stream")
    return Row(number, line.custom_id, request)


def _bare_row(fields: dict[str, Any], number: int) -> Row:
    """Sampling names are taken out first, so that what is left over is an unknown field."""
    if "inputs" in fields:
        raise InvalidRequest(
            "inputs and parameters are TGI's form; write prompt, and beside it max_tokens and the like",
            param="inputs",
        )
    fields = with_grammar(fields)
    sampling = {k: v for k, v in fields.items() if k in SamplingParams.model_fields and v is not None}
    if isinstance(sampling.get("stop"), str):
        sampling["stop"] = [sampling["stop"]]
    rest = {k: v for k, v in fields.items() if k not in SamplingParams.model_fields}
    line = _BareLine.from_python(rest, beside=SamplingParams.model_fields)
    if (line.prompt is None) == (line.messages is None):
        raise InvalidRequest(
            "give prompt or messages, or a batch line with custom_id, method, url and body", param="prompt"
        )
    request = Request(
        endpoint=Endpoint.CHAT if line.messages is not None else Endpoint.COMPLETIONS,
        model=line.model,
        prompt=line.prompt,
        messages=None if line.messages is None else parse_messages(line.messages),
        sampling=SamplingParams.from_python(sampling),
        tools=toolbox({name: getattr(line, name) for name in TOOL_FIELDS}),
        metadata=line.metadata or {},
    )
    return Row(number, line.custom_id or default_custom_id(number), request)


class Response(Record):
    """The ``response`` of an output line."""

    status_code: int
    request_id: str
    body: dict[str, Any]


class OutputLine(Record):
    """A line of an output or error file. The fields are always written, null or not."""

    id: str
    custom_id: str
    response: Response | None = None
    error: dict[str, Any] | None = None

    def to_line(self) -> bytes:
        """The line with its newline; non-ASCII text as it is, so that a person can read it."""
        return (json.dumps(self.model_dump(), ensure_ascii=False, separators=(",", ":")) + "\n").encode(
            "utf-8", "surrogatepass"
        )


def output_line(result: Result, custom_id: str) -> OutputLine:
    """How a row ended. Cancelled and expired rows carry no response, as OpenAI's do not."""
    line_id = f"batch_req_{result.job_id}"
    match result.state:
        case JobState.SUCCEEDED:
            body = response_body(result)
            response = Response(status_code=200, request_id=f"req_{result.job_id}", body=body)
            return OutputLine(id=line_id, custom_id=custom_id, response=response)
        case JobState.CANCELLED | JobState.EXPIRED as state:
            return unfinished_line(result.job_id, custom_id, state)
        case _:
            error = result.error or ErrorInfo(code="internal_error", message="the job failed")
            return error_line(result.job_id, custom_id, error)


def unfinished_line(row_id: str, custom_id: str, state: JobState) -> OutputLine:
    """A row that was cancelled or expired before it was finished; it may never have begun."""
    message = f"This request was {state.value} before it was finished."
    error = {"code": f"batch_{state.value}", "message": message}
    return OutputLine(id=f"batch_req_{row_id}", custom_id=custom_id, error=error)


def error_line(row_id: str, custom_id: str, error: ErrorInfo) -> OutputLine:
    """A row that failed, or never ran because it was not valid."""
    status = http_status(error.code)
    kind: Literal["invalid_request_error", "server_error"] = (
        "invalid_request_error" if status < 500 else "server_error"
    )
    body = {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
    response = Response(status_code=status, request_id=f"req_{row_id}", body=body)
    return OutputLine(id=f"batch_req_{row_id}", custom_id=custom_id, response=response)


def result_of(line: OutputLine, job_id: str, model: str) -> Result:
    """What a row's line says of how it ended: its texts and counts, and no more times than the line has."""
    if line.error is not None:
        code, message = str(line.error.get("code", "")), str(line.error.get("message", ""))
        state = _ENDED_AS.get(code, JobState.FAILED)
        error = ErrorInfo(code=code, message=message) if state is JobState.FAILED else None
        return _result_without_answer(line, job_id, model, state, error)
    response = line.response
    if response is None or response.status_code >= 400:
        said: dict[str, Any] = {} if response is None else response.body.get("error", {})
        param = said.get("param")
        error = ErrorInfo(code=str(said.get("code")), message=str(said.get("message")), param=param)
        return _result_without_answer(line, job_id, model, JobState.FAILED, error)
    body = response.body
    used = body.get("usage", {})
    return Result(
        job_id=job_id,
        model=model,
        state=JobState.SUCCEEDED,
        endpoint=Endpoint.CHAT if body.get("object") == "chat.completion" else Endpoint.COMPLETIONS,
        choices=tuple(_choice_of(choice) for choice in body["choices"]),
        usage=Usage(
            prompt_tokens=used.get("prompt_tokens", 0),
            completion_tokens=used.get("completion_tokens", 0),
            cached_tokens=used.get("prompt_tokens_details", {}).get("cached_tokens", 0),
        ),
        timings=Timings(submitted_at=float(body["created"]), finished_at=float(body["created"])),
        fingerprint=body.get("system_fingerprint"),
        custom_id=line.custom_id,
    )


_ENDED_AS = {"batch_cancelled": JobState.CANCELLED, "batch_expired": JobState.EXPIRED}


def _result_without_answer(
    line: OutputLine, job_id: str, model: str, state: JobState, error: ErrorInfo | None
) -> Result:
    never = Timings(submitted_at=0.0, finished_at=0.0)
    return Result(
        job_id=job_id, model=model, state=state, error=error, timings=never, custom_id=line.custom_id
    )


def _choice_of(choice: dict[str, Any]) -> Choice:
    message: dict[str, Any] = choice.get("message") or {}
    calls = [call["function"] | {"id": call["id"]} for call in message.get("tool_calls") or ()]
    return Choice(
        index=choice["index"],
        text=choice["text"] if "text" in choice else message.get("content") or "",
        finish_reason=FinishReason.LENGTH if choice.get("finish_reason") == "length" else FinishReason.STOP,
        tool_calls=tuple(ToolCall.from_python(call) for call in calls) or None,
    )


def http_status(code: str) -> int:
    """Of an error code. Codes that no class of errors has (the engine's) are no fault of the request."""
    branch = _ERRORS.get(code, GristmillError)
    usual = 400 if issubclass(branch, BadInput) else 503 if issubclass(branch, Transient) else 500
    return _STATUS.get(code, usual)
