"""What services say: log lines, as text for people or as JSON for machines, and the error they end with."""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from datetime import UTC, datetime

from ..schemas.errors import GristmillError

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "data"}


def _fields(record: logging.LogRecord) -> dict[str, object]:
    return {k: v for k, v in record.__dict__.items() if k not in _STANDARD and v is not None}


def _frames(record: logging.LogRecord) -> str:
    """The traceback, and the exception's type without its text: that may quote a prompt."""
    assert record.exc_info
    kind, _, trace = record.exc_info
    return "".join(traceback.format_tb(trace)) + (kind.__qualname__ if kind else "")


class TextFormatter(logging.Formatter):
    """``12:00:00 INFO  job.finished job_id=… state=…``"""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the traceback if there is one."""
        at = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S")
        fields = " ".join(f"{k}={v}" for k, v in _fields(record).items())
        line = f"{at} {record.levelname:<7} {record.getMessage()} {fields}".rstrip()
        return f"{line}\n{_frames(record)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        """Event, level, time (ISO 8601, UTC) and the event's own fields."""
        entry: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = _frames(record)
        return json.dumps(entry, default=str)


def _without_body(record: logging.LogRecord) -> bool:
    """Celery quotes in full what it cannot use: a prompt, maybe. The queue's dead letters have it."""
    text = str(record.msg)
    if "body" in text:
        what = re.split(r"( of type|:)? %", text.splitlines()[0])[0]
        record.msg, record.args, record.exc_info = (
            f"{what.rstrip('?!.')}; it is kept as a dead letter",
            (),
            None,
        )
    return True


def install(log_format: str, level: str) -> None:
    """Send our events to stderr, and only warnings of the libraries below us."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(logging.WARNING)
    logging.getLogger("gristmill").setLevel(level.upper())
    logging.getLogger("celery.worker.consumer.consumer").addFilter(_without_body)


@contextmanager
def last_words(*, debug: bool) -> Generator[None]:
    """A service's outermost edge: one line on stderr and the exit status of the error tree."""
    try:
        yield
    except GristmillError as exc:
        if debug:
            raise
        sys.stderr.write(f"error: {exc.message} [{exc.code}]\n")
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
