"""Whatever the rows: none is lost or doubled on the way into segments, and every bound holds."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from gristmill.producer.batch import cutting
from gristmill.producer.batch.cutting import Cut, Sent, cut, with_copies
from gristmill.producer.batch.order import SHARED_BYTES, in_order, work_s
from gristmill.producer.batch.spool import Spooled
from hypothesis import given, settings
from hypothesis import strategies as st

BODIES = st.builds(
    lambda family, shared, rest: family * shared + rest,
    st.sampled_from([b"a", b"b"]),
    st.sampled_from([0, 10, 300, 1000]),
    st.binary(min_size=1, max_size=40),
)


@st.composite
def rows(draw: st.DrawFn) -> list[Spooled]:
    made = draw(
        st.lists(
            st.tuples(BODIES, st.floats(0, 1e5, width=32), st.sampled_from([1.0, 100.0, 1e5])), max_size=80
        )
    )
    return [
        Spooled(n + 1, f"r{n}", body, False, prompt, output) for n, (body, prompt, output) in enumerate(made)
    ]


@given(rows())
@settings(max_examples=60, deadline=None)
def test_an_order_is_a_permutation_and_the_same_again(given_rows: list[Spooled]) -> None:
    ordered = in_order(given_rows)
    assert sorted(ordered, key=lambda row: row.line) == given_rows
    assert in_order(list(reversed(given_rows))) == ordered


@given(rows(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_segments_hold_every_row_once_and_keep_their_bounds(given_rows: list[Spooled], copies: int) -> None:
    sent = [
        each
        for row in given_rows
        for each in with_copies(
            row, [Spooled(row.line + 1000 * n, "c", row.body) for n in range(1, copies + 1)]
        )
    ]
    total_s = sum(work_s(row) for row in given_rows)
    made = list(cut(sent, total_s))
    assert [each for one in made for each in one.rows] == sent
    assert [one.number for one in made] == list(range(1, len(made) + 1))
    for one in made:
        lines = {each.row.line for each in one.rows}
        assert (one.first, one.last) == (min(lines), max(lines))
        assert all(each.copy_of is None or each.copy_of in lines for each in one.rows), "a copy was parted"
        assert len(one.rows) <= cutting.MOST_ROWS
    assert all(len(one.rows) >= cutting.FEWEST_ROWS for one in made[:-1])


def row(line: int, body: bytes, output: float = 100.0) -> Spooled:
    return Spooled(line, f"r{line}", body, False, len(body) / 4, output)


def test_rows_that_begin_alike_meet_and_long_ones_start_first() -> None:
    shared = {letter: letter.encode() * (2 * SHARED_BYTES) for letter in "xyz"}
    mixed = [row(n, shared["xyz"[n % 3]] + b"%04d" % n) for n in range(90)]
    alone = [row(100 + n, b"%d alone" % n, output=50.0 * n) for n in range(20)]
    ordered = in_order(mixed + alone)
    letters = "".join(chr(each.body[0]) for each in ordered if each.line < 100)
    assert len(Counter(letters)) == 3
    assert all(letter * 30 in letters for letter in "xyz"), "a family was torn apart"
    longest = [each.line for each in ordered if each.line >= 100]
    assert longest == sorted(longest, reverse=True)


def test_segments_shrink_towards_the_end() -> None:
    made: list[Cut] = list(cut((Sent(row(n, b"x" * 400, 200.0)) for n in range(1, 50_001)), 50_000 * 0.1055))
    sizes = [one.work_s for one in made]
    assert max(sizes) < 1.1 * cutting.LONGEST_S
    assert sizes[0] > 5 * sizes[-2]
    assert all(later <= earlier * 1.05 for earlier, later in pairwise(sizes))


def test_identical_rows_that_no_segment_could_hold_together_are_computed_again() -> None:
    body = b"x" * (cutting.COPIES_BYTES // 3)
    groups = list(with_copies(row(1, body), [row(n, body) for n in range(2, 8)]))
    assert [each.copy_of for each in groups] == [None, 1, 1, None, 4, 4, None]
