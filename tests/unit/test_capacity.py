"""Which classes may be claimed, by what is in hand: strictly more urgent work is never kept out by less."""

from __future__ import annotations

from dataclasses import replace

from gristmill.engine.messages import Stats
from gristmill.schemas.job import Priority
from gristmill.worker.capacity import MAX_UNSTARTED, Held, claimable, max_places
from hypothesis import given
from hypothesis import strategies as st

from ..support.played import PlayedEngine

INFO = PlayedEngine.info
ALL = list(Priority)
INTERACTIVE, NORMAL, BATCH = ALL


def stats(*, waiting: int, firm: tuple[int, int, int] = (0, 0, 0)) -> Stats:
    """firm: of 100 blocks, those of each class and the more urgent ones."""
    return Stats(
        running=1,
        waiting=waiting,
        free_blocks=max(0, 100 - firm[-1]),
        total_blocks=100,
        preemptions=0,
        step_s=0.1,
        tokens=1,
        firm_blocks=list(firm),
    )


def jobs(count: int, priority: Priority, tokens: int = 16, started: bool = True) -> list[Held]:
    return [Held(priority.rank, tokens, started)] * count


def test_an_idle_engine_takes_any_class() -> None:
    assert claimable([], INFO, None) == ALL


def test_a_full_engine_takes_what_it_would_evict_for() -> None:
    full = max_places(INFO)
    assert claimable(jobs(full, BATCH), INFO, None) == [INTERACTIVE, NORMAL]
    assert claimable(jobs(full, NORMAL), INFO, None) == [INTERACTIVE]
    assert claimable(jobs(full, INTERACTIVE), INFO, None) == []
    assert claimable(jobs(full - 1, INTERACTIVE), INFO, None) == ALL


def test_the_next_one_fits_only_where_all_more_urgent_ones_do() -> None:
    half = max_places(INFO) // 2
    assert claimable(jobs(half, INTERACTIVE) + jobs(half + 1, NORMAL), INFO, None) == [INTERACTIVE]


def test_a_cache_full_of_batch_work_is_no_obstacle_to_the_others() -> None:
    long = jobs(10, BATCH, tokens=160)
    assert claimable(long, INFO, stats(firm=(0, 0, 100), waiting=2)) == [INTERACTIVE, NORMAL]
    assert claimable(long, INFO, stats(firm=(0, 0, 100), waiting=0)) == ALL, "nobody waits: it may grow"


def test_a_cache_full_of_urgent_work_keeps_everybody_out() -> None:
    long = jobs(10, INTERACTIVE, tokens=160)
    assert claimable(long, INFO, stats(firm=(100, 100, 100), waiting=2)) == []
    assert claimable(long, INFO, stats(firm=(95, 96, 96), waiting=2)) == [INTERACTIVE]


def test_blocks_that_jobs_share_count_once() -> None:
    alike = jobs(12, NORMAL, tokens=800)  # 50 blocks each, were they alone
    assert claimable(alike, INFO, stats(firm=(0, 70, 70), waiting=1)) == ALL


def test_what_has_not_started_is_counted_as_if_it_shared_nothing() -> None:
    asked = jobs(1, NORMAL, tokens=480, started=False)
    assert claimable(asked, INFO, stats(firm=(0, 60, 60), waiting=1)) == ALL
    assert claimable(asked * 2, INFO, stats(firm=(0, 60, 60), waiting=1)) == [INTERACTIVE]


def test_prompts_that_have_not_started_keep_back_their_own_class_and_those_below() -> None:
    waiting = jobs(4, NORMAL, tokens=512, started=False)
    assert claimable(waiting, INFO, None) == [INTERACTIVE]
    assert claimable(jobs(4, NORMAL, tokens=512), INFO, None) == ALL
    many = replace(INFO, max_num_seqs=500)
    assert claimable(jobs(MAX_UNSTARTED, NORMAL, tokens=1, started=False), many, None) == [INTERACTIVE]


held = st.builds(Held, st.integers(0, 2), st.integers(0, 2000), st.booleans())


@given(
    st.lists(held, max_size=40),
    st.none()
    | st.builds(
        lambda f, w: stats(firm=(f[0], f[1], f[2]), waiting=w),
        st.lists(st.integers(0, 120), min_size=3, max_size=3).map(sorted),
        st.integers(0, 9),
    ),
)
def test_whoever_has_room_leaves_room_for_the_more_urgent(in_hand: list[Held], now: Stats | None) -> None:
    found = claimable(in_hand, INFO, now)
    assert found == ALL[: len(found)]


def test_an_engine_that_ran_out_of_memory_is_given_less() -> None:
    shrunk = replace(stats(firm=(10, 10, 10), waiting=0), max_running=4, step_tokens=64)
    assert claimable(jobs(4, NORMAL), INFO, shrunk) == ALL
    assert claimable(jobs(5, INTERACTIVE), INFO, shrunk) == []
    assert claimable(jobs(1, INTERACTIVE, tokens=256, started=False), INFO, shrunk) == []
