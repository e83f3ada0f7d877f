"""What an input is and how its rows are read, as flags of `gristmill run`, `plan` and `batch submit`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from ..schemas.batch import BatchOptions
from ..schemas.errors import BadInput, InvalidRequest
from . import core
from .batches import Wishes
from .console import schema_option
from .sampling_flags import FOR_ROWS, dests, sampling_flags, wishes

F = TypeVar("F", bound=Callable[..., Any])

OPTIONS = (
    click.option("--model", help="Default: what the lines name, GRISTMILL_MODEL, or the only one there is."),
    click.option(
        "--adapter", metavar="NAME", help="A LoRA adapter of the worker's; for lines that name none."
    ),
    click.option("--json-schema", metavar="FILE", help="Answers fit this schema; for lines that do not say."),
    click.option(
        "--input-format",
        type=click.Choice(["jsonl", "csv", "tsv", "parquet"]),
        help="Default: as the name says; .gz and .zst behind it are unpacked.",
    ),
    click.option("--prompt-column", metavar="NAME", help="The column, or the field, that is the prompt."),
    click.option("--template", metavar="TEXT|@FILE", help="The prompt, with {column} for a column's value."),
    click.option("--id-column", metavar="NAME", help="The column that is the custom_id."),
    click.option(
        "--field-columns",
        metavar="NAMES",
        help="With these two: columns that are fields of a request, like max_tokens,seed. Others are not.",
    ),
    click.option("--chat", is_flag=True, help="Prompts of columns are users' messages."),
    click.option("--system", metavar="TEXT", help="A system message before them; implies --chat."),
    click.option("--dedupe", is_flag=True, help="Rows that ask for the same are computed once."),
)
ON_INVALID = click.option(
    "--on-invalid",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Lines that are not valid: run nothing, or write them to the error file and run the rest.",
)


WEBHOOK = (
    click.option("--webhook", metavar="URL", help="Told how it ended."),
    click.option(
        "--webhook-every-percent",
        type=click.IntRange(1, 99),
        metavar="N",
        help="Told of the start, too, and each time so many percent more of the rows have ended.",
    ),
)


def webhook_flags(command: F) -> F:
    """Where a batch's events go, and which."""
    for option in reversed(WEBHOOK):
        command = option(command)
    return command


def webhook_wishes(options: Mapping[str, Any]) -> dict[str, Any]:
    """The flags as fields of the batch's options. Raises InvalidRequest."""
    url, every = options["webhook"], options["webhook_every_percent"]
    if every is not None and url is None:
        raise InvalidRequest(
            "--webhook-every-percent says how often; --webhook says where, and is missing", param="webhook"
        )
    return {"webhook": url, "webhook_every_percent": every}


def order_flag(by_default: bool) -> Callable[[F], F]:
    """In which order the output's lines stand; who waits for them wants another default than who does not."""
    return click.option(
        "--input-order/--any-order",
        default=by_default,
        show_default=True,
        help="The output's lines in the order of the input's, or as they came, which is done sooner.",
    )


def input_flags(command: F) -> F:
    """The options above, and the sampling that serves rows which do not say."""
    command = sampling_flags(*FOR_ROWS)(command)
    for option in reversed((*OPTIONS, ON_INVALID)):
        command = option(command)
    return command


def asked_for(options: Mapping[str, Any], **more: Any) -> Wishes:
    """The flags as wishes. ``more``: fields of the batch's options. Raises BadInput."""
    defaults = wishes({name: options[name] for name in dests(*FOR_ROWS)})
    core.sampling_params(defaults)  # what is wrong with a flag is said once, not for every line
    if options["adapter"]:
        defaults["adapter_id"] = options["adapter"]
    if response_format := schema_option(options["json_schema"]):
        defaults["response_format"] = response_format
    return Wishes(
        model=options["model"],
        options=BatchOptions.from_python({"on_invalid": options["on_invalid"], **more}),
        defaults=defaults,
        dedupe=options["dedupe"],
        input_format=options["input_format"],
        prompt_column=options["prompt_column"],
        template=_template(options["template"]),
        id_column=options["id_column"],
        field_columns=tuple(
            name.strip() for name in (options["field_columns"] or "").split(",") if name.strip()
        ),
        chat=options["chat"],
        system=options["system"],
    )


def _template(given: str | None) -> str | None:
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise BadInput(f"cannot read the template {given[1:]}: {exc}") from exc
