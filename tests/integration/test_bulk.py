"""BulkRun against a real Valkey and a real store; a thread does what workers would do, in its own order."""

from __future__ import annotations

import io
import json
import random
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends.state import Claim
from gristmill.producer import bulk_input
from gristmill.producer.bulk import BulkRun, Hooks, Progress, batch_id
from gristmill.producer.bulk_input import Rules
from gristmill.producer.bulk_output import Spool
from gristmill.producer.link import Link
from gristmill.producer.settings import ProducerSettings
from gristmill.schemas import keys
from gristmill.schemas.errors import BrokerUnavailable
from gristmill.schemas.events import End
from gristmill.schemas.job import JobState
from gristmill.schemas.result import Choice, ErrorInfo, FinishReason, Result, Timings, Usage

from ..support.valkey import Valkey

WINDOW = 16


@dataclass
class FakeWorkers:
    """Ends queued rows of one batch in random order until told to stop. Every seventh row fails."""

    link: Link
    batch: str
    lines: int
    limit: int = 1_000_000
    ran: list[str] = field(default_factory=list[str])
    most_at_once: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._draw = random.Random(7)

    def __enter__(self) -> FakeWorkers:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self._thread.join()

    def _work(self) -> None:
        ids = [f"{self.batch}.{number}" for number in range(1, self.lines + 1)]
        while not self.stop.wait(0.002) and len(self.ran) < self.limit:
            states = dict(zip(ids, self.link.state.states(ids), strict=True))
            queued = [job_id for job_id, state in states.items() if state is JobState.QUEUED]
            self.most_at_once = max(self.most_at_once, len(queued))
            for job_id in self._draw.sample(queued, k=min(len(queued), 5))[: self.limit - len(self.ran)]:
                self._run(job_id)

    def _run(self, job_id: str) -> None:
        claim = self.link.state.claim(job_id, "w", 2e9)
        assert isinstance(claim, Claim)
        number = int(job_id.split(".")[1])
        failed = number % 7 == 0
        result = Result(
            job_id=job_id,
            model="tiny",
            state=JobState.FAILED if failed else JobState.SUCCEEDED,
            choices=() if failed else (Choice(text=f"answer {number}", finish_reason=FinishReason.STOP),),
            usage=Usage(prompt_tokens=2, completion_tokens=3),
            timings=Timings(
                submitted_at=claim.now,
                started_at=claim.now,
                first_token_at=claim.now + 0.5,
                finished_at=claim.now + 1,
            ),
            error=ErrorInfo(code="context_length_exceeded", message="too long") if failed else None,
        )
        assert self.link.store.put_new(keys.result_object(job_id), result.to_json().encode())
        self.link.state.finish(job_id, End(state=result.state), None)
        self.ran.append(job_id)


@dataclass
class Bench:
    """One input and everything a run over it needs."""

    settings: ProducerSettings
    source: io.BytesIO
    directory: Path

    def __post_init__(self) -> None:
        self.source.seek(0)
        self.rules = Rules(self.settings)
        self.checked = bulk_input.check(self.source, self.rules)
        self.batch = batch_id(self.checked, "tiny", self.rules)
        self.link = Link(self.settings)

    @property
    def lines(self) -> int:
        return self.checked.rows + self.checked.invalid

    def workers(self, limit: int = 1_000_000) -> FakeWorkers:
        return FakeWorkers(self.link, self.batch, self.lines, limit)

    def run(
        self,
        stopping: Callable[[Progress], bool] = lambda _: False,
        watch: Callable[[bool], None] = lambda _: None,
    ) -> tuple[bool, Progress, list[dict[str, Any]], list[dict[str, Any]]]:
        """(complete, progress, output lines, error lines)."""
        with ExitStack() as stack:
            spool = stack.enter_context(Spool(self.directory))
            seen: list[Progress] = []
            run = BulkRun(
                self.link,
                self.settings,
                source=self.source,
                rules=self.rules,
                checked=self.checked,
                batch=self.batch,
                model="tiny",
                spool=spool,
                hooks=Hooks(lambda: stopping(run.progress), watch, seen.append),
            )
            stack.callback(run.close)
            complete = run.run()
            good, bad = (
                [json.loads(line) for line in spool.lines(failed=failed)] for failed in (False, True)
            )
            return complete, run.progress, good, bad


@pytest.fixture
def bench(valkey: Valkey, tmp_path: Path) -> Callable[[bytes], Bench]:
    (tmp_path / "results").mkdir()
    settings = ProducerSettings(
        broker_url=valkey.url,
        results_url=f"file://{tmp_path}/results",
        bulk_window=WINDOW,
        bulk_poll_s=0.005,
        connect_timeout_s=1.0,
        command_timeout_s=1.0,
    )
    return lambda data: Bench(settings, io.BytesIO(data), tmp_path)


def lines(count: int) -> bytes:
    return b"".join(b'{"custom_id": "r%d", "prompt": "p"}\n' % number for number in range(1, count + 1))


def test_rows_come_back_in_input_order_however_they_end(bench: Callable[[bytes], Bench]) -> None:
    it = bench(lines(200))
    with it.workers() as workers:
        complete, progress, good, bad = it.run()
    assert complete
    assert [row["custom_id"] for row in good] == [f"r{n}" for n in range(1, 201) if n % 7]
    assert [row["custom_id"] for row in bad] == [f"r{n}" for n in range(1, 201) if not n % 7]
    assert (progress.succeeded, progress.failed, progress.resumed) == (len(good), len(bad), 0)
    assert progress.completion_tokens == 600
    assert progress.ttft_s(0.5) == pytest.approx(0.5)
    assert workers.most_at_once <= WINDOW, "more rows were in flight than the window allows"
    assert len(workers.ran) == len(set(workers.ran)) == 200


def test_a_second_run_reads_what_the_first_one_finished(bench: Callable[[bytes], Bench]) -> None:
    it = bench(lines(60))
    with it.workers(limit=25):
        complete, first, good, bad = it.run(stopping=lambda progress: progress.ended >= 25)
    assert (complete, first.ended, len(good) + len(bad)) == (False, 25, 25)
    with it.workers() as workers:
        complete, second, good, bad = it.run()
    assert (complete, second.resumed, second.ended) == (True, 25, 60)
    assert len(workers.ran) == 35, "a finished row was run again"
    assert len(good) + len(bad) == 60
    complete, third, _, _ = it.run(watch=lambda _: pytest.fail("nothing is left to watch workers for"))
    assert (complete, third.resumed, third.fresh_tokens) == (True, 60, 0)


def test_invalid_lines_take_their_place_among_the_errors(bench: Callable[[bytes], Bench]) -> None:
    it = bench(lines(3) + b"nonsense\n" + b'{"custom_id": "r2", "prompt": "again"}\n' + b'{"prompt": "p"}\n')
    with it.workers():
        complete, progress, good, bad = it.run()
    assert (complete, progress.rows, progress.invalid) == (True, 4, 2)
    assert [row["custom_id"] for row in good] == ["r1", "r2", "r3", "line-6"]
    assert [(row["custom_id"], row["response"]["body"]["error"]["code"]) for row in bad] == [
        ("line-4", "invalid_json_line"),
        ("r2", "duplicate_custom_id"),
    ]


def test_a_broker_that_goes_away_and_comes_back_costs_no_row(
    bench: Callable[[bytes], Bench], valkey: Valkey
) -> None:
    it = bench(lines(80))
    blip = threading.Event()

    def watch(_: bool) -> None:
        if not blip.is_set() and len(workers.ran) > 20:
            blip.set()
            valkey.freeze()
            threading.Timer(1.5, valkey.thaw).start()

    # The stand-in for workers has its own link: what it waits for is not under test.
    patient = Bench(it.settings.model_copy(update={"command_timeout_s": 20.0}), it.source, it.directory)
    with patient.workers() as workers:
        complete, progress, _, _ = it.run(watch=watch)
    assert blip.is_set()
    assert (complete, progress.ended) == (True, 80)


def test_a_broker_that_lost_everything_ends_the_run_with_the_next_step(
    bench: Callable[[bytes], Bench], valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gristmill.producer.bulk.PATIENCE_S", 0.2)
    it = bench(lines(5))

    def lose(_: bool) -> None:
        valkey.client().flushall()

    with pytest.raises(BrokerUnavailable, match="run again"):
        it.run(watch=lose)


def test_the_same_content_is_the_same_batch_and_anything_else_is_not(bench: Callable[[bytes], Bench]) -> None:
    it = bench(lines(3))
    assert it.batch == bench(lines(3)).batch
    assert it.batch != bench(lines(4)).batch
    assert it.batch != batch_id(it.checked, "other", it.rules)
    assert it.batch != batch_id(it.checked, "tiny", Rules(it.settings, None, {"max_tokens": 3}))
