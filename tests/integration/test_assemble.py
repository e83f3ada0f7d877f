"""Accepted objects become one file: whole, in order if asked, once, and again after a death at any moment."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends import line_merge, object_writer
from gristmill.backends.assemble import assemble, lines
from gristmill.backends.line_merge import Piece, overlap
from gristmill.backends.store import FileStore, ResultStore, S3Store, open_store
from gristmill.schemas.batch_lines import OutputLine
from gristmill.schemas.errors import ResultsDamaged, StoreUnavailable
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from ..support.dying import Died, Dying
from ..support.s3 import Proxy, S3Server

OUTPUT = "batches/b1/output.jsonl"
BIG = object_writer.MIN_PART_BYTES


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    """Each kind in turn: they promise the same."""
    if request.param == "file":
        return FileStore(tmp_path)
    s3: S3Server = request.getfixturevalue("s3")
    return open_store(s3.url, s3.settings())


def row(number: int, text: str = "") -> bytes:
    return OutputLine(id=f"batch_req_b1.{number}", custom_id=f"row-{number}", error={"code": text}).to_line()


def put(store: ResultStore, number: int, rows: Iterable[int], text: str = "") -> Piece:
    """An object of these rows, as a worker writes it."""
    ordered = sorted(rows)
    body = b"".join(row(each, text) for each in ordered)
    name = f"batches/b1/results/b1.s1/1-{number}.output.jsonl"
    store.put_new(name, body)
    digest = hashlib.sha256(body).hexdigest()
    return Piece(name, len(body), len(ordered), ordered[0], ordered[-1], digest)


def dealt(store: ResultStore, count: int, objects: int, seed: int = 1) -> list[Piece]:
    """Rows 1 to ``count``, dealt out at random."""
    hands: list[list[int]] = [[] for _ in range(objects)]
    for number in range(1, count + 1):
        random.Random(seed * 1_000_003 + number).choice(hands).append(number)
    return [put(store, n, hand) for n, hand in enumerate(hands) if hand]


def scratch(number: int) -> str:
    return f"batches/b1/results/merged/{number}.jsonl"


def whole(store: ResultStore, pieces: list[Piece], *, in_order: bool = False) -> bytes:
    """The file, and what was said of it is true."""
    made = assemble(store, OUTPUT, pieces, in_order=in_order, scratch=scratch)
    body = store.get(OUTPUT)
    assert body is not None
    digest = hashlib.sha256(body).hexdigest()
    assert (made.name, made.bytes, made.sha256) == (OUTPUT, len(body), digest)
    assert made.rows == body.count(b"\n")
    return body


# ---- what comes out


def test_every_row_is_there_once_in_the_order_of_the_objects(store: ResultStore) -> None:
    pieces = dealt(store, 300, 7)
    assert whole(store, pieces) == b"".join(store.get(piece.name) or b"" for piece in pieces)
    again = assemble(store, OUTPUT, pieces, in_order=False, scratch=scratch)
    assert again.sha256 == hashlib.sha256(store.get(OUTPUT) or b"").hexdigest()


def test_the_order_of_the_input_comes_back_on_request(store: ResultStore) -> None:
    pieces = dealt(store, 300, 7)
    assert whole(store, pieces, in_order=True) == b"".join(row(number) for number in range(1, 301))


def test_more_objects_than_may_be_open_are_merged_in_turns_and_nothing_of_that_stays(
    store: ResultStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_merge, "FAN_IN", 3)
    pieces = dealt(store, 200, 20)
    assert overlap(pieces) > 9, "two turns are needed"
    assert whole(store, pieces, in_order=True) == b"".join(row(number) for number in range(1, 201))
    assert set(store.list("batches/")) == {OUTPUT, *(piece.name for piece in pieces)}


def test_an_object_larger_than_a_span_is_read_in_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_merge, "MIN_SPAN_BYTES", 50)
    monkeypatch.setattr(line_merge, "MEMORY_BYTES", 1)
    store = FileStore(tmp_path)
    assert whole(store, dealt(store, 60, 3), in_order=True) == b"".join(map(row, range(1, 61)))


@given(st.lists(st.sets(st.integers(1, 10**10 - 1), min_size=1), min_size=1, max_size=12), st.integers(2, 4))
@examples(max_examples=25, deadline=None)
def test_any_deal_of_rows_comes_back_in_order(
    tmp_path_factory: pytest.TempPathFactory, hands: list[set[int]], fan_in: int
) -> None:
    store = FileStore(tmp_path_factory.mktemp("deal"))
    seen: set[int] = set()
    pieces: list[Piece] = []
    for number, hand in enumerate(hands):
        if fresh := hand - seen:
            pieces.append(put(store, number, fresh))
            seen |= hand
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(line_merge, "FAN_IN", fan_in)
        assert whole(store, pieces, in_order=True) == b"".join(map(row, sorted(seen)))


def test_rows_can_be_read_before_there_is_a_file(store: ResultStore) -> None:
    pieces = dealt(store, 20, 3)
    found = [line for piece in pieces for line in lines(store, piece)]
    assert sorted(found) == sorted(map(row, range(1, 21)))


# ---- dying, and two at once


@pytest.mark.parametrize("in_order", [False, True])
def test_a_death_before_any_call_costs_nothing_but_time(
    store: ResultStore, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_merge, "FAN_IN", 3)
    pieces = dealt(store, 40, 5)
    expected: bytes | None = None
    every = 1 if isinstance(store, FileStore) else 11  # requests take a while on a machine with other work
    for calls in range(1, 1000, every):
        dying: Any = Dying(store, calls)
        with suppress(Died):
            assemble(dying, OUTPUT, pieces, in_order=in_order, scratch=scratch)
        body = whole(store, pieces, in_order=in_order)
        expected = expected or body
        assert body == expected
        assert list(store.left_overs()) == []
        store.remove(OUTPUT)
        if not dying.dead:
            return
    raise AssertionError("it never came to an end")


def test_two_at_once_agree_on_one_file(store: ResultStore) -> None:
    pieces, gate = dealt(store, 200, 5), threading.Barrier(2)

    def one(_: int) -> Any:
        gate.wait()
        for _ in range(50):
            with suppress(StoreUnavailable):  # the other one began after it, and swept up
                return assemble(store, OUTPUT, pieces, in_order=False, scratch=scratch)
            time.sleep(random.uniform(0, 0.1))
        raise AssertionError("each always ends the other")

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(one, range(2))
    assert first == second
    assert hashlib.sha256(store.get(OUTPUT) or b"").hexdigest() == first.sha256


# ---- what is wrong is said


def test_an_object_that_is_gone_changed_or_short_of_a_row_is_named(tmp_path: Path) -> None:
    for number, (harm, said) in enumerate(
        [(b"", "gone"), (b"x" * 3 + b"\n", "bytes"), (row(1)[:-2].swapcase() + b"}\n", "SHA-256")]
    ):
        store = FileStore(tmp_path / str(number))
        store.root.mkdir()
        piece = put(store, 1, [1])
        (store.root / piece.name).unlink()
        if harm:
            store.put_new(piece.name, harm)
        for in_order in (False, True):
            with pytest.raises(ResultsDamaged, match="SHA-256|does not begin" if in_order and harm else said):
                assemble(store, OUTPUT, [piece], in_order=in_order, scratch=scratch)
        assert not store.exists(OUTPUT)
        assert list(store.left_overs()) == []


def test_a_row_that_is_there_twice_is_never_put_in_order(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    pieces = [put(store, 1, [1, 2, 3]), put(store, 2, [3, 4])]
    with pytest.raises(ResultsDamaged, match="line 3 of the input is there twice"):
        assemble(store, OUTPUT, pieces, in_order=True, scratch=scratch)


def test_a_file_that_somebody_put_in_its_place_is_not_taken_for_ours(store: ResultStore) -> None:
    pieces = dealt(store, 20, 2)
    store.put_new(OUTPUT, b"mine\n")
    with pytest.raises(ResultsDamaged, match="move it away"):
        assemble(store, OUTPUT, pieces, in_order=False, scratch=scratch)


# ---- S3


def test_large_objects_are_copied_by_s3_and_small_ones_sent_together(s3: S3Server) -> None:
    store = open_store(s3.url, s3.settings())
    assert isinstance(store, S3Store)
    pad = "x" * 600_000
    pieces = [
        put(store, 1, [1]),
        put(store, 2, range(2, 12), pad),
        *(put(store, n, [n + 20], "y" * 1_000_000) for n in range(3, 10)),
        put(store, 10, range(40, 50), pad),
        put(store, 11, [60]),
    ]
    asked: Counter[str] = Counter()
    store._client.meta.events.register("before-call.s3", lambda model, **_: asked.update([model.name]))
    body = whole(store, pieces)
    order = [2, 10, 1, 3, 4, 5, 6, 7, 8, 9, 11]
    named = {int(piece.name.rsplit("-")[-1].split(".")[0]): piece for piece in pieces}
    assert body == b"".join(store.get(named[n].name) or b"" for n in order)
    sent = {name: asked[name] for name in ("UploadPartCopy", "UploadPart", "CompleteMultipartUpload")}
    assert sent == {"UploadPartCopy": 2, "UploadPart": 2, "CompleteMultipartUpload": 1}
    assert asked["PutObject"] == 0


def test_a_small_file_takes_one_put(s3: S3Server) -> None:
    store = open_store(s3.url, s3.settings())
    assert isinstance(store, S3Store)
    pieces = dealt(store, 50, 3)
    asked: Counter[str] = Counter()
    store._client.meta.events.register("before-call.s3", lambda model, **_: asked.update([model.name]))
    whole(store, pieces)
    assert (asked["PutObject"], asked["CreateMultipartUpload"]) == (1, 0)


@pytest.mark.parametrize("total", [0, 1, BIG, 80 * 1024**3, 5 * 1024**4])
def test_parts_are_large_enough_for_ten_thousand_to_suffice(total: int) -> None:
    each = object_writer.part_bytes(total)
    assert each >= object_writer.MIN_PART_BYTES
    assert -(-total // each) <= object_writer.MAX_PARTS - 1, "and one more for what is left over"


def test_an_upload_that_somebody_ended_is_worth_another_look(s3: S3Server, s3_proxy: Proxy) -> None:
    store = open_store(s3.url, s3.settings(s3_proxy.endpoint))
    with store.writer(OUTPUT, 2 * BIG) as writer:
        writer.append(b"x" * BIG)
        s3_proxy.down = (404, "NoSuchUpload")
        with pytest.raises(StoreUnavailable, match="look again"):
            writer.commit()
        s3_proxy.down = None
    assert not store.exists(OUTPUT)
    assert list(store.left_overs()) == []


def test_what_a_dead_writer_left_is_found_and_swept(store: ResultStore) -> None:
    writer = store.writer(OUTPUT, 2 * BIG)
    writer.append(b"x" * (2 * BIG))
    writer.append(b"y" * BIG)
    (left,) = store.left_overs("batches/b1/")
    assert left.name == OUTPUT
    assert list(store.left_overs("batches/b2/")) == []
    assert not store.exists(OUTPUT)
    store.sweep(left)
    store.sweep(left)
    assert list(store.left_overs()) == []
