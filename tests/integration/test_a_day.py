"""A day and two weeks in seconds: leases, deadlines and results by a clock that the test moves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gristmill.backends.calls import EXPIRY_GRACE_S
from gristmill.backends.message_queue import MessageQueue
from gristmill.keeper.keeper import Keeper
from gristmill.schemas import keys
from gristmill.schemas.job import Job, JobState
from gristmill.schemas.settings import Settings

from ..support.fleet import QUEUE, WORKER, Fleet
from ..support.journal import Attempt, make_job
from ..support.valkey import Valkey

LEASE_S, RENEW_S, ROUND_S = 60, 20, 600
HOUR_S, DAY_S = 3600, 86_400


@pytest.fixture
def fleet(valkey: Valkey, settings: Settings, tmp_path: Path) -> Iterator[Fleet]:
    fleet = Fleet(valkey, settings, tmp_path)
    fleet.queue = MessageQueue(valkey.client(), lease_s=LEASE_S)
    yield fleet
    fleet.close()


class Days:
    """Time passes: owners renew, somebody sweeps, and the keeper goes round."""

    def __init__(self, fleet: Fleet, keeper: Keeper) -> None:
        self.fleet, self.keeper = fleet, keeper
        self.renewed: set[str] = set()
        self.began = fleet.clock.now
        self.back: list[float] = []
        """When a lease ran out, in seconds since the beginning."""
        run_id = fleet.valkey.client().info("server")["run_id"]
        self.server = (run_id, round(self.began * 1000) - 1)

    def pass_by(self, seconds: float) -> None:
        fleet, end = self.fleet, self.fleet.clock.now + seconds
        while fleet.clock.now < end:
            fleet.clock.advance(RENEW_S)
            fleet.queue.now_ms = round(fleet.clock.now * 1000)
            assert not fleet.queue.renew(sorted(self.renewed)), "a renewed lease was lost"
            swept = fleet.queue.sweep(server=self.server)
            self.back += [fleet.clock.now - self.began] * swept.returned
            if round(fleet.clock.now - self.began) % ROUND_S == 0:
                fleet.state.register("w1", WORKER, 2 * ROUND_S)
                self.keeper.round()


def test_a_day_of_leases_deadlines_and_results(fleet: Fleet, valkey: Valkey, settings: Settings) -> None:
    days = Days(fleet, fleet.keeper())
    fleet.queue.now_ms = round(fleet.clock.now * 1000)
    fleet.queue.sweep(server=days.server)

    def submit(lives_s: float) -> Job:
        return fleet.submit(make_job(submitted_at=fleet.clock.now, expires_at=fleet.clock.now + lives_s))

    long_runner, dies = submit(14 * DAY_S), submit(14 * DAY_S)
    held, lost = fleet.claim(), fleet.claim()
    runs = Attempt.begin(fleet.state, long_runner, "w1")
    died = Attempt.begin(fleet.state, dies, "w2")
    days.renewed = {held.tag, lost.tag}
    half_a_day, two_weeks = submit(12 * HOUR_S + 1), submit(14 * DAY_S)

    days.pass_by(5 * HOUR_S)
    assert days.back == []
    days.renewed.discard(lost.tag)  # its worker dies, five hours into the job
    days.pass_by(5 * HOUR_S)
    (when,) = days.back
    assert 5 * HOUR_S + LEASE_S <= when <= 5 * HOUR_S + LEASE_S + RENEW_S
    again = fleet.claim()
    assert (again.deliveries, dies.id.encode() in again.payload) == (2, True)
    assert fleet.queue.ack(lost.tag) == [False], "a zombie's"
    resumed = Attempt.begin(fleet.state, dies, "w1")
    assert not died.write("late")
    assert resumed.finish()
    fleet.queue.ack(again.tag)

    days.pass_by(2 * HOUR_S)
    assert fleet.states(half_a_day) == [JobState.QUEUED]
    days.pass_by(ROUND_S)
    assert fleet.states(half_a_day, two_weeks, long_runner) == [
        JobState.EXPIRED,
        JobState.QUEUED,
        JobState.RUNNING,
    ]
    ttl = valkey.client().pttl(keys.state(half_a_day.id)) / 1000
    assert ttl == pytest.approx(settings.result_ttl_s, abs=30)

    days.pass_by(DAY_S - (fleet.clock.now - days.began))
    assert runs.write("still", " running")
    assert runs.finish()
    assert fleet.queue.ack(held.tag) == [True]

    fleet.clock.now = days.began + 14 * DAY_S - 1
    assert fleet.states(two_weeks) == [JobState.QUEUED]
    kept = valkey.client().pexpiretime(keys.state(two_weeks.id)) / 1000
    assert kept == pytest.approx(days.began + 14 * DAY_S + EXPIRY_GRACE_S, abs=1), "not gone before its end"
    assert days.keeper.round().ended == 0
    fleet.clock.advance(2)
    assert days.keeper.round().ended == 1
    assert fleet.states(two_weeks) == [JobState.EXPIRED]
    assert fleet.queue.depth(QUEUE) == fleet.queue.claimed() == 0
