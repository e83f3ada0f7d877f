"""Followers on a real server: whoever comes, whenever, reads the text of the result."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends import batch_calls
from gristmill.backends.row_results import row_result
from gristmill.backends.state import State, Write, open_async_state
from gristmill.backends.store import FileStore
from gristmill.producer import stream
from gristmill.producer.replica import Chunk, Final, Item
from gristmill.producer.stream import follow, follow_async
from gristmill.schemas import keys
from gristmill.schemas.batch import row_id
from gristmill.schemas.errors import (
    BrokerUnavailable,
    GristmillError,
    JobNotFound,
    StoreUnavailable,
    WaitTimeout,
)
from gristmill.schemas.events import Delta, Done, End, EntryId
from gristmill.schemas.job import Job, JobState
from gristmill.schemas.result import FinishReason
from gristmill.schemas.settings import Settings

from ..support.batch_hand import Hand, open_batch
from ..support.journal import Attempt, make_job
from ..support.valkey import Valkey
from ..support.waiting import wait_until

EXAMPLE = Path(__file__).parents[2] / "examples" / "follow.py"
WORDS = ["Once", " upon", " a", " time", "", " né", "e", " 🦊", " ran", "."]


class Reader(threading.Thread):
    """Follows a job on a thread of its own, and shows what a user would see."""

    def __init__(self, items: Iterable[Item]) -> None:
        super().__init__(daemon=True)
        self._items, self.items = items, list[Item]()
        self.error: GristmillError | None = None
        self.start()

    def run(self) -> None:
        try:
            for item in self._items:
                self.items.append(item)
        except GristmillError as exc:
            self.error = exc

    @property
    def text(self) -> str:
        return text_of(self.items)

    def finished(self, timeout_s: float = 20) -> str:
        """The text, once it has ended."""
        self.join(timeout_s)
        assert not self.is_alive(), f"still waiting after {timeout_s} s, has {self.text!r}"
        if self.error is not None:
            raise self.error
        assert isinstance(self.items[-1], Final)
        return self.text


def text_of(items: Iterable[Item]) -> str:
    """What a screen would show of the first choice."""
    text = ""
    for item in items:
        if isinstance(item, Chunk) and item.choice == 0:
            text = item.text if item.reset else text + item.text
    return text


def resets(items: Iterable[Item]) -> int:
    return sum(isinstance(item, Chunk) and item.reset for item in items)


def subscribers(valkey: Valkey) -> int:
    """Connections that listen. (PUBSUB NUMSUB of Valkey 9.1.2 answers nonsense at eight and at fifteen.)"""
    return valkey.client().info("clients")["pubsub_clients"]


def listening(state: State, valkey: Valkey, job: Job, **options: Any) -> Reader:
    """A reader that has subscribed."""
    before = subscribers(valkey)
    reader = Reader(follow(state, job.id, **options))
    wait_until(lambda: subscribers(valkey) > before or not reader.is_alive(), 5, "a reader subscribes")
    return reader


def run_to_end(attempt: Attempt, words: Iterable[str] = WORDS, rest: str = " The end.") -> str:
    for word in words:
        assert attempt.write(word)
    assert attempt.done(rest)
    attempt.finish()
    return attempt.result().text


@pytest.fixture
def job(state: State) -> Job:
    job = make_job(stream=True)
    state.submit(job)
    return job


# ---- whoever comes, whenever


def test_early_late_returning_and_coming_after_the_end_all_read_the_result(
    state: State, valkey: Valkey, job: Job
) -> None:
    early = listening(state, valkey, job)
    attempt = Attempt.begin(state, job)
    for word in WORDS[:5]:
        attempt.write(word)
    late = listening(state, valkey, job)
    wait_until(lambda: len(late.items) == 5, 5, "the late one has the log")
    middle = late.items[2]
    assert isinstance(middle, Chunk)
    returning = listening(state, valkey, job, last=middle.id)
    text = run_to_end(attempt, WORDS[5:])
    after = Reader(follow(state, job.id))
    assert early.finished() == late.finished() == after.finished() == text
    assert text_of(late.items[:3]) + returning.finished() == text
    assert [resets(reader.items) for reader in (early, late, returning, after)] == [0, 0, 0, 0]


def test_pieces_carry_position_ids_and_the_finish_reason(state: State, job: Job) -> None:
    attempt = Attempt.begin(state, job)
    run_to_end(attempt, ["a", "b"], rest="c")
    first, second, last, final = follow(state, job.id)
    assert isinstance(final, Final)
    assert first == Chunk("a", (0,), 0, 0, EntryId(attempt.id, 1))
    assert second == Chunk("b", (1,), 0, 1, EntryId(attempt.id, 2))
    assert last == Chunk("c", (), 0, 2, EntryId(attempt.id, 3), finish_reason=FinishReason.STOP)
    assert final.end.state is JobState.SUCCEEDED
    assert final.end.usage.completion_tokens == 2


def test_every_id_is_a_place_to_resume_from(state: State, job: Job) -> None:
    attempt = Attempt.begin(state, job)
    for word in WORDS[:5]:
        attempt.write(word)
    text = run_to_end(Attempt.begin(state, job, "w2"), WORDS[5:])
    items = [*follow(state, job.id)]
    assert text_of(items) == text
    for position, item in enumerate(items, start=1):
        rest = [*follow(state, job.id, item.id)]
        assert text_of(items[:position]) + text_of(rest) == text
        assert resets(rest) == 0
        assert isinstance(rest[-1], Final)


def test_resuming_from_the_beginning_is_following(state: State, job: Job) -> None:
    text = run_to_end(Attempt.begin(state, job))
    assert text_of(follow(state, job.id, EntryId(0, 0))) == text


def test_a_log_of_many_pages_is_read_whole(state: State, job: Job) -> None:
    attempt = Attempt.begin(state, job)
    state.publish([attempt.entry(f"{number} ") for number in range(2 * stream.LOG_PAGE + 5)])
    text = run_to_end(attempt, [])
    assert text_of(follow(state, job.id)) == text


def test_choices_are_told_apart(state: State, job: Job) -> None:
    attempt = Attempt.begin(state, job)
    events = [
        Delta(choice=0, offset=0, ids=(1,), text="a"),
        Delta(choice=1, offset=0, ids=(2, 3), text="x"),
        Delta(choice=0, offset=1, ids=(4,), text="b"),
        Done(choice=1, reason=FinishReason.LENGTH, text="y", at=1.0),
        Done(choice=0, reason=FinishReason.STOP, at=1.0),
    ]
    state.publish([Write(job.id, attempt.id, n, e.to_json()) for n, e in enumerate(events, start=1)])
    attempt.finish()
    chunks = [item for item in follow(state, job.id) if isinstance(item, Chunk)]
    assert [(c.choice, c.text, c.offset) for c in chunks] == [
        (0, "a", 0),
        (1, "x", 0),
        (0, "b", 1),
        (1, "y", 2),
        (0, "", 2),
    ]


def test_what_a_newer_worker_adds_to_a_log_is_passed_over(state: State, job: Job) -> None:
    """A worker one version ahead writes a field and a kind of entry that this follower has never heard of."""
    attempt = Attempt.begin(state, job)
    live = Reader(follow(state, job.id))
    assert attempt.write("Once")
    wait_until(lambda: live.text == "Once", 10, "the follower reads live")
    for event in ('{"kind":"progress","percent":50}', '{"kind":"delta","offset":1,"ids":[1],"mood":"merry"}'):
        attempt.seq += 1
        assert not state.publish([Write(job.id, attempt.id, attempt.seq, event)])
    attempt.ids.append(1)
    assert attempt.write(" upon")
    assert attempt.done()
    assert attempt.finish()
    assert live.finished() == attempt.text == text_of(follow(state, job.id))


def test_many_followers_of_one_job_read_the_same(state: State, valkey: Valkey, job: Job) -> None:
    readers = [listening(state, valkey, job) for _ in range(16)]
    attempt = Attempt.begin(state, job)
    text = run_to_end(attempt, [f"{n} " for n in range(200)])
    assert {reader.finished() for reader in readers} == {text}


async def test_hundreds_of_followers_of_many_jobs_in_one_loop(state: State, settings: Settings) -> None:
    jobs = [make_job(stream=True) for _ in range(32)]
    for job in jobs:
        state.submit(job)

    async def read(job: Job) -> str:
        async with aclosing(follow_async(twin, job.id)) as items:
            return text_of([item async for item in items])

    def write() -> dict[str, str]:
        attempts = [Attempt.begin(state, job) for job in jobs]
        for step in range(50):
            state.publish([attempt.entry(f"{step} ") for attempt in attempts])
        return {attempt.job.id: run_to_end(attempt, []) for attempt in attempts}

    async with await open_async_state(settings) as twin:
        readers = [asyncio.create_task(read(job)) for job in jobs for _ in range(4)]
        texts = await asyncio.to_thread(write)
        assert await asyncio.gather(*readers) == [texts[job.id] for job in jobs for _ in range(4)]


# ---- attempts


def test_a_new_attempt_that_continues_is_not_noticed(state: State, valkey: Valkey, job: Job) -> None:
    reader = listening(state, valkey, job)
    first = Attempt.begin(state, job)
    first.write("Once", " upon")
    wait_until(lambda: reader.text == "Once upon", 5, "the first half is read")
    heir = Attempt.begin(state, job, "w2")
    assert not first.write(" a zombie")
    text = run_to_end(heir, [" a", " time"])
    assert reader.finished() == text == "Once upon a time The end."
    assert resets(reader.items) == 0
    offsets = [item.offset for item in reader.items if isinstance(item, Chunk)]
    assert offsets == [0, 1, 2, 3, 4]


def lose_everything(valkey: Valkey, job: Job) -> None:
    """What a server without persistence does when it restarts; followers stay connected."""
    valkey.client().delete(keys.state(job.id), keys.log(job.id))


def test_a_log_that_starts_over_with_the_same_text_is_not_noticed(
    state: State, valkey: Valkey, job: Job
) -> None:
    reader = listening(state, valkey, job)
    Attempt.begin(state, job).write("Once", " upon", " a")
    wait_until(lambda: reader.text == "Once upon a", 5, "the first attempt is read")
    lose_everything(valkey, job)
    text = run_to_end(Attempt.begin(state, job), ["Once upon", " a time"])
    assert reader.finished() == text
    assert resets(reader.items) == 0


def test_a_log_that_starts_over_with_another_text_resets_once(state: State, valkey: Valkey, job: Job) -> None:
    reader = listening(state, valkey, job)
    Attempt.begin(state, job).write("Once", " upon", " a")
    wait_until(lambda: reader.text == "Once upon a", 5, "the first attempt is read")
    lose_everything(valkey, job)
    text = run_to_end(Attempt.begin(state, job), ["Once", " there", " was"])
    assert reader.finished() == text == "Once there was The end."
    assert resets(reader.items) == 1


def test_a_log_that_starts_over_and_ends_sooner_resets(state: State, valkey: Valkey, job: Job) -> None:
    reader = listening(state, valkey, job)
    Attempt.begin(state, job).write("Once", " upon", " a")
    wait_until(lambda: reader.text == "Once upon a", 5, "the first attempt is read")
    lose_everything(valkey, job)
    text = run_to_end(Attempt.begin(state, job), ["Once"], rest="")
    assert reader.finished() == text == "Once"
    assert resets(reader.items) == 1


def test_an_id_of_a_lost_log_resumes_with_a_reset(state: State, valkey: Valkey, job: Job) -> None:
    old = Attempt.begin(state, job)
    old.write("Once", " upon")
    lose_everything(valkey, job)
    text = run_to_end(Attempt.begin(state, job), ["Once", " more"])
    items = [*follow(state, job.id, EntryId(old.id, 2))]
    assert text_of(items) == text
    assert resets(items) == 1
    assert isinstance(items[0], Chunk)
    assert items[0].reset


# ---- the channel fails


def test_a_dropped_message_is_refilled_from_the_log(state: State, valkey: Valkey, job: Job) -> None:
    reader = listening(state, valkey, job)
    attempt = Attempt.begin(state, job)
    attempt.write("a")
    wait_until(lambda: reader.text == "a", 5, "the first piece is read")
    silently = attempt.entry("b")  # in the log, never on the channel
    entry_id = f"{silently.attempt}-{silently.seq}"
    valkey.client().xadd(keys.log(job.id), {"d": silently.event}, id=entry_id)
    assert reader.text == "a"
    text = run_to_end(attempt, ["c"])
    assert reader.finished() == text
    assert [item.text for item in reader.items if isinstance(item, Chunk)] == ["a", "b", "c", " The end."]


def test_a_repeated_or_reordered_message_is_shown_once(state: State, valkey: Valkey, job: Job) -> None:
    reader = listening(state, valkey, job)
    attempt = Attempt.begin(state, job)
    write = attempt.entry("a")
    state.publish([write])
    for _ in range(3):
        valkey.client().publish(keys.log(job.id), f"{write.attempt}-{write.seq} {write.event}")
    text = run_to_end(attempt, ["b"])
    assert reader.finished() == text == "ab The end."


def test_a_cut_connection_is_made_again_and_nothing_is_missing(
    state: State, valkey: Valkey, job: Job
) -> None:
    reader = listening(state, valkey, job)
    attempt = Attempt.begin(state, job)
    for word in WORDS:
        attempt.write(word)
        valkey.drop_clients()
    text = run_to_end(attempt, [])
    assert reader.finished() == text


def test_a_restart_of_the_server_is_survived(state: State, valkey: Valkey, job: Job) -> None:
    valkey.client().config_set("appendfsync", "always")
    reader = listening(state, valkey, job)
    attempt = Attempt.begin(state, job)
    attempt.write("a")
    wait_until(lambda: reader.text == "a", 5, "the first piece is read")
    valkey.restart()
    text = run_to_end(attempt, ["b"])
    assert reader.finished() == text
    assert resets(reader.items) == 0


async def test_the_async_follower_survives_a_restart_too(
    state: State, settings: Settings, valkey: Valkey, job: Job
) -> None:
    valkey.client().config_set("appendfsync", "always")
    attempt = Attempt.begin(state, job)
    attempt.write("a")

    def fail_and_finish() -> str:
        valkey.restart()
        return run_to_end(attempt, ["b"])

    items: list[Item] = []
    async with await open_async_state(settings) as twin, aclosing(follow_async(twin, job.id)) as followed:
        async for item in followed:
            items.append(item)
            if len(items) == 1:
                ending = asyncio.create_task(asyncio.to_thread(fail_and_finish))
        assert text_of(items) == await ending


def test_a_server_that_stays_away_is_unavailable_after_a_while(
    state: State, valkey: Valkey, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "OUTAGE_S", 0.5)
    reader = listening(state, valkey, job)
    valkey.kill()
    with pytest.raises(BrokerUnavailable):
        reader.finished()


def test_a_lost_end_event_is_found_in_a_silence(state: State, valkey: Valkey, job: Job) -> None:
    reader = listening(state, valkey, job, idle_s=0.1)
    attempt = Attempt.begin(state, job)
    attempt.write("a")
    end = End(state=JobState.CANCELLED)
    valkey.client().xadd(keys.log(job.id), {"d": end.to_json()}, id=f"{attempt.id}-2")
    assert reader.finished() == "a"


# ---- no log, no job, no patience


def test_an_unknown_job_is_not_waited_for(state: State) -> None:
    with pytest.raises(JobNotFound, match="job_unknown"):
        [*follow(state, "job_unknown")]


def test_a_queued_job_is_waited_for_as_long_as_the_caller_wants(state: State, job: Job) -> None:
    with pytest.raises(WaitTimeout, match="goes on"):
        [*follow(state, job.id, timeout_s=0.2, idle_s=0.05)]
    reader = Reader(follow(state, job.id, timeout_s=20, idle_s=0.05))
    assert run_to_end(Attempt.begin(state, job)) == reader.finished()


def test_the_timeout_counts_while_text_flows_too(state: State, valkey: Valkey, job: Job) -> None:
    reader = listening(state, valkey, job, timeout_s=0.3)
    attempt = Attempt.begin(state, job)
    wait_until(lambda: attempt.write("x") and not reader.is_alive(), 10, "the reader gives up")
    assert isinstance(reader.error, WaitTimeout)
    last = reader.items[-1]
    attempt.done()
    attempt.finish()
    assert reader.text + text_of(follow(state, job.id, last.id)) == attempt.text


def test_a_job_whose_state_vanishes_while_it_is_followed_is_not_found(
    state: State, valkey: Valkey, job: Job
) -> None:
    reader = listening(state, valkey, job, idle_s=0.1)
    lose_everything(valkey, job)
    with pytest.raises(JobNotFound):
        reader.finished()


def test_without_its_log_the_result_is_shown(state: State, valkey: Valkey, job: Job) -> None:
    attempt = Attempt.begin(state, job)
    text = run_to_end(attempt)
    valkey.client().delete(keys.log(job.id))
    items = [*follow(state, job.id)]
    assert text_of(items) == text
    assert isinstance(items[-1], Final)
    assert items[-1].end.state is JobState.SUCCEEDED


def test_without_log_and_state_the_result_comes_from_the_store(
    state: State, valkey: Valkey, job: Job
) -> None:
    attempt = Attempt.begin(state, job)
    text = run_to_end(attempt)
    body = attempt.result().to_json()
    lose_everything(valkey, job)
    items = [*follow(state, job.id, fetch={job.id: body.encode()}.get)]
    assert text_of(items) == text
    assert items[-1] == Final(EntryId(0, 0), End.from_json(items[-1].end.to_json()))


def test_a_log_that_is_gone_in_the_middle_is_completed_from_the_result(
    state: State, valkey: Valkey, job: Job
) -> None:
    reader = listening(state, valkey, job, idle_s=0.1)
    attempt = Attempt.begin(state, job)
    attempt.write("Once", " upon")
    wait_until(lambda: reader.text == "Once upon", 5, "the first half is read")
    valkey.client().delete(keys.log(job.id))
    assert not attempt.write(" lost")
    attempt.parts[2:] = [" a time"]
    attempt.finish()
    assert reader.finished() == "Once upon a time"
    assert resets(reader.items) == 0


def test_a_hole_in_the_log_is_never_papered_over(state: State, valkey: Valkey, job: Job) -> None:
    attempt = Attempt.begin(state, job)
    attempt.write("a", "b", "c")
    attempt.done("d")
    valkey.client().xdel(keys.log(job.id), f"{attempt.id}-2")
    attempt.finish()
    items = [*follow(state, job.id)]
    assert text_of(items) == "abcd"
    assert resets(items) == 0
    valkey.client().hdel(keys.state(job.id), "result")
    with pytest.raises(StoreUnavailable, match="log is lost"):
        [*follow(state, job.id)]


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.EXPIRED])
def test_a_job_that_ended_without_text_ends_its_followers(
    state: State, valkey: Valkey, job: Job, reason: FinishReason
) -> None:
    reader = listening(state, valkey, job)
    state.finish(job.id, End(state=reason.state))
    assert reader.finished() == ""
    assert reader.items[-1].end.state is reason.state


def test_leaving_early_gives_the_connections_back(state: State, valkey: Valkey, job: Job) -> None:
    attempt = Attempt.begin(state, job)
    attempt.write("a")
    items = follow(state, job.id)
    next(items)
    assert subscribers(valkey) == 1
    items.close()  # what the end of a for loop's scope does
    wait_until(lambda: subscribers(valkey) == 0, 5, "nobody is subscribed")


# ---- the example for other languages


@pytest.fixture
def run_example(valkey: Valkey) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(EXAMPLE), valkey.url, *arguments]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_the_example_follows_live_with_nothing_but_redis_py(
    state: State, valkey: Valkey, job: Job, run_example: Callable[..., subprocess.Popen[str]]
) -> None:
    example = run_example(job.id)
    wait_until(lambda: subscribers(valkey) == 1, 20, "the example subscribes")
    first = Attempt.begin(state, job)
    first.write(*WORDS[:4])
    silently = first.entry(WORDS[4])
    valkey.client().xadd(keys.log(job.id), {"d": silently.event}, id=f"{silently.attempt}-{silently.seq}")
    text = run_to_end(Attempt.begin(state, job, "w2"), WORDS[5:])
    out, err = example.communicate(timeout=20)
    assert example.returncode == 0, err
    assert out == text
    assert "starts over" not in err


def test_the_example_resumes_from_an_id(
    state: State, job: Job, run_example: Callable[..., subprocess.Popen[str]]
) -> None:
    attempt = Attempt.begin(state, job)
    text = run_to_end(attempt)
    out, err = run_example(job.id, "--from", f"{attempt.id}-3").communicate(timeout=20)
    assert out == text.removeprefix("".join(WORDS[:3]))
    assert err.splitlines()[-1].endswith("end: succeeded")


def test_the_example_says_that_it_knows_no_such_job(
    run_example: Callable[..., subprocess.Popen[str]],
) -> None:
    example = run_example("job_unknown")
    out, err = example.communicate(timeout=20)
    assert (out, example.returncode) == ("", 1)
    assert "unknown" in err


def test_the_example_imports_no_part_of_ours() -> None:
    imports = [line for line in EXAMPLE.read_text().splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in imports if "gristmill" in line]


# ---- rows of batches


def test_a_rows_end_reaches_its_followers_with_its_batchs_event(
    state: State, valkey: Valkey, settings: Settings, tmp_path: Path
) -> None:
    """It took up to 25 s: rows join after 10 s, and 15 s of silence had to pass until somebody looked."""
    store = FileStore(tmp_path)
    hand = Hand(state, store)
    batch = open_batch(state, store, [[1, 2, 3]])
    hand.validate(1)
    state.batches.begin(batch)
    begun, waits, other = (make_job(id=row_id(batch.id, line)) for line in (1, 2, 3))

    def fetch(job_id: str) -> str | None:
        result = row_result(state.batches, store, job_id)
        return None if result is None else result.to_json()

    async def read(job_id: str) -> list[Item]:
        client = await open_async_state(settings)
        async with client, aclosing(follow_async(client, job_id, fetch=fetch_async, idle_s=3600)) as items:
            return [item async for item in items]

    async def fetch_async(job_id: str) -> str | None:
        return fetch(job_id)

    claim = hand.claim(1)
    state.batches.begin_rows(claim.info.id, claim.attempt, "w1", [1])
    readers = [listening(state, valkey, job, fetch=fetch, idle_s=3600) for job in (begun, waits)]
    with ThreadPoolExecutor(1) as threads:
        before = subscribers(valkey)
        awaited = threads.submit(lambda: asyncio.run(read(other.id)))
        wait_until(lambda: subscribers(valkey) > before, 20, "it subscribes, too")
        events = [Delta(offset=0, ids=(1,), text="x"), Done(reason=FinishReason.STOP, text=" 1", at=1.0)]
        writes = [
            Write(begun.id, claim.attempt, seq, each.to_json(), claim.info.id)
            for seq, each in enumerate(events, 1)
        ]
        assert state.publish(writes) == set()
        wait_until(lambda: readers[0].text == "x 1", 20, "its text is there")
        hand.accept(claim, hand.put(claim, [3]))
        assert text_of(awaited.result(20)) == "x 3"
        assert all(reader.is_alive() for reader in readers), "their rows have not ended"
        hand.accept(claim, hand.put(claim, [1, 2]))
        assert [reader.finished() for reader in readers] == ["x 1", "x 2"]
    assert resets(readers[0].items) == 0


@pytest.mark.parametrize("cut", [True, False])
def test_a_rows_follower_that_missed_its_last_piece_ends_with_its_batchs_event(
    state: State, valkey: Valkey, settings: Settings, tmp_path: Path, cut: bool
) -> None:
    """Its connection was cut in the middle of the row, whose log went before it was back: it waited for the
    last piece until the whole batch was over, whose events kept it from noticing a silence.
    """
    store = FileStore(tmp_path)
    hand = Hand(state, store)
    batch = open_batch(state, store, [[1, 2, 3]])
    hand.validate(1)
    state.batches.begin(batch)
    claim = hand.claim(1)
    state.batches.begin_rows(claim.info.id, claim.attempt, "w1", [1])
    job = make_job(id=row_id(batch.id, 1))
    half = Delta(offset=0, ids=(1,), text="x")
    assert state.publish([Write(job.id, claim.attempt, 1, half.to_json(), claim.info.id)]) == set()

    def fetch(job_id: str) -> str | None:
        result = row_result(state.batches, store, job_id)
        return None if result is None else result.to_json()

    async def fetch_async(job_id: str) -> str | None:
        return fetch(job_id)

    async def read() -> None:
        client = await open_async_state(settings)
        items = follow_async(client, job.id, fetch=fetch_async, idle_s=3600)
        async with asyncio.timeout(20), client, aclosing(items):
            async for item in items:
                awaited.append(item)

    awaited = list[Item]()
    reader = listening(state, valkey, job, fetch=fetch, idle_s=3600)
    with ThreadPoolExecutor(1) as threads:
        over = threads.submit(lambda: asyncio.run(read()))
        wait_until(lambda: reader.text == text_of(awaited) == "x", 20, "both have the first piece")
        made = hand.put(claim, [1])
        if cut:  # in one step: nobody is back before the row has ended
            call = batch_calls.accept(batch.id, claim.info.id, claim.attempt, [made])
            assert call.script is not None
            step = valkey.client().pipeline(transaction=True)
            step.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            step.eval(call.script.text, 0, *call.args, *([""] if call.script.timed else ()))
            step.execute()
        else:
            hand.accept(claim, made)
        assert reader.finished() == "x 1"
        over.result(20)
    assert text_of(awaited) == "x 1"
