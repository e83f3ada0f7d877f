"""Any order of allocate, share and release keeps the pool's books straight."""

from __future__ import annotations

from collections import Counter

import pytest
from gristmill.engine.block_pool import BlockPool
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

CAPACITY = 8


class BlockPoolMachine(RuleBasedStateMachine):
    """The model: one entry of ``held`` per reference."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(CAPACITY)
        self.held: list[int] = []

    @rule(count=st.integers(0, CAPACITY + 2))
    def allocate(self, count: int) -> None:
        before = set(self.held)
        got = self.pool.allocate(count)
        assert (got is None) == (count > CAPACITY - len(before))
        if got is not None:
            assert len(set(got)) == count
            assert not before & set(got), "a block was handed out twice"
            self.held += got

    @rule(block=st.integers(0, CAPACITY - 1))
    def share(self, block: int) -> None:
        self.pool.share([block])
        self.held.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        size = data.draw(st.integers(1, len(self.held)))
        gone = [self.held.pop(data.draw(st.integers(0, len(self.held) - 1))) for _ in range(size)]
        self.pool.release(gone)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check()
        assert self.pool.free == CAPACITY - len(set(self.held))
        counts = Counter(self.held)
        assert [self.pool.refs(b) for b in range(CAPACITY)] == [counts[b] for b in range(CAPACITY)]


BlockPoolMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestBlockPool = BlockPoolMachine.TestCase


def test_the_least_recently_released_block_is_reused_first_and_a_tail_before_its_head() -> None:
    pool = BlockPool(4)
    table = pool.allocate(4)
    assert table == [0, 1, 2, 3]
    pool.release([2, 3])
    pool.release([0, 1])
    assert [pool.allocate(1) for _ in range(4)] == [[3], [2], [1], [0]]


def test_a_free_block_that_is_shared_again_is_not_handed_out() -> None:
    pool = BlockPool(2)
    (first,) = pool.allocate(1) or []
    pool.release([first])
    pool.share([first])
    assert pool.allocate(2) is None
    assert pool.allocate(1) == [1 - first]


def test_a_release_too_many_is_our_mistake_and_says_so() -> None:
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="block 1 is released once too often"):
        pool.release([1])
