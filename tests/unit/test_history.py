"""What a log tells of the attempts before: who died, who left in order, and who was alone."""

from __future__ import annotations

import pytest
from gristmill.schemas.events import Crashed, Delta, Done, Event, Released, Started, Trial
from gristmill.schemas.result import FinishReason
from gristmill.worker.history import KEPT, History

START = Started(worker="w", at=1.0)
TOKEN = Delta(offset=0, ids=(5,))
RELEASE = Released(at=2.0)
TRIAL = Trial(at=2.0)


def crash(*, alone: bool) -> Crashed:
    return Crashed(code="engine_died", message="SIGKILL", worker="w", alone=alone, at=3.0)


@pytest.mark.parametrize(
    ("log", "strikes", "doubtful"),
    [
        ([], 0, False),
        ([START], 0, False),
        ([START, START], 0, True),
        ([START, RELEASE, START, RELEASE, START], 0, False),
        ([START, START, TOKEN, START], 0, False),
        ([START, TOKEN, START, START], 0, True),
        ([START, START, START, TRIAL], 1, True),
        ([START, START, START, TRIAL, RELEASE], 0, True),
        ([START, START, START, TRIAL, TOKEN, START], 0, False),
        ([START, crash(alone=False)], 0, True),
        ([START, crash(alone=False), TOKEN], 0, False),
        ([START, TRIAL, crash(alone=True), TRIAL, crash(alone=True)], 2, True),
        ([START, TRIAL, crash(alone=True), TRIAL], 2, True),
        ([START, TRIAL, crash(alone=True), TOKEN, Done(reason=FinishReason.STOP, at=4.0)], 1, True),
    ],
)
def test_strikes_and_doubts_follow_from_the_log(log: list[Event], strikes: int, doubtful: bool) -> None:
    history = History(log)
    assert (history.strikes, history.doubtful) == (strikes, doubtful)


def test_crashes_say_who_died_and_how_far_the_job_was() -> None:
    history = History([START, Delta(offset=0, ids=(1, 2)), START, Started(worker="x", at=9.0)])
    assert [(c.code, c.worker, c.tokens, c.at) for c in history.crashes] == [
        ("worker_lost", "w", 2, 1.0),
        ("worker_lost", "x", 2, 9.0),
    ]


def test_a_long_history_keeps_its_last_part() -> None:
    history = History([START] * (KEPT + 5))
    assert len(history.crashes) == KEPT
