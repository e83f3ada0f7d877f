"""Any order of add, step, abort and finish, in pools too small for comfort, loses no sequence."""

from __future__ import annotations

import pytest
from gristmill.engine.block_pool import BlockPool
from gristmill.engine.messages import Request
from gristmill.engine.scheduler import Scheduler, StepPlan
from gristmill.engine.sequence import Sequence
from gristmill.schemas.errors import PromptTooLong
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)


def make(number: int, prompt: int, max_tokens: int, *, resumed: int = 0, priority: int = 1) -> Sequence:
    request = Request(
        id=f"s{number}",
        prompt_ids=[1] * prompt,
        output_ids=[2] * resumed,
        max_tokens=max_tokens,
        priority=priority,
        arrival=float(number),
    )
    return Sequence(request, limit=prompt + max_tokens, end_ids=frozenset(), number=number)


class SchedulerMachine(RuleBasedStateMachine):
    """The model is a fake one: it answers every sampling row with the token 7, and never ends by itself."""

    @initialize(
        capacity=st.integers(1, 12),
        block_size=st.sampled_from([1, 2, 4]),
        step_tokens=st.integers(1, 12),
        max_num_seqs=st.integers(1, 6),
    )
    def start(self, capacity: int, block_size: int, step_tokens: int, max_num_seqs: int) -> None:
        self.limit = capacity * block_size
        self.scheduler = Scheduler(
            BlockPool(capacity), block_size=block_size, step_tokens=step_tokens, max_num_seqs=max_num_seqs
        )
        self.alive: dict[str, Sequence] = {}
        self.number = 0
        self.finished = 0

    @rule(
        prompt=st.integers(1, 30),
        max_tokens=st.integers(1, 20),
        resumed=st.integers(0, 8),
        priority=st.integers(0, 2),
    )
    def add(self, prompt: int, max_tokens: int, resumed: int, priority: int) -> None:
        self.number += 1
        resumed = min(resumed, max_tokens - 1)
        seq = make(self.number, prompt, max_tokens, resumed=resumed, priority=priority)
        if prompt + max_tokens > self.limit:
            with pytest.raises(PromptTooLong):
                self.scheduler.add(seq)
        else:
            self.scheduler.add(seq)
            self.alive[seq.id] = seq

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        seq = self.alive.pop(data.draw(st.sampled_from(sorted(self.alive))))
        self.scheduler.remove(seq)

    @rule()
    def step(self) -> None:
        first = min(self.alive.values(), key=lambda seq: seq.rank, default=None)
        before = first and (len(first.tokens), first.computed)
        plan = self.scheduler.plan()
        self._check_plan(plan)
        self._run(plan)
        if first is not None:
            assert (len(first.tokens), first.computed) > (before or ()), "the best ranked stood still"

    def _check_plan(self, plan: StepPlan) -> None:
        assert bool(plan.work) == bool(self.alive), "an empty step, or work for nobody"
        assert plan.tokens <= self.scheduler.step_tokens
        assert len({work.seq for work in plan.work}) == len(plan.work)
        taken: set[int] = set()
        for seq, count in ((work.seq, work.count) for work in plan.work):
            assert seq in self.scheduler.running
            assert 1 <= count <= seq.pending
            room = len(seq.block_table) * self.scheduler.block_size
            assert seq.computed + count <= room, f"{seq.id} has no block for its tokens"
        for seq in self.scheduler.running:
            assert not taken & set(seq.block_table), "two sequences write to one block"
            taken |= set(seq.block_table)

    def _run(self, plan: StepPlan) -> None:
        sampling = [work.seq for work in plan.work if work.samples]
        self.scheduler.advance(plan)
        for seq in sampling:
            seq.tokens.append(7)
            if len(seq.tokens) == seq.limit:
                self.scheduler.remove(seq)
                del self.alive[seq.id]
                self.finished += 1

    @invariant()
    def books_balance(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            known = self.scheduler.running + self.scheduler.waiting
            assert set(known) == set(self.alive.values()), "a sequence was lost"

    def teardown(self) -> None:
        """Whatever happened before: everything that is left ends, in a bounded number of steps."""
        if not hasattr(self, "scheduler"):
            return
        # Alone, a sequence needs at most one step a token; classes and ranks make the worst case serial.
        bound = sum(seq.limit for seq in self.alive.values()) + 1
        for _ in range(bound):
            if not self.alive:
                break
            self.step()
        assert not self.alive, f"{sorted(self.alive)} did not end in {bound} steps"
        assert not self.scheduler.has_work
        assert self.scheduler.pool.free == self.scheduler.pool.capacity


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def scheduler(**options: int) -> Scheduler:
    given = {"capacity": 100, "block_size": 4, "step_tokens": 16, "max_num_seqs": 8} | options
    return Scheduler(BlockPool(given.pop("capacity")), **given)


def run(scheduler: Scheduler) -> dict[str, int]:
    plan = scheduler.plan()
    counts = {work.seq.id: work.count for work in plan.work}
    sampling = [work.seq for work in plan.work if work.samples]
    scheduler.advance(plan)
    for seq in sampling:
        seq.tokens.append(7)
    return counts


def test_decoding_sequences_come_first_and_a_long_prompt_gets_what_is_left() -> None:
    it = scheduler()
    it.add(make(1, prompt=3, max_tokens=10))
    assert run(it) == {"s1": 3}
    it.add(make(2, prompt=40, max_tokens=10))
    assert [run(it) for _ in range(3)] == [{"s1": 1, "s2": 15}, {"s1": 1, "s2": 15}, {"s1": 1, "s2": 10}]
    assert run(it) == {"s1": 1, "s2": 1}


def test_an_urgent_prompt_overtakes_a_long_one_that_is_half_way_through() -> None:
    it = scheduler()
    it.add(make(1, prompt=60, max_tokens=10, priority=2))
    assert run(it) == {"s1": 16}
    it.add(make(2, prompt=12, max_tokens=10, priority=0))
    assert run(it) == {"s2": 12, "s1": 4}


def test_an_urgent_sequence_evicts_the_newest_of_the_lowest_class() -> None:
    it = scheduler(max_num_seqs=3)
    for number, priority in ((1, 1), (2, 2), (3, 2)):
        it.add(make(number, prompt=2, max_tokens=10, priority=priority))
    run(it)
    it.add(make(4, prompt=2, max_tokens=10, priority=0))
    assert set(run(it)) == {"s4", "s1", "s2"}
    assert [seq.id for seq in it.waiting] == ["s3"]
    assert it.preemptions == 1


def test_a_sequence_evicted_half_way_through_its_prompt_gets_nothing_in_that_step() -> None:
    it = scheduler(max_num_seqs=1)
    it.add(make(1, prompt=60, max_tokens=10, priority=2))
    assert run(it) == {"s1": 16}
    it.add(make(2, prompt=4, max_tokens=10, priority=0))
    assert run(it) == {"s2": 4}
    assert [seq.id for seq in it.waiting] == ["s1"]
    it.check()


def test_a_sequence_never_evicts_its_own_class_to_be_admitted() -> None:
    it = scheduler(max_num_seqs=1)
    it.add(make(1, prompt=2, max_tokens=10))
    run(it)
    it.add(make(2, prompt=2, max_tokens=10))
    assert set(run(it)) == {"s1"}
    assert it.preemptions == 0


def test_when_blocks_run_out_the_newest_goes_back_and_keeps_its_place() -> None:
    it = scheduler(capacity=8, block_size=4)
    for number in (1, 2):
        it.add(make(number, prompt=4, max_tokens=24))
    it.add(make(3, prompt=4, max_tokens=4))
    while not it.preemptions:
        run(it)
    assert [seq.id for seq in it.running] == ["s1", "s2"]
    assert it.waiting[0].id == "s3"
    assert it.waiting[0].computed == 0


def test_admission_leaves_every_running_sequence_a_block_to_grow() -> None:
    it = scheduler(capacity=6, block_size=4)
    for number in (1, 2, 3):
        it.add(make(number, prompt=4, max_tokens=16))
    run(it)
    assert len(it.running) == 3
    it = scheduler(capacity=5, block_size=4)
    for number in (1, 2, 3):
        it.add(make(number, prompt=4, max_tokens=16))
    run(it)
    assert len(it.running) == 2
    assert it.pool.free == 3


def test_a_sequence_that_can_never_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(PromptTooLong, match=r"30 tokens.*max_tokens \(20\) is 50.*takes 40") as refused:
        scheduler(capacity=10).add(make(1, prompt=30, max_tokens=20))
    assert refused.value.limit == 40
