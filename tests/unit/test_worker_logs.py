"""What a worker's log must never hold."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from celery.worker.consumer import consumer
from gristmill.worker import logs

SECRET = "a prompt nobody else may read"


@pytest.fixture
def installed(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """With ``capsys``, which must have put its stderr in place before."""
    del capsys
    handlers, level = list(logging.root.handlers), logging.root.level
    logs.install("text", "info")
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.mark.usefixtures("installed")
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
    format_: str, args: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        raise KeyError(SECRET)
    except KeyError:
        consumer.logger.error(format_, *args, exc_info=True)
    said = capsys.readouterr().err
    assert SECRET not in said
    assert said.count("\n") == 1
    assert "message" in said or "task" in said
