"""What a request may ask of the sampler, as flags of `gristmill submit` and `run`, in groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from ..schemas.errors import InvalidRequest
from .console import json_file, schema_option

F = TypeVar("F", bound=Callable[..., Any])


def bias(given: str) -> tuple[str, float]:
    """``ID=NUMBER``. Raises ValueError."""
    token, _, number = given.partition("=")
    return str(int(token)), float(number)


SEVERAL = {"multiple": True}
SWITCH = {"is_flag": True, "default": None}
GROUPS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "Sampling": {
        "--temperature": ("0 is greedy; default 1.", {"type": float}),
        "--top-p": ("Only the likeliest tokens that make up so much.", {"type": float}),
        "--top-k": ("Only so many of the likeliest tokens.", {"type": int}),
        "--min-p": ("Only tokens at least so likely, as a part of the likeliest.", {"type": float}),
        "--typical-p": ("Only the most typical tokens that make up so much.", {"type": float}),
        "--seed": ("The same seed gives the same text.", {"type": int}),
    },
    "Penalties and tokens": {
        "--repetition-penalty": ("Above 1: less of what was said, prompt included.", {"type": float}),
        "--frequency-penalty": ("For each time a token was said.", {"type": float}),
        "--presence-penalty": ("Once, for a token that was said.", {"type": float}),
        "--dry-multiplier": ("Above 0: no long repetitions (DRY).", {"type": float}),
        "--dry-base": ("How fast that grows with their length.", {"type": float}),
        "--dry-allowed-length": ("Repetitions that are free.", {"type": int}),
        "--dry-range": ("How many of the last tokens count; 0: all.", {"type": int}),
        "--dry-breaker": (
            "No repetition reaches across this text.",
            {"dest": "dry_sequence_breakers", "metavar": "TEXT", **SEVERAL},
        ),
        "--logit-bias": (
            "Add to a token's logit; may be repeated.",
            {"type": bias, "metavar": "ID=NUMBER", **SEVERAL},
        ),
        "--bad-word": (
            "Never say this; may be repeated.",
            {"dest": "bad_words", "metavar": "TEXT", **SEVERAL},
        ),
        "--allow-token": (
            "Say nothing but such tokens; may be repeated.",
            {"dest": "allowed_token_ids", "metavar": "ID", "type": int, **SEVERAL},
        ),
    },
    "Length and end": {
        "--max-tokens": ("Tokens of output at most.", {"type": int}),
        "--min-tokens": ("No end before so many tokens.", {"type": int}),
        "--stop": ("End before this text; may be repeated.", {"metavar": "TEXT", **SEVERAL}),
        "--stop-token": (
            "End with this token; may be repeated.",
            {"dest": "stop_token_ids", "metavar": "ID", "type": int, **SEVERAL},
        ),
        "--ignore-eos": ("Go on to --max-tokens.", SWITCH),
    },
    "Format of the answer": {
        "--json-schema": ("JSON that fits this schema.", {"metavar": "FILE"}),
        "--json-object": ("Any JSON object.", SWITCH),
        "--regex": ("Text that matches.", {"metavar": "REGEX"}),
        "--choice": ("One of these; repeat it.", {"metavar": "TEXT", **SEVERAL}),
        "--grammar": ("Text of this Lark or GBNF grammar.", {"metavar": "FILE"}),
        "--no-json-close": ("Let --max-tokens cut it in the middle.", SWITCH),
        "--tools": ("Functions the model may call: a list in OpenAI's form.", {"metavar": "FILE"}),
        "--tool-choice": ("auto, none, required, or a function's name.", {"metavar": "CHOICE"}),
    },
    "What comes back": {
        "--n": ("Choices to return.", {"type": int}),
        "--best-of": ("Choices to make, of which the likeliest --n are returned.", {"type": int}),
        "--logprobs": ("Tell of each token, and of so many others; see --json.", {"type": int}),
        "--prompt-logprobs": ("The same of the prompt's tokens.", {"type": int}),
        "--echo": ("Begin with the prompt.", SWITCH),
        "--include-stop": ("Leave the --stop text in.", SWITCH),
        "--token-ids": ("Tell the tokens' ids; see --json.", {"dest": "return_token_ids", **SWITCH}),
        "--special-tokens": ("Leave special tokens in the text.", SWITCH),
        "--truncate": ("Keep so many tokens of the prompt, the last ones.", {"type": int}),
        "--watermark": ("Mark the text.", SWITCH),
    },
}
FOR_ROWS = ("Sampling", "Penalties and tokens", "Length and end")
"""Groups whose names both forms of a bulk line know."""


class GroupedCommand(click.Command):
    """Shows options in their groups, those of no group first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Options": [], **{name: [] for name in GROUPS}}
        of_flag = {flag: name for name, flags in GROUPS.items() for flag in flags}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                groups[of_flag.get(param.opts[0], "Options")].append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def sampling_flags(*names: str) -> Callable[[F], F]:
    """The options of these groups; they arrive as keyword arguments."""

    def decorate(command: F) -> F:
        for name in reversed(names):
            for flag, (text, how) in reversed(GROUPS[name].items()):
                given = {key: value for key, value in how.items() if key != "dest"}
                names_of = [flag, how["dest"]] if "dest" in how else [flag]
                command = click.option(*names_of, help=text, **given)(command)
        return command

    return decorate


def dests(*names: str) -> list[str]:
    """What the options of these groups are called as keyword arguments."""
    return [
        how.get("dest", flag.removeprefix("--").replace("-", "_"))
        for name in names
        for flag, (_, how) in GROUPS[name].items()
    ]


def wishes(given: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that were given, as arguments of ``Client.submit``. Raises InvalidRequest."""
    found = {name: value for name, value in given.items() if value is not None and value != ()}
    for name in [name for name, value in found.items() if isinstance(value, tuple)]:
        found[name] = [*found[name]]
    if "logit_bias" in found:
        found["logit_bias"] = dict(found["logit_bias"])
    if found.pop("special_tokens", False):
        found["skip_special_tokens"] = False
    return _formats(found)


def _formats(found: dict[str, Any]) -> dict[str, Any]:
    if (schema := schema_option(found.pop("json_schema", None))) is not None:
        found["response_format"] = schema
    for name in ("json_object", "regex", "choice"):
        if name in found:
            found[f"guided_{name}"] = found.pop(name)
    if "grammar" in found:
        found["guided_grammar"] = _text(found.pop("grammar"))
    if found.pop("no_json_close", False):
        found["json_close"] = False
    if "tools" in found:
        found["tools"] = json_file(found["tools"], "tools")
    choice = found.get("tool_choice")
    if choice is not None and choice not in ("auto", "none", "required"):
        found["tool_choice"] = {"type": "function", "function": {"name": choice}}
    return found


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InvalidRequest(f"{path}: {exc}", param="grammar") from exc
