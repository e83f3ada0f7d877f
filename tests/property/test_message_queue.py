"""The Lua queue against a model in Python, on a real Valkey, with time under the test's control."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import pytest
import redis
from gristmill.backends.message_queue import ClaimedMessage, MessageQueue
from gristmill.schemas import keys
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from ..support.valkey import Valkey

LEASE_S = 10.0
LEASE_MS = 10_000
QUEUES = ("gm-a-interactive", "gm-a-batch")
TENANTS = ("ann", "bob", "cy")
SERVER = ("run", 0)


@dataclass
class Lane:
    """The model of one queue: what waits, and who was served how much."""

    waiting: dict[str, deque[tuple[str, int]]] = field(default_factory=dict)  # served next is last
    served: dict[str, float] = field(default_factory=dict)
    past: dict[str, float] = field(default_factory=dict)
    paused: bool = False

    def join(self, tenant: str, credit: float) -> None:
        if tenant in self.served:
            self.served[tenant] -= credit
            return
        left_off = self.past.pop(tenant, 0.0)
        self.served[tenant] = max(min(self.served.values()), left_off - credit) if self.served else 0.0

    def take(self) -> tuple[str, str, int] | None:
        if self.paused or not self.served:
            return None
        tenant = min(self.served, key=lambda name: (self.served[name], name))
        base, n = self.waiting[tenant].pop()
        self.served[tenant] += 1
        if not self.waiting[tenant]:
            self.past[tenant] = self.served.pop(tenant)
            least = min(self.served.values(), default=float("inf"))
            self.past = {name: score for name, score in self.past.items() if score > least}
        return tenant, base, n + 1


class QueueMachine(RuleBasedStateMachine):
    """Any order of put, claim, ack, requeue, renew and expiry loses nothing and serves fairly."""

    client: redis.Redis

    @initialize()
    def empty(self) -> None:
        self.client.flushall()
        self.now = 1_000_000
        self.queue = MessageQueue(self.client, lease_s=LEASE_S, now_ms=self.now)
        self.lanes = {name: Lane() for name in QUEUES}
        self.claims: dict[str, tuple[str, str, str, int]] = {}  # tag -> queue, tenant, base, n
        self.expiry: dict[str, int] = {}
        self.spent: list[str] = []
        self.accepted = self.acknowledged = 0
        self.queue.sweep(server=SERVER)
        self.client.hset(keys.SWEEP, "hold", 0)  # the first sweep's own

    @rule(name=st.sampled_from(QUEUES), tenants=st.lists(st.sampled_from(TENANTS), min_size=1, max_size=6))
    def put(self, name: str, tenants: list[str]) -> None:
        for tenant in tenants:
            self._put(name, tenant)

    def _put(self, name: str, tenant: str) -> None:
        base = f"m{self.accepted}"
        self.queue.put(name, tenant, base, f'{{"of": "{base}"}}\n')
        self.accepted += 1
        lane = self.lanes[name]
        lane.waiting.setdefault(tenant, deque()).appendleft((base, 0))
        lane.join(tenant, 0)

    @rule(order=st.permutations(QUEUES), count=st.sampled_from((2, 2, 1, 0)), times=st.integers(1, 4))
    def claim(self, order: list[str], count: int, times: int) -> None:
        for _ in range(times):
            self._claim(order[:count])

    def _claim(self, asked: list[str]) -> None:
        got = self.queue.claim(asked)
        for name in asked:
            if taken := self.lanes[name].take():
                tenant, base, n = taken
                tag = f"{base}#{n}"
                assert got == ClaimedMessage(name, tag, n, tenant, f'{{"of": "{base}"}}\n'.encode())
                self.claims[tag] = (name, tenant, base, n)
                self.expiry[tag] = self.now + LEASE_MS
                return
        assert isinstance(got, str), "the model has nothing to claim"

    def _give_back(self, tags: list[str]) -> None:
        for tag in reversed(tags):
            name, tenant, base, n = self.claims.pop(tag)
            del self.expiry[tag]
            self.spent.append(tag)
            lane = self.lanes[name]
            lane.join(tenant, 1)
            lane.waiting.setdefault(tenant, deque()).append((base, n))

    @rule(data=st.data())
    def ack(self, data: st.DataObject) -> None:
        tag = self._some_tag(data)
        assert self.queue.ack(tag) == [tag in self.claims]
        if self.claims.pop(tag, None):
            del self.expiry[tag]
            self.spent.append(tag)
            self.acknowledged += 1

    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        known = [*self.claims, *self.spent[-1:]]
        tags = data.draw(st.lists(st.sampled_from(known), unique=True, min_size=1)) if known else []
        assert self.queue.requeue(*tags) == [tag in self.claims for tag in tags]
        self._give_back([tag for tag in tags if tag in self.claims])

    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        known = [*self.claims, *self.spent[-2:]]
        tags = data.draw(st.lists(st.sampled_from(known), unique=True, max_size=4)) if known else []
        assert self.queue.renew(tags) == [tag for tag in tags if tag not in self.claims]
        self.expiry.update({tag: self.now + LEASE_MS for tag in tags if tag in self.claims})

    @rule(name=st.sampled_from(QUEUES), paused=st.sampled_from((False, False, True)))
    def pause(self, name: str, paused: bool) -> None:
        self.queue.pause(name, paused=paused)
        self.lanes[name].paused = paused

    @rule(ms=st.integers(0, LEASE_MS // 3))
    def wait_and_sweep(self, ms: int) -> None:
        self.now += ms
        self.queue.now_ms = self.now
        expired = sorted((at, tag) for tag, at in self.expiry.items() if at <= self.now)
        swept = self.queue.sweep(server=SERVER)
        assert swept.returned == len(expired)
        assert not swept.hold_s
        self._give_back([tag for _, tag in expired])

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        if not hasattr(self, "lanes"):
            return
        waiting = sum(self.queue.depth(name) for name in QUEUES)
        assert self.queue.claimed() == len(self.claims) == self.client.zcard(keys.CLAIM_EXPIRY)
        assert waiting + len(self.claims) + self.acknowledged == self.accepted

    @invariant()
    def the_books_agree(self) -> None:
        for name, lane in getattr(self, "lanes", {}).items():
            served = dict(self.client.zrange(keys.queue_tenants(name), 0, -1, withscores=True))
            past = dict(self.client.zrange(keys.queue_past(name), 0, -1, withscores=True))
            assert {key.decode(): score for key, score in served.items()} == lane.served
            assert {key.decode(): score for key, score in past.items()} == (lane.past if lane.served else {})
            if not lane.served:
                lane.past = {}

    def _some_tag(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from([*self.claims, *self.spent[-3:], "unknown#1"]))


@pytest.fixture
def machine(valkey: Valkey) -> type[QueueMachine]:
    return type("Machine", (QueueMachine,), {"client": valkey.client()})


def test_any_order_of_operations_keeps_the_books_straight(machine: type[QueueMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=80,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
            phases=[Phase.generate],  # each step is a round trip: shrinking would outlast the time limit
        ),
    )
