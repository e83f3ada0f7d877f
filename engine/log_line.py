"""Log lines of the engine process: event, then its fields. They go where the consumer's go: stderr."""

from __future__ import annotations

import logging

STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


class LogLine(logging.Formatter):
    """``engine[123] WARNING gristmill.engine.engine: engine.shrunk step_tokens=256``"""

    def __init__(self) -> None:
        super().__init__("engine[%(process)d] %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging calls it so
        """With what the event's ``extra`` says."""
        line = super().formatMessage(record)
        fields = {k: v for k, v in record.__dict__.items() if k not in STANDARD and v is not None}
        return " ".join([line, *(f"{name}={value}" for name, value in fields.items())])


def log_to_stderr() -> None:
    """Of this process, in these lines. Idempotent."""
    handler = logging.StreamHandler()
    handler.setFormatter(LogLine())
    logging.basicConfig(handlers=[handler])
