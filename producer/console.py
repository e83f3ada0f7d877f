"""What all commands share: data on stdout, words on stderr, one line per error, exit codes from the tree."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from ..schemas.errors import (
    BadInput,
    GristmillError,
    InvalidJson,
    InvalidSchema,
    JobFailed,
    Misconfigured,
)
from ..schemas.wire import loads

F = TypeVar("F", bound=Callable[..., Any])

INTERRUPTED = 130
STDOUT_FD = 1
HINTS = {
    "broker_unavailable": "`gristmill doctor` checks the broker, the state server and the store",
    "store_unavailable": "`gristmill doctor` checks the result store",
    "job_not_found": "ids look like job_0190…, batch_4be3… or batch_4be3….12; "
    "GRISTMILL_BROKER_URL says where it is looked up",
    "wait_timeout": "`gristmill status ID` shows where it stands",
    "internal_error": "this is a bug; run it again with --debug and report the trace",
}


def say(text: str) -> None:
    """Words for a person: stderr. That nobody can read them any more is no reason to stop."""
    with suppress(OSError):
        click.echo(text, err=True)


def warn(text: str) -> None:
    """Something that needs attention and stops nothing."""
    say(click.style("warning: ", fg="yellow") + text)


def say_error(text: str) -> None:
    """What is wrong: stderr, marked."""
    say(click.style("error: ", fg="red") + text)


def put(text: str) -> None:
    """Data: stdout, one line, at once."""
    click.echo(text)
    sys.stdout.flush()


def put_piece(text: str) -> None:
    """A piece of streamed text, shown before the next one is there."""
    click.echo(text, nl=False)
    sys.stdout.flush()


def put_json(value: Any) -> None:
    """One object, one line."""
    put(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def common(command: F) -> F:
    """``--json`` and ``--debug``, which every command has."""
    command = click.option("--json", "as_json", is_flag=True, help="One JSON object per line on stdout.")(
        command
    )
    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show the trace of an error."
    )(command)


def connection(command: F) -> F:
    """Where broker, state and results are, for commands that talk to them."""
    for flag, name, text in (
        ("--results", "results_url", "Result store: file:///dir or s3://bucket/prefix."),
        ("--state", "state_url", "Redis for logs and state; default: the broker."),
        ("--broker", "broker_url", "redis(s)://…, unix://…, embedded:DIR; default: GRISTMILL_BROKER_URL."),
    ):
        command = click.option(flag, name, metavar="URL", help=text)(command)
    return command


def read_stdin() -> str:
    """All of stdin as text. Raises BadInput unless it is UTF-8."""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise BadInput(f"stdin is not UTF-8: byte 0x{data[exc.start]:02x} at position {exc.start:,}") from exc


def schema_option(path: str | None) -> dict[str, Any] | None:
    """The file of ``--json-schema`` as a ``response_format``. Raises InvalidSchema."""
    if path is None:
        return None
    return {"type": "json_schema", "json_schema": {"schema": json_file(path, "json_schema")}}


def json_file(path: str, param: str) -> Any:
    """A file of JSON that an option names. Raises InvalidSchema."""
    try:
        return loads(Path(path).read_bytes())
    except OSError as exc:
        raise InvalidSchema(f"{path}: {exc.strerror}", param=param) from exc
    except InvalidJson as exc:
        raise InvalidSchema(f"{path}: {exc.message}", param=param) from exc


def run_guarded(command: click.Command, args: Sequence[str] | None = None) -> int:
    """Run a command line and turn however it ends into an exit code and, for an error, one line on stderr."""
    root: dict[str, bool] = {}
    _open_streams()
    try:
        code = command.main(args=args, standalone_mode=False, obj=root, prog_name="gristmill")
        return code if isinstance(code, int) else 0
    except click.ClickException as exc:
        exc.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except (SystemExit, BrokenPipeError):  # the former is how click ends when it meets the latter
        # The reader has seen enough (`| head`). Python would complain once more while it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT_FD)
        return 0
    except GristmillError as exc:
        _show(exc, root.get("debug", False))
        return exc.exit_code
    except OSError as exc:  # a full disk, a file that may not be written: not ours, and nothing is harmed
        what = f"{exc.filename}: " if exc.filename else ""
        _show(
            Misconfigured(f"{what}{exc.strerror or exc}; mend that and try again"), root.get("debug", False)
        )
        return Misconfigured.exit_code
    except Exception as exc:  # noqa: BLE001 - the edge: whatever went wrong is ours, and a user sees one line
        _show(GristmillError(f"{type(exc).__name__}: {exc}"), root.get("debug", False))
        return GristmillError.exit_code


def _open_streams() -> None:
    """A shell's ``>&-`` leaves a stream closed: give it the null device, before a socket gets its number."""
    for fd, mode in ((0, "r"), (STDOUT_FD, "w"), (2, "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
            setattr(sys, ("stdin", "stdout", "stderr")[fd], os.fdopen(fd, mode))


def _show(exc: GristmillError, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    code = exc.job_error_code if isinstance(exc, JobFailed) else exc.code
    suffix = "" if exc.message.endswith(f"[{code}]") else f" [{code}]"
    say_error(exc.message + suffix)
    if code in HINTS:
        say(f"hint: {HINTS[code]}")


def _set_debug(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.find_root().obj["debug"] = True


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP as a flag, for commands that must put things in order first.

    The second one ends at once: after ``at_once``, which may not wait. But not a second SIGHUP: a terminal
    that closes sends one by itself and one through its shell. Under ``nohup`` there is none at all.
    """

    def __init__(self, at_once: Callable[[], None]) -> None:
        self.stopping = False
        self.exit_code = 0
        """130 after Ctrl-C; 0 after SIGTERM, by which a service manager says goodbye."""
        self._at_once = at_once
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.stopping and number == signal.SIGHUP:
            return
        if self.stopping:
            self._at_once()
            os._exit(INTERRUPTED)
        self.stopping = True
        self.exit_code = INTERRUPTED if number == signal.SIGINT else 0
