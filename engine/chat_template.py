"""Chat templates: the Jinja program of a model directory that turns a conversation into one prompt.

Renders what transformers renders. The template came with the weights, so it runs in Jinja's sandbox and has
bounds: its own size, loop turns and calls, repeated text, and the size of the outcome.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.environment import Template
from jinja2.exceptions import SecurityError, UndefinedError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as LoopControls  # noqa: N812  # a class that Jinja names like a function
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..schemas.errors import InvalidRequest, ModelInvalid

MAX_SOURCE_CHARS = 1_000_000
MAX_RENDERED_CHARS = 32_000_000
MAX_STEPS = 5_000_000
"""Loop turns of one rendering, a call counting for several. A long conversation takes some 100,000; this many
take seconds."""
CALL_STEPS = 20
MAX_DEPTH = 64
MAX_POWER_BITS = 4096

_steps_left: ContextVar[int] = ContextVar("steps_left", default=MAX_STEPS)


class ChatTemplate:
    """One compiled template. Threads may render at once.

    ``variables`` are what every rendering sees beside the conversation: ``bos_token`` and its like.
    """

    def __init__(self, source: str, variables: Mapping[str, Any], where: str) -> None:
        if len(source) > MAX_SOURCE_CHARS:
            raise ModelInvalid(
                f"{where}: the chat template has {len(source):,} characters; limit {MAX_SOURCE_CHARS:,}"
            )
        self._source, self._variables, self._where = source, dict(variables), where

    @cached_property
    def _template(self) -> Template:
        try:
            return _Environment().from_string(self._source)
        except (TemplateSyntaxError, RecursionError) as exc:
            line = f" line {exc.lineno}" if isinstance(exc, TemplateSyntaxError) else ""
            raise ModelInvalid(f"{self._where}: the chat template does not compile:{line} {exc}") from exc

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime | None = None,
        **extra: Any,
    ) -> str:
        """The prompt. ``extra`` variables reach the template (``enable_thinking`` and the like).

        ``now`` is what ``strftime_now`` tells; None: this moment, local time.

        Raises InvalidRequest when the template refuses the conversation or cannot cope with it or takes too
        much, ModelInvalid when it does not compile.
        """
        template = self._template
        moment = now or datetime.now()  # noqa: DTZ005  # local time, as templates expect
        variables = {
            **self._variables,
            **_plain(extra),
            "messages": [_message(each) for each in messages],
            "tools": None if tools is None else _plain(list(tools)),
            "documents": None,
            "strftime_now": moment.strftime,
            "add_generation_prompt": add_generation_prompt,
        }
        token = _steps_left.set(MAX_STEPS)
        try:
            return _bounded(template.generate(variables))
        except SecurityError as exc:
            raise InvalidRequest(
                f"the model's chat template did what is not allowed: {exc}", param="messages"
            ) from exc
        except UndefinedError as exc:
            raise InvalidRequest(f"the model's chat template needs more: {exc}", param="messages") from exc
        except TemplateError as exc:  # raise_exception: the template's own words
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {exc}", param="messages"
            ) from exc
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
        ) as exc:
            raise InvalidRequest(
                f"the model's chat template cannot render these messages ({type(exc).__name__}: {exc})",
                param="messages",
            ) from exc
        finally:
            _steps_left.reset(token)


class _Environment(ImmutableSandboxedEnvironment):
    """The names that chat templates use, and a count of what they do."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=False,
            extensions=[_GenerationTag, LoopControls],
        )
        filters = cast("dict[str, Any]", self.filters)
        filters["tojson"] = _to_json
        filters[_COUNTED] = _counted
        names = cast("dict[str, Any]", self.globals)
        names["raise_exception"] = _raise_exception
        names["dict"] = _make_dict
        names["namespace"] = _Namespace

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Compile with every loop counted."""
        for loop in source.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
            loop.iter.set_environment(self)
        return super()._generate(source, *args, **kwargs)

    def call(self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        _count(CALL_STEPS)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if right > 0 and left.bit_length() * right > MAX_POWER_BITS:
                raise SecurityError("a power that large")
        elif operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(times, int) and _length(text) * times > MAX_RENDERED_CHARS:
                    raise SecurityError(f"text repeated {times:,} times")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(Extension):
    """``{% generation %}`` marks what an assistant wrote; only training tools need the marks."""

    tags = {"generation"}  # noqa: RUF012  # as its base class declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's ``namespace()`` whose attributes cannot reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # "self" may be a keyword of the template's
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_attribute(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_attribute(name)
        super().__setitem__(name, value)


_COUNTED = "gristmill_counted"  # a filter's name, so that compiled templates find it in their environment


def _check_attribute(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r}")


def _length(value: Any) -> int:
    return len(cast("Sequence[Any]", value)) if isinstance(value, str | list | tuple) else 0


def _count(steps: int) -> None:
    left = _steps_left.get() - steps
    if left < 0:
        raise SecurityError(f"more than {MAX_STEPS:,} steps")
    _steps_left.set(left)


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _count(1)
        yield value


def _bounded(pieces: Iterable[str]) -> str:
    taken: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_RENDERED_CHARS:
            raise SecurityError(f"a prompt of more than {MAX_RENDERED_CHARS:,} characters")
        taken.append(piece)
    return "".join(taken)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """``dict(...)`` as a function: the class itself would let a template reach its methods unguarded."""
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own would escape HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A plain copy in which content made of text parts is one string: most templates take nothing else."""
    plain = cast("dict[str, Any]", _plain(message))
    if isinstance(plain.get("content"), list):
        plain["content"] = text_of(plain["content"])
    return plain


def text_of(content: Any) -> str:
    """A message's content as one string. Raises InvalidRequest for a part that is no text."""
    if isinstance(content, list | tuple):
        return "\n".join(_part_text(part) for part in cast("Sequence[Any]", content))
    return content or ""


def _part_text(part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)}:
            raise InvalidRequest(
                f"content part of type {kind[:40]!r}: this model reads text only", param="messages"
            )
        case _:
            raise InvalidRequest("a content part must be an object with type and text", param="messages")


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy made of JSON's types only: a template must not meet objects with methods of their own."""
    if depth > MAX_DEPTH:
        raise InvalidRequest(f"nested more than {MAX_DEPTH} deep", param="messages")
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Mapping():
            items = cast("Mapping[Any, Any]", value).items()
            return {str(key): _plain(each, depth + 1) for key, each in items}
        case list() | tuple():
            return [_plain(each, depth + 1) for each in cast("Sequence[Any]", value)]
        case _:
            raise InvalidRequest(f"a {type(value).__name__} where JSON was expected", param="messages")
