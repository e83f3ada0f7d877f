"""What a worker's log must never hold."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from celery.worker.consumer import consumer
from gristmill.backends import logs
from gristmill.engine.log_line import LogLine

SECRET = "a prompt nobody else may read"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A worker's stderr."""
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    logs.install("text", "info")
    return stderr


@pytest.mark.parametrize(
    ("format_", "args"),
    [
        (consumer.UNKNOWN_FORMAT, (SECRET,)),
        (consumer.UNKNOWN_TASK_ERROR, (SECRET, SECRET, SECRET, SECRET)),
        (consumer.INVALID_TASK_ERROR, (SECRET, SECRET)),
        (consumer.MESSAGE_DECODE_ERROR, (SECRET, "t", "e", SECRET, SECRET)),
    ],
)
def test_a_message_that_celery_cannot_use_is_told_and_not_quoted(
    format_: str, args: tuple[str, ...], said: io.StringIO
) -> None:
    try:
        raise KeyError(SECRET)
    except KeyError:
        consumer.logger.error(format_, *args, exc_info=True)
    text = said.getvalue()
    assert SECRET not in text
    assert text.count("\n") == 1
    assert "it is kept as a dead letter" in text


@pytest.mark.parametrize("formatter", [logs.TextFormatter(), logs.JsonFormatter()])
def test_a_traceback_tells_where_and_not_what_was_read(formatter: logging.Formatter) -> None:
    try:
        raise ValueError(SECRET)
    except ValueError:
        record = logging.LogRecord("w", logging.CRITICAL, __file__, 1, "job.crashed", (), sys.exc_info())
    line = formatter.format(record)
    assert "test_worker_logs.py" in line
    assert "ValueError" in line
    assert SECRET not in line


def test_an_event_of_the_engine_process_has_its_fields_and_a_traceback_behind_them() -> None:
    """engine.shrunk came without a number."""
    record = logging.LogRecord("gristmill.engine.engine", 30, "x.py", 1, "engine.shrunk", (), None)
    record.__dict__.update(step_tokens=256, code=None)
    line = LogLine().format(record)
    assert line == f"engine[{record.process}] WARNING gristmill.engine.engine: engine.shrunk step_tokens=256"
    record.exc_info = (ValueError, ValueError("why"), None)
    assert LogLine().format(record).startswith(line + "\n")
