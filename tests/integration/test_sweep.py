"""When expired claims are handed back, and when owners are given time. Clock and server are injected."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from gristmill.backends.message_queue import ClaimedMessage, MessageQueue, Sweep
from gristmill.schemas import keys

from ..support.valkey import Valkey
from ..support.waiting import wait_until

LEASE_S = 60.0
HZ = 10


@dataclass
class Fleet:
    """One claim, a clock, and a server whose event loop turns ``HZ`` times a second while it is awake."""

    queue: MessageQueue
    now_s: float = 1_000_000.0
    run: str = "run-1"
    started_s: float = 900_000.0
    loops: float = 0.0

    def wait(self, seconds: float, *, frozen: bool = False) -> None:
        self.now_s += seconds
        self.loops += 0 if frozen else seconds * HZ
        self.queue.now_ms = int(self.now_s * 1000)

    def restart(self, down_s: float) -> None:
        self.wait(down_s, frozen=True)
        self.run, self.started_s, self.loops = self.run + "+", self.now_s, 0.0

    def sweep(self, *, outage: bool = False) -> Sweep:
        server = (self.run, int(self.started_s * 1000), int(self.loops), HZ)
        return self.queue.sweep(period_s=1.0, outage=outage, server=server)

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
    assert 10 + fleet.sweep_until_returned(70) == pytest.approx(LEASE_S, abs=1)


def test_a_worker_back_after_five_minutes_waits_a_third_of_a_lease(fleet: Fleet) -> None:
    """Not zero: everybody may have been cut off, and this one be new. One renewal fits into that time."""
    fleet.wait(300)
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


def test_a_server_that_stood_still_gives_a_lease(fleet: Fleet) -> None:
    fleet.wait(90, frozen=True)
    assert fleet.sweep_until_returned(70) == pytest.approx(LEASE_S, abs=1)


def test_a_server_that_stood_still_before_anybody_swept_gives_a_lease(fleet: Fleet) -> None:
    """Frozen right after the first claim of its life, it took every job from its owner when it went on."""
    fleet.queue.client.delete(keys.SWEEP)
    fleet.wait(90, frozen=True)
    assert fleet.sweep().hold_s == pytest.approx(LEASE_S)
    assert fleet.queue.renew(["m#1"]) == []


def test_a_caller_that_was_cut_off_gives_everybody_a_lease(fleet: Fleet) -> None:
    fleet.wait(90)
    assert fleet.sweep(outage=True).hold_s == pytest.approx(LEASE_S)


def test_a_caller_cut_off_alone_holds_nobody_up(fleet: Fleet) -> None:
    for _ in range(6):
        fleet.wait(10)
        fleet.sweep()
    assert fleet.queue.depth("q") == 1, "the others swept on"
    fleet.wait(10)
    assert fleet.sweep(outage=True).hold_s == 0


def test_an_owner_that_renews_in_that_time_keeps_its_claim(fleet: Fleet) -> None:
    fleet.wait(90, frozen=True)
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


def test_without_the_right_to_ask_for_info_a_gap_counts_as_an_outage(valkey: Valkey) -> None:
    valkey.client().acl_setuser(
        "mill", enabled=True, nopass=True, keys=["*"], categories=["+@all"], commands=["-info"]
    )
    queue = MessageQueue(valkey.client(username="mill", password="x"), lease_s=LEASE_S, now_ms=1_000_000)
    queue.sweep()
    queue.now_ms = 1_000_000 + 90_000
    assert queue.sweep().hold_s == pytest.approx(LEASE_S)
    queue.now_ms += 60_000
    assert queue.sweep().hold_s == pytest.approx(LEASE_S)
    queue.now_ms += 1_000
    assert queue.sweep().hold_s == pytest.approx(LEASE_S - 1)


def test_a_real_server_says_what_the_rule_needs(valkey: Valkey) -> None:
    """INFO is parsed by the script: a server that words it otherwise would always be taken for frozen."""
    queue = MessageQueue(valkey.client(), lease_s=2.4)
    valkey.client().config_set("hz", 100)
    for frozen, hold_s in ((False, 0.8), (True, 2.4)):
        queue.client.delete(keys.SWEEP)
        for _ in range(200):  # a busy moment beforehand proves nothing
            queue.claim(["q"])
        queue.sweep()
        queue.client.hset(keys.SWEEP, "hold", 0)  # the first sweep's own
        if frozen:
            valkey.freeze()
        gap_ends = time.monotonic() + 1.0
        wait_until(lambda t=gap_ends: time.monotonic() >= t, 5, "a gap between two sweeps")
        valkey.thaw()
        assert queue.sweep().hold_s == pytest.approx(hold_s, abs=0.1), f"frozen: {frozen}"


def test_clients_that_submit_meanwhile_do_not_make_a_server_look_frozen(valkey: Valkey) -> None:
    """All workers had died and submits went on, each of several commands: a lease was waited in vain."""
    queue = MessageQueue(valkey.client(), lease_s=2.4)
    valkey.client().config_set("hz", 100)
    queue.sweep()
    queue.client.hset(keys.SWEEP, "hold", 0)  # the first sweep's own
    began = time.monotonic()
    for number in range(30):
        queue.put("q", f"t{number}", f"b{number}", "{}")
        wait_until(
            lambda at=began + number / 25: time.monotonic() >= at, 5, "the next submit is due", poll_s=0.005
        )
    assert queue.sweep().hold_s == pytest.approx(0.8, abs=0.1)
