"""The planner walks the queue branch by branch, overtakes within bounds, and never across classes."""

from __future__ import annotations

import random
from collections import Counter

from gristmill.engine.block_pool import BlockPool
from gristmill.engine.messages import Request
from gristmill.engine.planner import Planner
from gristmill.engine.scheduler import Scheduler
from gristmill.engine.sequence import Sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from ..support.scheduling import tokens_fed

PREFIX, OWN, OUTPUT = 256, 40, 8
FAMILIES, ROWS = 6, 20
NAMES = (b"a", b"b")


def make(number: int, prompt: list[int], *, priority: int = 2, max_tokens: int = OUTPUT) -> Sequence:
    request = Request(
        id=f"s{number}",
        prompt_ids=prompt,
        max_tokens=max_tokens,
        priority=priority,
        arrival=float(number),
    )
    return Sequence(request, limit=len(prompt) + max_tokens, end_ids=frozenset(), number=number)


def shuffled_families(seed: int) -> list[Sequence]:
    """Like the rows of a bulk file with six system prompts, in random order."""
    draw = random.Random(seed)
    heads = [[1_000 * family + 1_000 + at for at in range(PREFIX)] for family in range(FAMILIES)]
    prompts = [
        [*head, *([100_000 + 100 * n + row] * OWN)] for n, head in enumerate(heads) for row in range(ROWS)
    ]
    draw.shuffle(prompts)
    return [make(number, prompt) for number, prompt in enumerate(prompts)]


def scheduler(planner: Planner) -> Scheduler:
    """Room for two of the six prefixes and a handful of rows."""
    return Scheduler(BlockPool(64), block_size=16, step_tokens=512, max_num_seqs=8, planner=planner)


def lru(it: Scheduler) -> Scheduler:
    """All contents are worth the same, wanted or not: the block unused for longest is taken first."""
    it.cache._rate = lambda name: None  # type: ignore[method-assign]
    return it


def test_in_a_shuffled_queue_larger_than_the_cache_each_prefix_is_computed_once() -> None:
    rows = FAMILIES * ROWS
    for seed in range(5):
        fed = tokens_fed(scheduler(Planner()), shuffled_families(seed))
        assert fed == FAMILIES * PREFIX + rows * (OWN + OUTPUT - 1), f"seed {seed}"


def test_it_computes_less_than_half_of_what_arrival_order_with_an_lru_does() -> None:
    planned = tokens_fed(scheduler(Planner()), shuffled_families(1))
    plain = lru(scheduler(Planner((0, 0, 0))))
    assert planned < tokens_fed(plain, shuffled_families(1)) / 2


def test_keeping_blocks_by_who_still_wants_them_helps_arrival_order_too() -> None:
    kept = tokens_fed(scheduler(Planner((0, 0, 0))), shuffled_families(1))
    plain = lru(scheduler(Planner((0, 0, 0))))
    assert kept < tokens_fed(plain, shuffled_families(1))


@settings(max_examples=150, deadline=None)
@given(
    overtakes=st.integers(0, 4),
    arrivals=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.lists(st.sampled_from(NAMES), max_size=3),
            st.integers(1, 9),
            st.sampled_from(["none", "admit", "remove"]),
        ),
        max_size=40,
    ),
)
def test_nobody_is_overtaken_more_often_than_allowed_nor_across_classes(
    overtakes: int, arrivals: list[tuple[int, list[bytes], int, str]]
) -> None:
    planner = Planner((overtakes, overtakes, overtakes))
    waiting: list[Sequence] = []
    overtaken: Counter[Sequence] = Counter()

    def admit() -> None:
        seq = planner.next()
        assert seq is not None
        planner.admit(seq)
        waiting.remove(seq)
        passed = [other for other in waiting if other.rank < seq.rank]
        assert {other.request.priority for other in passed} <= {seq.request.priority}
        overtaken.update(passed)
        assert all(overtaken[other] <= overtakes for other in passed)

    for number, (priority, trail, max_tokens, then) in enumerate(arrivals):
        seq = make(number, [1], priority=priority, max_tokens=max_tokens)
        planner.add(seq, [b"/".join(trail[:n]) for n in range(len(trail), 0, -1)])
        waiting.append(seq)
        if then == "admit":
            admit()
        elif then == "remove":
            gone = waiting.pop(number % len(waiting))
            planner.remove(gone)
        planner.check(sorted(waiting, key=lambda seq: seq.rank))
    while waiting:
        admit()
    assert planner.next() is None


def test_branches_are_walked_one_after_the_other_the_deepest_first() -> None:
    planner = Planner()
    trails = [[b"x"], [b"yp", b"y"], [b"x"], [b"yq", b"y"], [b"yp", b"y"], []]
    for number, trail in enumerate(trails):
        planner.add(make(number, [1], priority=1), trail)
    order: list[str] = []
    while (seq := planner.next()) is not None:
        planner.admit(seq)
        order.append(seq.id)
    assert order == ["s0", "s2", "s1", "s4", "s3", "s5"]


def test_of_a_batch_the_longest_starts_first_and_other_classes_keep_their_order() -> None:
    for priority, expected in ((0, "s0"), (1, "s0"), (2, "s1")):
        planner = Planner()
        for number, max_tokens in enumerate((10, 500, 10)):
            planner.add(make(number, [1], priority=priority, max_tokens=max_tokens), [])
        chosen = planner.next()
        assert chosen is not None
        assert chosen.id == expected


def test_a_preempted_sequence_is_next_whatever_else_would_fit_better() -> None:
    planner = Planner()
    planner.add(make(0, [1]), [b"x"])
    first = planner.next()
    assert first is not None
    planner.admit(first)
    planner.add(make(1, [1]), [b"x"])
    back = make(2, [1])
    back.preempted = True
    planner.add(back, [b"y"])
    assert planner.next() is back


def test_a_preempted_sequence_may_end_while_it_waits() -> None:
    """Its last token was still coming when it lost its blocks, and that was an end token: another one of the
    batch was struck from the list in its place, and never started."""
    it = Scheduler(BlockPool(16), block_size=4, step_tokens=16, max_num_seqs=2)
    first, second, third = (make(number, [number + 1] * 4) for number in (0, 1, 2))
    third.limit = second.limit - 1  # ranked right behind what is left of the second
    for seq in (first, second, third):
        it.add(seq)
    plan = it.plan()
    assert [work.seq for work in plan.work] == [first, second]
    it.advance(plan)
    first.coming = second.coming = 1
    assert it.shrink()  # to one sequence
    second.coming = 0
    it.remove(second)
    first.tokens.append(9)
    first.coming = 0
    it.check()
    it.remove(first)
    assert [work.seq for work in it.plan().work] == [third]
