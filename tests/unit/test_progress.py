"""Without a terminal a run says now and then that it lives, and what it does."""

from __future__ import annotations

import pytest
from gristmill.producer.batch.forecast import Progress
from gristmill.producer.progress import LINE_EVERY_S, Lines
from gristmill.schemas.batch import BatchStatus

from ..support.clock import Clock


def test_a_line_comes_every_ten_seconds_also_while_nothing_ends(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = Lines(clock)

    def said(progress: Progress, seconds: float) -> str:
        clock.advance(seconds)
        lines.report(progress)
        return capsys.readouterr().err.strip()

    waiting = Progress(rows=64)
    assert said(waiting, LINE_EVERY_S - 1) == ""
    assert said(waiting, 1) == "starting the worker, 0/64 rows after 10 s"
    assert said(waiting, 1) == ""
    validating = Progress(BatchStatus.VALIDATING, rows=64, validated=5)
    assert said(validating, LINE_EVERY_S) == "validating, 5/64 rows after 21 s"
    running = Progress(BatchStatus.IN_PROGRESS, rows=64)
    assert said(running, LINE_EVERY_S) == "running, 0/64 rows after 31 s"
    ended = Progress(BatchStatus.IN_PROGRESS, rows=64, completed=2, completion_tokens=20)
    assert said(ended, 1) == "2/64 rows, 20 tokens", "the first ones are news"
    assert said(ended, 1) == ""
    assert said(ended, LINE_EVERY_S) == "2/64 rows, 20 tokens"
