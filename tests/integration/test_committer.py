"""Finished jobs whose results cannot be stored yet: a real state server, a directory that comes and goes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from gristmill.backends.sink import ResultSink
from gristmill.backends.state import State
from gristmill.backends.store import FileStore
from gristmill.schemas import keys
from gristmill.schemas.job import JobState
from gristmill.schemas.result import Choice, FinishReason, Result
from gristmill.worker.committer import AT_ONCE, Committer
from gristmill.worker.metrics import Metrics
from gristmill.worker.spool import remove_dead

from ..support.journal import Attempt, make_job
from ..support.valkey import Valkey
from ..support.waiting import wait_until

Commit = Future[tuple[Result, bool] | None]


class Store(FileStore):
    """A directory that can be away, as a disk that is not mounted is. Notes who tried."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        super().__init__(root)
        self.tries: list[str] = []
        self.answers = Event()
        self.answers.set()

    def put_new(self, name: str, body: bytes) -> bool:
        self.tries.append(name)
        self.answers.wait(10)
        return super().put_new(name, body)

    def go(self) -> None:
        self.root.rename(self.root.with_suffix(".away"))

    def come_back(self) -> None:
        self.root.with_suffix(".away").rename(self.root)


class Bench:
    """A committer, and threads that bring it results."""

    def __init__(self, state: State, home: Path, **bounds: Any) -> None:
        self.state, self.home = state, home
        self.store = Store(home / "results")
        self.metrics = Metrics("m")
        bounds = {"max_results": 100, "max_bytes": 10**7, "pause_max_s": 0.2} | bounds
        self.committer = Committer(
            ResultSink(state, self.store, inline_bytes=100),
            self.metrics,
            home=home,
            worker_id="w1",
            **bounds,
        )
        self.threads = ThreadPoolExecutor(100)

    def finish(self, count: int = 1, text: str = "some text") -> list[Commit]:
        return [self.threads.submit(self.committer.commit, self.parcel(text)) for _ in range(count)]

    def parcel(self, text: str) -> Any:
        attempt = Attempt.begin(self.state, make_job())
        choices = (Choice(text=text, finish_reason=FinishReason.STOP),)
        return self.committer.take(attempt.result().model_copy(update={"choices": choices}))

    def waits(self, results: int) -> None:
        wait_until(
            lambda: self.committer.failure and self.committer.waiting == results,
            10,
            f"{results} results wait",
        )

    def files(self) -> list[Path]:
        return list((self.home / "spool").glob("*/*"))


@pytest.fixture
def bench(state: State, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Its bounds may be given as an indirect parameter."""
    bench = Bench(state, tmp_path, **getattr(request, "param", {}))
    yield bench
    bench.committer.close()
    bench.threads.shutdown()
    bench.committer.spool.close()


def test_results_wait_for_a_store_that_is_away_and_then_all_go_at_once(bench: Bench) -> None:
    """Each used to try for itself, every five seconds: hundreds took minutes after the store was back."""
    bench.store.go()
    commits = bench.finish(60)
    bench.waits(60)
    assert not any(commit.done() for commit in commits)
    bench.store.come_back()
    done = [commit.result(10) for commit in commits]
    assert all(pair is not None and pair[1] for pair in done)
    assert bench.committer.waiting == 0
    assert bench.committer.failure is None
    for pair in done:
        assert pair is not None
        status = bench.state.status(pair[0].job_id)
        assert status is not None
        assert status.state is JobState.SUCCEEDED


def test_of_those_who_wait_one_asks_for_all(bench: Bench) -> None:
    bench.store.go()
    commits = bench.finish()
    bench.waits(1)
    (asked,) = set(bench.store.tries)
    commits += bench.finish(30)
    bench.waits(31)
    tries = len(bench.store.tries)
    wait_until(lambda: len(bench.store.tries) > tries + 3, 10, "it is asked again and again")
    assert set(bench.store.tries) == {asked}
    bench.store.come_back()
    assert all(commit.result(10) for commit in commits)


def test_a_large_result_waits_in_a_file_that_only_its_owner_reads(bench: Bench) -> None:
    text = "word " * 40_000
    bench.store.go()
    (commit,) = bench.finish(text=text)
    (path,) = wait_until(bench.files, 10, "it is in a file")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    bench.store.come_back()
    done = commit.result(10)
    assert done is not None
    stored = bench.store.get(keys.result_object(done[0].job_id))
    assert stored is not None
    assert Result.from_json(stored).text == text
    assert not bench.files()


def test_without_a_disk_for_the_spool_results_wait_in_memory(bench: Bench) -> None:
    (bench.home / "spool").write_text("no directory can be made here")
    bench.store.go()
    (commit,) = bench.finish(text="word " * 40_000)
    bench.waits(1)
    bench.store.come_back()
    assert commit.result(10)


@pytest.mark.parametrize(
    ("bench", "setting"),
    [({"max_results": 3}, "GRISTMILL_SPOOL_MAX_RESULTS"), ({"max_bytes": 600}, "GRISTMILL_SPOOL_MAX_BYTES")],
    indirect=["bench"],
)
def test_at_the_bound_it_says_so_and_why(
    bench: Bench, caplog: pytest.LogCaptureFixture, setting: str
) -> None:
    bench.store.go()
    commits = bench.finish()
    bench.waits(1)
    assert bench.committer.trouble is None, "there is room for more"
    commits += bench.finish(2)
    bench.waits(3)
    trouble = bench.committer.trouble
    assert trouble is not None
    assert setting in trouble
    assert "does not exist" in trouble, "the store's own words"
    assert bench.metrics.registry.get_sample_value("gristmill_spool_results", {"model_name": "m"}) == 3
    size = bench.metrics.registry.get_sample_value("gristmill_spool_bytes", {"model_name": "m"})
    assert size is not None
    assert size > 600
    assert [r.message for r in caplog.records].count("spool.full") == 1
    bench.store.come_back()
    assert all(commit.result(10) for commit in commits)
    assert bench.committer.trouble is None
    assert bench.metrics.registry.get_sample_value("gristmill_spool_bytes", {"model_name": "m"}) == 0


def test_a_state_server_that_is_away_is_trouble_at_once(bench: Bench, valkey: Valkey) -> None:
    """The object is stored by then. It is the same result that is met on the second try, not another's."""
    parcel = bench.parcel("some text")
    valkey.kill()
    commit = bench.threads.submit(bench.committer.commit, parcel)
    trouble = wait_until(lambda: bench.committer.trouble, 10, "it is noticed")
    assert "state server" in trouble
    valkey.restart()
    done = commit.result(15)
    assert done is not None
    assert done[1]


def test_closing_lets_those_go_who_wait_and_nobody_else(bench: Bench) -> None:
    bench.store.go()
    (waiting,) = bench.finish()
    bench.waits(1)
    bench.committer.close()
    assert waiting.result(5) is None
    assert bench.committer.waiting == 0


def test_who_waits_for_a_place_at_the_end_is_let_go_when_the_store_goes_away_then(bench: Bench) -> None:
    """They were told of a place that came free, and no place ever did."""
    bench.store.answers.clear()
    commits = bench.finish(AT_ONCE + 8)
    wait_until(lambda: len(bench.store.tries) == AT_ONCE, 10, "all places are taken")
    bench.committer.close()
    bench.store.go()
    bench.store.answers.set()
    assert [commit.result(10) for commit in commits] == [None] * len(commits)


def test_while_nothing_is_wrong_results_are_stored_even_at_the_end(bench: Bench) -> None:
    """The last tokens of a drain complete a job or two, and those are acknowledged."""
    bench.committer.close()
    (commit,) = bench.finish()
    assert commit.result(5)


def test_a_worker_that_starts_removes_the_spools_of_dead_ones(bench: Bench) -> None:
    dead = bench.home / "spool" / "host-1-abc"
    dead.mkdir(parents=True)
    (dead / "job_1.json").write_text("{}")
    bench.store.go()
    bench.finish(text="word " * 40_000)
    wait_until(lambda: len(bench.files()) == 2, 10, "a living one's lies there, too")
    assert remove_dead(bench.home) == 1
    (living,) = bench.files()
    assert living.parent.name == "w1"
