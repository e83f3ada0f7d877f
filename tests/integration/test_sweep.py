"""When expired claims are handed back, and when owners are given time. Clock and server are injected."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from gristmill.backends.message_queue import ClaimedMessage, MessageQueue, Sweep
from gristmill.schemas import keys

from ..support.valkey import Valkey

LEASE_S = 60.0


@dataclass
class Fleet:
    """One claim, a clock, and a server that can be restarted."""

    queue: MessageQueue
    now_s: float = 1_000_000.0
    run: str = "run-1"
    started_s: float = 900_000.0

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.queue.now_ms = int(self.now_s * 1000)

    def restart(self, down_s: float) -> None:
        self.wait(down_s)
        self.run, self.started_s = self.run + "+", self.now_s

    def newcomer(self) -> MessageQueue:
        """The queue as a worker sees it that has just begun."""
        return MessageQueue(self.queue.client, lease_s=LEASE_S, now_ms=int(self.now_s * 1000))

    def replace_worker(self) -> None:
        self.queue = self.newcomer()

    def sweep(self, caller: MessageQueue | None = None) -> Sweep:
        return (caller or self.queue).sweep(period_s=1.0, server=(self.run, int(self.started_s * 1000)))

    def sweep_until_returned(self, limit_s: float) -> float:
        """Sweep every second; the seconds it took to hand the claim back."""
        began = self.now_s
        while self.now_s - began <= limit_s:
            if self.sweep().returned:
                return self.now_s - began
            self.wait(1.0)
        raise AssertionError(f"not handed back within {limit_s} s")


@pytest.fixture
def fleet(valkey: Valkey) -> Fleet:
    """A claim just made, and swept for so far."""
    fleet = Fleet(MessageQueue(valkey.client(), lease_s=LEASE_S))
    fleet.wait(0)
    fleet.queue.put("q", "ann", "m", "body")
    assert isinstance(fleet.queue.claim(["q"]), ClaimedMessage)
    fleet.sweep()
    return fleet


def test_a_claim_nobody_renews_goes_back_when_its_lease_ends(fleet: Fleet) -> None:
    assert fleet.sweep_until_returned(70) == pytest.approx(LEASE_S, abs=1)


def test_one_sweep_per_period_serves_all_workers(fleet: Fleet) -> None:
    fleet.wait(LEASE_S / 3)
    fleet.sweep()
    fleet.wait(LEASE_S / 3)
    fleet.sweep()
    fleet.wait(LEASE_S / 3 - 0.5)
    fleet.sweep()
    fleet.wait(0.6)
    assert fleet.sweep().returned == 0, "somebody looked half a second ago"
    fleet.wait(0.5)
    assert fleet.sweep().returned == 1


def test_a_worker_killed_and_back_after_ten_seconds_waits_for_the_rest_of_the_lease_only(
    fleet: Fleet,
) -> None:
    fleet.wait(10)
    fleet.replace_worker()
    assert 10 + fleet.sweep_until_returned(70) == pytest.approx(LEASE_S, abs=1)


def test_a_worker_back_after_five_minutes_waits_a_third_of_a_lease(fleet: Fleet) -> None:
    """Not zero: everybody may have been cut off, and this one be new. One renewal fits into that time."""
    fleet.wait(300)
    fleet.replace_worker()
    assert fleet.sweep_until_returned(70) == pytest.approx(LEASE_S / 3, abs=1)


def test_after_a_restart_owners_have_a_lease_from_the_servers_start(fleet: Fleet) -> None:
    fleet.restart(down_s=90)
    fleet.wait(5)
    assert fleet.sweep().hold_s == pytest.approx(LEASE_S - 5)
    assert fleet.sweep_until_returned(70) == pytest.approx(LEASE_S - 5, abs=1)


def test_a_short_restart_gives_time_as_well(fleet: Fleet) -> None:
    fleet.wait(LEASE_S / 3)
    fleet.sweep()
    fleet.restart(down_s=2)
    assert fleet.sweep().hold_s == pytest.approx(LEASE_S)


def test_after_a_failover_owners_have_a_lease_from_the_first_sweep(fleet: Fleet) -> None:
    fleet.wait(70)
    fleet.run = "replica"  # it has been up for long
    assert fleet.sweep().hold_s == pytest.approx(LEASE_S)


def test_whoever_swept_before_and_after_a_gap_gives_everybody_a_lease(fleet: Fleet) -> None:
    """The server stood still, or the machine slept: had it been up, this caller would have swept."""
    fleet.wait(90)
    assert fleet.sweep_until_returned(70) == pytest.approx(LEASE_S, abs=1)


def test_a_survivor_gives_a_lease_although_a_newcomer_swept_first(fleet: Fleet) -> None:
    fleet.wait(90)
    newcomer = fleet.newcomer()
    assert fleet.sweep(newcomer).hold_s == pytest.approx(LEASE_S / 3)
    fleet.wait(0.5)
    assert fleet.sweep().hold_s == pytest.approx(LEASE_S - 0.5), "half a second after the last sweep"
    fleet.wait(10)
    newcomer.now_ms = fleet.queue.now_ms
    assert fleet.sweep(newcomer).hold_s == pytest.approx(LEASE_S - 10.5)


def test_survivors_never_hold_longer_than_a_lease_after_the_gap(fleet: Fleet) -> None:
    """One of them hears of the gap each second: the first of their holds is not made longer by the rest."""
    others = [fleet.newcomer() for _ in range(20)]
    for other in others:
        fleet.sweep(other)
    fleet.wait(90)
    fleet.sweep()
    for number, other in enumerate(others, start=1):
        fleet.wait(1)
        other.now_ms = fleet.queue.now_ms
        assert fleet.sweep(other).hold_s == pytest.approx(LEASE_S - number)


def test_nothing_written_down_gives_a_lease(fleet: Fleet) -> None:
    """Frozen right after the first claim of its life, it took every job from its owner when it went on."""
    fleet.queue.client.delete(keys.SWEEP)
    fleet.wait(90)
    fleet.replace_worker()
    assert fleet.sweep().hold_s == pytest.approx(LEASE_S)
    assert fleet.queue.renew(["m#1"]) == []


def test_a_caller_cut_off_alone_holds_nobody_up(fleet: Fleet) -> None:
    alone = fleet.newcomer()
    fleet.sweep(alone)
    for _ in range(6):
        fleet.wait(10)
        fleet.sweep()
    assert fleet.queue.depth("q") == 1, "the others swept on"
    fleet.wait(10)
    alone.now_ms = fleet.queue.now_ms
    assert fleet.sweep(alone).hold_s == 0


def test_an_owner_that_renews_in_that_time_keeps_its_claim(fleet: Fleet) -> None:
    fleet.wait(90)
    fleet.sweep()
    fleet.wait(20)
    assert fleet.queue.renew(["m#1"]) == []
    for _ in range(4):
        fleet.wait(15)
        assert fleet.sweep().returned == 0
        assert fleet.queue.renew(["m#1"]) == []


def test_a_clock_that_jumps_back_returns_nothing_early(fleet: Fleet) -> None:
    fleet.wait(-3600)
    assert fleet.sweep().returned == 0
    assert fleet.queue.renew(["m#1"]) == []


def test_without_the_right_to_ask_for_info_a_gap_may_be_a_restart(valkey: Valkey) -> None:
    valkey.client().acl_setuser(
        "mill", enabled=True, nopass=True, keys=["*"], categories=["+@all"], commands=["-info"]
    )
    client = valkey.client(username="mill", password="x")
    MessageQueue(client, lease_s=LEASE_S, now_ms=1_000_000).sweep()
    newcomer = MessageQueue(client, lease_s=LEASE_S, now_ms=1_000_000 + 90_000)
    assert newcomer.sweep().hold_s == pytest.approx(LEASE_S)
    newcomer.now_ms = 1_000_000 + 91_000
    assert newcomer.sweep().hold_s == pytest.approx(LEASE_S - 1)


def test_a_real_server_says_that_it_was_restarted(valkey: Valkey) -> None:
    """INFO is parsed by the script: a server that words it otherwise would never be taken for a new one."""
    queue = MessageQueue(valkey.client(), lease_s=30)
    queue.sweep()
    queue.client.hset(keys.SWEEP, "hold", 0)  # the first sweep's own
    assert queue.sweep().hold_s == 0
    queue.client.hset(keys.SWEEP, "run", "another")
    assert queue.sweep().hold_s == pytest.approx(30, abs=1.1), "INFO counts whole seconds"
