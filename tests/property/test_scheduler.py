"""Any order of add, step, abort and finish, in pools too small for comfort, loses no sequence.

Nor does any sequence ever read keys and values of other tokens than its own, whoever computed them.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from gristmill.engine.block_pool import BlockPool
from gristmill.engine.cadence import Cadence
from gristmill.engine.messages import Request
from gristmill.engine.planner import Planner
from gristmill.engine.scheduler import Scheduler, StepPlan
from gristmill.engine.sequence import Sequence
from gristmill.engine.swap import SwapSpace
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

from ..support.scheduling import tokens_fed


def make(
    number: int,
    prompt: int | list[int],
    max_tokens: int,
    *,
    resumed: int = 0,
    priority: int = 1,
    salt: str = "",
) -> Sequence:
    """A prompt given by its length has nothing in common with another number's."""
    ids = [100 + number] * prompt if isinstance(prompt, int) else prompt
    request = Request(
        id=f"s{number}",
        prompt_ids=ids,
        output_ids=[2] * resumed,
        max_tokens=max_tokens,
        priority=priority,
        arrival=float(number),
        cache_salt=salt,
    )
    return Sequence(request, limit=len(ids) + max_tokens, end_ids=frozenset(), number=number)


class Cells:
    """The KV tensors: what stands in each place of each block. Keys depend on all tokens up to theirs.

    Slots of the swap space are blocks with negative numbers.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.cells: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}

    def feed(self, seq: Sequence, count: int) -> None:
        for at in range(seq.computed, seq.computed + count):
            self.cells[self._place(seq, at)] = self._meaning(seq, at)

    def verify(self, seq: Sequence) -> None:
        for at in range(seq.computed):
            assert self.cells.get(self._place(seq, at)) == self._meaning(seq, at), (
                f"{seq.id} reads another's token {at}"
            )

    def save(self, block: int, slot: int) -> None:
        self._copy(block, -1 - slot)

    def load(self, slot: int, block: int) -> None:
        self._copy(-1 - slot, block)

    def _copy(self, source: int, target: int) -> None:
        for offset in range(self.block_size):
            self.cells[target, offset] = self.cells[source, offset]

    def _place(self, seq: Sequence, at: int) -> tuple[int, int]:
        return seq.block_table[at // self.block_size], at % self.block_size

    def _meaning(self, seq: Sequence, at: int) -> tuple[str, tuple[int, ...]]:
        return seq.request.cache_salt, tuple(seq.tokens[: at + 1])


TEXTS = ([1] * 30, [1] * 7 + [2] * 23, [1, 2, 3] * 10)
"""Prompts are beginnings of these."""


class SchedulerMachine(RuleBasedStateMachine):
    """The model is a fake one: it answers every sampling row with the token 1, and never ends by itself.

    So outputs too continue prompts, and others find them.
    """

    @initialize(
        capacity=st.integers(1, 12),
        block_size=st.sampled_from([1, 2, 4]),
        step_tokens=st.integers(1, 12),
        max_num_seqs=st.integers(1, 6),
        prefix_cache=st.sampled_from([True, True, False]),
        slots=st.integers(0, 6),
        seed=st.integers(0, 3),
        overtakes=st.integers(0, 3),
        ratio=st.sampled_from([0.0, 0.0, 0.5, 3.0]),
        patience=st.integers(0, 3),
    )
    def start(
        self,
        capacity: int,
        block_size: int,
        step_tokens: int,
        max_num_seqs: int,
        prefix_cache: bool,
        slots: int,
        seed: int,
        overtakes: int,
        ratio: float,
        patience: int,
    ) -> None:
        self.overtakes = overtakes
        self.overtaken: Counter[str] = Counter()
        pays = Random(seed)
        self.limit = capacity * block_size
        self.cells = Cells(block_size)
        self.scheduler = Scheduler(
            BlockPool(capacity),
            block_size=block_size,
            step_tokens=step_tokens,
            max_num_seqs=max_num_seqs,
            prefix_cache=prefix_cache,
            swap=SwapSpace(slots, self.cells, lambda: pays.random() < 0.7),
            planner=Planner((overtakes, overtakes, overtakes)),
            cadence=Cadence(ratio, patience),
        )
        self.alive: dict[str, Sequence] = {}
        self.number = 0
        self.finished = 0

    @rule(
        text=st.integers(0, len(TEXTS) - 1),
        prompt=st.integers(1, 30),
        max_tokens=st.integers(1, 20),
        resumed=st.integers(0, 8),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "tenant"]),
    )
    def add(self, text: int, prompt: int, max_tokens: int, resumed: int, priority: int, salt: str) -> None:
        self.number += 1
        resumed = min(resumed, max_tokens - 1)
        seq = make(
            self.number, TEXTS[text][:prompt], max_tokens, resumed=resumed, priority=priority, salt=salt
        )
        if prompt + max_tokens > self.limit:
            with pytest.raises(PromptTooLong):
                self.scheduler.add(seq)
        else:
            self.scheduler.add(seq)
            self.alive[seq.id] = seq

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), spoiled=st.booleans())
    def abort(self, data: st.DataObject, spoiled: bool) -> None:
        seq = self.alive.pop(data.draw(st.sampled_from(sorted(self.alive))))
        self.scheduler.remove(seq, spoiled=spoiled)

    @rule()
    def run_out_of_memory(self) -> None:
        """A step that was planned and failed; then smaller ones, and larger ones again."""
        self.scheduler.plan()
        self.scheduler.shrink()

    @rule()
    def recover(self) -> None:
        self.scheduler.grow()

    @rule()
    def step(self) -> None:
        first = min(self.alive.values(), key=lambda seq: seq.rank, default=None)
        if first not in self.scheduler.running:
            first = None  # others may be admitted before it, within bounds
        before = first and (len(first.tokens), first.computed)
        waited = list(self.scheduler.waiting)
        plan = self.scheduler.plan()
        self._check_plan(plan)
        self._count_overtaken(waited)
        self._run(plan)
        if first is not None:
            assert (len(first.tokens), first.computed) > (before or ()), "the best ranked stood still"

    def _count_overtaken(self, waited: list[Sequence]) -> None:
        for seq in waited:
            if seq in self.scheduler.running:
                passed = [one for one in waited if one in self.scheduler.waiting and one.rank < seq.rank]
                assert all(one.request.priority == seq.request.priority for one in passed)
                assert not any(one.preempted for one in passed), "a preempted one was overtaken"
                self.overtaken.update(one.id for one in passed)
                del self.overtaken[seq.id]
        assert all(count <= self.overtakes for count in self.overtaken.values()), "overtaken too often"

    def _check_plan(self, plan: StepPlan) -> None:
        assert bool(plan.work) == bool(self.alive), "an empty step, or work for nobody"
        assert plan.tokens <= self.scheduler.step_tokens
        assert len({work.seq for work in plan.work}) == len(plan.work)
        written: set[int] = set()
        for seq, count in ((work.seq, work.count) for work in plan.work):
            assert seq in self.scheduler.running
            assert 1 <= count <= seq.pending
            room = len(seq.block_table) * self.scheduler.block_size
            assert seq.computed + count <= room, f"{seq.id} has no block for its tokens"
            size = self.scheduler.block_size
            own = set(seq.block_table[seq.computed // size : -(-(seq.computed + count) // size)])
            assert not written & own, "two sequences write to one block"
            written |= own
            self.cells.verify(seq)

    def _run(self, plan: StepPlan) -> None:
        sampling = [work.seq for work in plan.work if work.samples]
        for work in plan.work:
            self.cells.feed(work.seq, work.count)
        self.scheduler.advance(plan)
        for seq in sampling:
            seq.tokens.append(1)
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

    @invariant()
    def firm_blocks_are_those_that_less_urgent_ones_cannot_free(self) -> None:
        for priority in range(3) if hasattr(self, "scheduler") else ():
            running, waiting = (
                [seq for seq in queue if seq.request.priority <= priority]
                for queue in (self.scheduler.running, self.scheduler.waiting)
            )
            held = {block for seq in running for block in seq.block_table}
            lost = [-(-len(seq.tokens) // self.scheduler.block_size) for seq in waiting if seq.preempted]
            assert self.scheduler.firm_blocks(priority) == len(held) + sum(lost)

    def teardown(self) -> None:
        """Whatever happened before: everything that is left ends, in a bounded number of steps."""
        if not hasattr(self, "scheduler"):
            return
        # Alone, a sequence needs at most one step a token; classes and ranks make the worst case serial.
        # And whoever is admitted late and takes blocks makes those who overtook it begin again.
        bound = sum(seq.limit for seq in self.alive.values()) * (1 + self.overtakes) + 1
        for _ in range(bound):
            if not self.alive:
                break
            self.step()
        assert not self.alive, f"{sorted(self.alive)} did not end in {bound} steps"
        assert not self.scheduler.has_work
        assert self.scheduler.pool.free == self.scheduler.pool.capacity


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase


def scheduler(cadence: Cadence | None = None, **options: int) -> Scheduler:
    given = {"capacity": 100, "block_size": 4, "step_tokens": 16, "max_num_seqs": 8} | options
    return Scheduler(BlockPool(given.pop("capacity")), cadence=cadence, **given)


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


# ---- the cadence of prompts


def decoding(cadence: Cadence, count: int) -> Scheduler:
    """So many that have their prompts behind them."""
    it = scheduler(cadence)
    for number in range(count):
        it.add(make(number, prompt=2, max_tokens=90))
    run(it)
    assert all(seq.pending == 1 for seq in it.running)
    return it


def test_a_prompt_waits_until_enough_do_and_then_all_come_in_together() -> None:
    it = decoding(Cadence(waiting_served_ratio=0.5, max_waiting_tokens=100), 4)
    it.add(make(4, prompt=3, max_tokens=9))
    for _ in range(5):
        assert run(it) == {f"s{number}": 1 for number in range(4)}
    it.add(make(5, prompt=3, max_tokens=9))
    assert run(it) == {f"s{number}": 1 for number in range(4)} | {"s4": 3, "s5": 3}


def test_a_prompt_waits_for_a_bounded_number_of_tokens() -> None:
    it = decoding(Cadence(waiting_served_ratio=9.0, max_waiting_tokens=3), 2)
    it.add(make(2, prompt=3, max_tokens=9))
    assert [len(run(it)) for _ in range(4)] == [2, 2, 2, 3]
    it.add(make(3, prompt=3, max_tokens=9))
    assert [len(run(it)) for _ in range(4)] == [3, 3, 3, 4], "counted anew after each prompt"


def test_without_a_ratio_or_patience_a_prompt_comes_in_at_once() -> None:
    for cadence in (Cadence(0.0, 100), Cadence(9.0, 0)):
        it = decoding(cadence, 3)
        it.add(make(3, prompt=3, max_tokens=9))
        assert len(run(it)) == 4


def test_nobody_is_held_back_for_a_lower_class_nor_beside_a_prompt_nor_twice() -> None:
    it = decoding(Cadence(9.0, 100), 2)
    it.add(make(2, prompt=20, max_tokens=9, priority=0))
    assert run(it) == {"s0": 1, "s1": 1, "s2": 14}, "it outranks those who decode"
    it.add(make(3, prompt=3, max_tokens=9))
    assert run(it) == {"s0": 1, "s1": 1, "s2": 6, "s3": 3}, "the step is slow already"
    it._preempt(it.running[-1])
    assert len(run(it)) == 4, "it was running"


# ---- the prefix cache


def test_a_prefix_that_many_share_is_computed_once() -> None:
    """512 tokens in common and 48 of its own each, all there at once; 64 tokens of output."""
    it = scheduler(capacity=4_000, block_size=16, step_tokens=512, max_num_seqs=128)
    prefix = list(range(1_000, 1_512))
    seqs = [make(n, [*prefix, *[n] * 48], max_tokens=64) for n in range(64)]
    for seq in seqs:
        it.add(seq)
    assert tokens_fed(it) == 512 + 64 * (48 + 63)
    assert [seq.cached_tokens for seq in seqs] == [0] + [512] * 63
    assert it.cache.hits == 63 * 512
    assert it.cache.queries == 64 * 560


def test_without_the_cache_everybody_computes_everything() -> None:
    it = Scheduler(BlockPool(100), block_size=4, step_tokens=16, max_num_seqs=8, prefix_cache=False)
    for number in (1, 2):
        it.add(make(number, [5] * 20, max_tokens=4))
    assert tokens_fed(it) == 2 * (20 + 3)
    assert it.cache.hits == it.cache.queries == 0


def test_another_salt_shares_nothing() -> None:
    it = scheduler()
    for number, salt in ((1, "ann"), (2, "bob"), (3, "ann")):
        it.add(make(number, [5] * 17, max_tokens=1, salt=salt))
    assert tokens_fed(it) == 17 + 17 + 1


def test_a_prompt_known_to_its_end_still_computes_its_last_token() -> None:
    it = scheduler()
    it.add(make(1, [5] * 16, max_tokens=1))
    tokens_fed(it)
    it.add(make(2, [5] * 16, max_tokens=1))
    assert run(it) == {"s2": 4}


def test_what_was_generated_is_found_by_the_next_turn() -> None:
    it = scheduler()
    first = make(1, [5] * 10, max_tokens=11)
    it.add(first)
    tokens_fed(it)
    turn = make(2, [*first.tokens, 8, 8], max_tokens=1)
    it.add(turn)
    assert run(it) == {"s2": 3}, "20 tokens had keys and values, in 5 full blocks"
    assert turn.cached_tokens == 20


def test_a_preempted_sequence_finds_again_what_nobody_has_overwritten() -> None:
    it = scheduler(max_num_seqs=1)
    it.add(make(1, prompt=14, max_tokens=8, priority=2))
    run(it)
    it.add(make(2, prompt=2, max_tokens=1, priority=0))
    assert run(it) == {"s2": 2}
    urgent = it.running[0]
    it.remove(urgent)
    assert run(it) == {"s1": 3}, "15 tokens, of which 12 stand in full blocks"
    assert it.running[0].cached_tokens == 0, "it had computed them itself"


def test_who_ranks_ahead_never_waits_for_those_behind() -> None:
    it = scheduler()
    it.add(make(1, [5] * 40, max_tokens=4, priority=2))
    assert run(it) == {"s1": 16}
    it.add(make(2, [5] * 40, max_tokens=4, priority=0))
    assert run(it) == {"s2": 16}, "it takes what is there, goes on itself, and the other waits for it"
    assert run(it) == {"s2": 8}
    assert run(it) == {"s2": 1, "s1": 4}


def test_blocks_held_in_common_count_once_when_somebody_is_admitted() -> None:
    it = scheduler(capacity=12, block_size=4, step_tokens=64)
    for number in range(5):
        it.add(make(number, [*[5] * 32, number], max_tokens=3))
    run(it)
    assert len(it.running) == 1, "the prefix is not there yet, so two would not fit"
    run(it)
    assert len(it.running) == 4, "8 blocks in common, and one each"


def test_blocks_whose_contents_are_no_good_are_found_by_nobody() -> None:
    it = scheduler()
    bad = make(1, [5] * 12, max_tokens=4)
    it.add(bad)
    run(it)
    it.remove(bad, spoiled=True)
    it.add(make(2, [5] * 12, max_tokens=4))
    assert run(it) == {"s2": 12}


# ---- making way and coming back


def crowded(*, pays: bool, slots: int = 10) -> tuple[Scheduler, Sequence]:
    """A batch sequence of 30 tokens whose blocks an urgent one has just taken, all of them."""
    cells = Cells(4)
    it = Scheduler(
        BlockPool(10),
        block_size=4,
        step_tokens=64,
        max_num_seqs=1,
        swap=SwapSpace(slots, cells, lambda: pays),
    )
    batch = make(1, prompt=30, max_tokens=10, priority=2)
    it.add(batch)
    for at in range(30):
        for block in range(10):
            cells.cells[block, at % 4] = ("", ())
    assert run(it) == {"s1": 30}
    it.add(make(2, prompt=39, max_tokens=1, priority=0))
    assert run(it) == {"s2": 39}, "it takes all blocks of the batch sequence in the step in which it came"
    assert it.preemptions == 1
    it.remove(it.running[0])
    return it, batch


def test_blocks_that_make_way_come_back_from_the_swap_space() -> None:
    it, batch = crowded(pays=True)
    assert it.cache.swap.saved == 7, "as many as it had full"
    assert run(it) == {"s1": 3}
    assert it.cache.swap.loaded == 7
    assert batch.cached_tokens == 0
    it.check()


def test_where_swapping_does_not_pay_they_are_computed_again() -> None:
    it, _ = crowded(pays=False)
    assert it.cache.swap.saved == 0
    assert run(it) == {"s1": 31}


def test_a_swap_space_that_is_too_small_keeps_what_came_last_and_that_is_the_head() -> None:
    it, _ = crowded(pays=True, slots=3)
    assert it.cache.swap.saved == 7, "a sequence's tail makes way before its head"
    assert run(it) == {"s1": 31 - 3 * 4}


def test_what_an_aborted_sequence_left_in_the_swap_space_is_dropped() -> None:
    it, batch = crowded(pays=True)
    it.remove(batch)
    it.check()
    assert not it.cache.swap.names()


def test_what_waiting_sequences_want_is_kept_before_what_was_used_last() -> None:
    it = scheduler(capacity=12, max_num_seqs=1, step_tokens=64)
    it.add(make(1, [5] * 17, max_tokens=1))
    run(it)
    it.remove(it.running[0])
    it.add(make(2, prompt=14, max_tokens=1, priority=0))
    it.add(make(3, [5] * 17, max_tokens=1))
    run(it)
    it.remove(it.running[0])
    it.add(make(4, prompt=31, max_tokens=1, priority=0))
    assert run(it) == {"s4": 31}, "it needs 8 blocks, and 8 hold nothing or what nobody waits for"
    it.remove(it.running[0])
    assert run(it) == {"s3": 1}
