"""The worker's side of the engine process: whatever happens to that, every request goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
from gristmill.engine.messages import Output, Request, Stats, Step
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.settings import EngineSettings
from gristmill.worker.engine_client import EngineClient
from gristmill.worker.trials import Verdict

from ..support.waiting import wait_until

READY_S = 60.0


class Jobs:
    """A listener that knows every request, and collects its tokens."""

    def __init__(self) -> None:
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, str] = {}
        self.resumed: list[set[str]] = []
        self.gone = ""
        self.client: EngineClient
        self.crashes: list[tuple[str, Verdict]] = []
        self.armed: list[str] = []
        self.unrecorded: set[str] = set()
        self.late: list[Request] = []

    def on_step(self, outputs: list[Output], _stats: Stats, _now: float) -> None:
        for output in outputs:
            self.tokens.setdefault(output.id, []).extend(output.token_ids)
            if output.finish is not None:
                self.ended[output.id] = output.finish

    def on_crash(self, reason: str, verdict: Verdict, _now: float) -> set[str]:
        self.crashes.append((reason, verdict))
        for request in self.late:
            self.client.submit(request)
        return set()

    def arm(self, request_id: str) -> bool:
        if request_id == "over":
            return False
        self.armed.append(request_id)
        threading.Thread(target=self.client.armed, args=[request_id]).start()
        return True

    def awaits_record(self, request_id: str) -> bool:
        return request_id in self.unrecorded

    def resume(self, request_ids: set[str]) -> list[Request]:
        self.resumed.append(request_ids)
        return [self.request(i, self.tokens.get(i, [])) for i in sorted(request_ids) if i != "giant"]

    def on_engine_gone(self, reason: str) -> None:
        self.gone = reason

    def request(self, name: str, so_far: list[int]) -> Request:
        return Request(
            id=name, prompt_ids=[1, 2, 3], output_ids=so_far, max_tokens=400, ignore_eos=True, seed=5
        )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    model: Path = write_tiny(tmp_path_factory.mktemp("tiny"))
    return EngineSettings(
        model=str(model), dtype="float32", attention="torch", num_threads=1, max_batch_total_tokens=2048
    )


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@contextmanager
def client_of(tiny: EngineSettings, jobs: Jobs, **knobs: float) -> Generator[EngineClient]:
    client = EngineClient(tiny, jobs, start_timeout_s=READY_S, **{"stall_s": 60.0, "restarts": 0} | knobs)  # type: ignore[arg-type]
    jobs.client = client
    client.launch()
    client.wait_ready()
    try:
        yield client
    finally:
        client.stop()


def engine_pid(client: EngineClient) -> int:
    process = client._process
    assert process is not None
    assert process.pid is not None
    return process.pid


def test_a_hung_engine_is_replaced_and_frees_who_waits_for_it(tiny: EngineSettings, jobs: Jobs) -> None:
    """Its socket fills up, and whoever sends into it holds the lock that everybody else needs."""
    with client_of(tiny, jobs, stall_s=2.0, restarts=1) as client:
        client.submit(jobs.request("a", []))
        wait_until(lambda: jobs.tokens.get("a"), 20, "the first token")
        os.kill(engine_pid(client), signal.SIGSTOP)
        client.submit(jobs.request("b", []))
        giant = Request(id="giant", prompt_ids=[1] * 500_000, max_tokens=1)
        stuck = threading.Thread(target=client.submit, args=[giant], daemon=True)
        stuck.start()
        wait_until(lambda: jobs.ended.keys() == {"a", "b"}, READY_S, "the next engine ends both jobs")
        stuck.join(5)
        assert not stuck.is_alive()
        assert {len(jobs.tokens[name]) for name in "ab"} == {400}, "none is repeated or missing"
        assert jobs.crashes[0][1].suspects == set(), (
            "one had made tokens, and the others it had not even read"
        )
        assert jobs.armed == []
        assert jobs.resumed == [{"giant", "a", "b"}]
        assert not jobs.gone


def test_an_engine_that_took_nothing_may_have_died_of_what_it_was_to_take(
    tiny: EngineSettings, jobs: Jobs
) -> None:
    """Else a request that kills whoever reads it would be nobody's fault, engine after engine."""
    with client_of(tiny, jobs, stall_s=1.0, restarts=1) as client:
        os.kill(engine_pid(client), signal.SIGSTOP)
        client.submit(jobs.request("a", []))
        wait_until(lambda: jobs.ended.get("a") == "length", READY_S, "the next engine ends the job")
        assert jobs.crashes[0][1].suspects == {"a"}
        assert jobs.armed == ["a"], "alone, to see"


def test_a_request_that_comes_while_there_is_no_engine_is_given_to_the_next_one(
    tiny: EngineSettings, jobs: Jobs
) -> None:
    """It counted as given, and waited until the stall of an idle engine was blamed on it."""
    with client_of(tiny, jobs, restarts=1) as client:
        jobs.late.append(jobs.request("late", []))
        client.submit(jobs.request("a", []))
        wait_until(lambda: jobs.tokens.get("a"), 20, "the first token")
        os.kill(engine_pid(client), signal.SIGKILL)
        wait_until(lambda: jobs.ended.keys() == {"a", "late"}, READY_S, "the next engine ends both")
        assert jobs.crashes[0][1].suspects == set()
        assert len(jobs.tokens["late"]) == 400


def test_a_suspect_that_ended_just_before_it_was_submitted_holds_nobody_up(
    tiny: EngineSettings, jobs: Jobs
) -> None:
    """Cancelled between the two: the worker waited for its turn alone, which never came."""
    with client_of(tiny, jobs) as client:
        client.submit(jobs.request("over", []), suspect=True)
        client.submit(jobs.request("b", []))
        wait_until(lambda: jobs.ended.get("b") == "length", READY_S, "the next one ends")
        assert not client.on_trial


class ScriptedProcess:
    """An engine process whose steps the test writes: orders of events that a real one takes by chance."""

    untaken: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.inside: set[str] = set()
        self.told_to_leave: set[str] = set()

    def add(self, requests: list[Request]) -> None:
        self.inside.update(request.id for request in requests)

    def abort(self, ids: set[str]) -> None:
        self.told_to_leave |= ids


@pytest.fixture
def scripted(tiny: EngineSettings, jobs: Jobs) -> EngineClient:
    client = jobs.client = EngineClient(tiny, jobs, start_timeout_s=READY_S, stall_s=60.0, restarts=0)
    client._process = ScriptedProcess()  # type: ignore[assignment]
    return client


def step(client: EngineClient, *outputs: Output) -> None:
    stats = Stats(running=1, waiting=0, free_blocks=9, total_blocks=9, preemptions=0, step_s=0.01, tokens=1)
    client._take(Step(outputs=list(outputs), stats=stats))


def inside(client: EngineClient) -> set[str]:
    return client._process.inside  # type: ignore[union-attr]


def alone(client: EngineClient, jobs: Jobs, name: str) -> None:
    client.submit(jobs.request(name, []), suspect=True)
    wait_until(lambda: name in inside(client), 5, "its trial is on record, and begins")


def test_a_suspect_that_ends_by_itself_as_it_should_leave_lets_the_next_one_in(
    scripted: EngineClient, jobs: Jobs
) -> None:
    """It had been told to; nobody said that it had left, and everybody waited for that, for ever."""
    alone(scripted, jobs, "a")
    scripted.submit(jobs.request("b", []), suspect=True)
    step(scripted, Output(id="a", token_ids=[7]))
    assert scripted._process.told_to_leave == {"a"}  # type: ignore[union-attr]
    assert inside(scripted) == {"a"}
    step(scripted, Output(id="a", token_ids=[8], finish="length"))
    wait_until(lambda: "b" in inside(scripted), 5, "its turn has come")
    assert jobs.armed == ["a", "b"]


@pytest.mark.parametrize("suspect", [False, True])
@pytest.mark.parametrize("finish", [None, "length"])
def test_nobody_runs_after_a_trial_before_the_record_says_that_its_suspect_lived(
    scripted: EngineClient, jobs: Jobs, suspect: bool, finish: Literal["length"] | None
) -> None:
    """The next one killed the whole worker: its log still said that the other was running alone."""
    alone(scripted, jobs, "a")
    scripted.submit(jobs.request("b", []), suspect=suspect)
    jobs.unrecorded.add("a")
    step(scripted, Output(id="a", token_ids=[7], finish=finish))
    if finish is None and suspect:
        step(scripted, Output(id="a", token_ids=[], finish="abort"))
    scripted.submit(jobs.request("c", []))
    scripted.recorded()
    assert jobs.armed == ["a"]
    assert inside(scripted) == {"a"}, "b and c wait"
    jobs.unrecorded.clear()
    scripted.recorded()
    wait_until(lambda: "b" in inside(scripted), 5, "its turn has come")
    assert ("c" in inside(scripted)) is not suspect


def test_a_jobs_choices_are_tried_together_and_end_one_by_one(scripted: EngineClient, jobs: Jobs) -> None:
    names = [f"a@1#{choice}" for choice in range(3)]
    scripted.submit(*(jobs.request(name, []) for name in names), suspect=True)
    wait_until(lambda: inside(scripted) == {*names}, 5, "they run, and nobody beside them")
    scripted.submit(jobs.request("b@1", []))
    assert jobs.armed == ["a@1"]
    step(scripted, Output(id=names[0], token_ids=[], finish="length"))
    assert "b@1" not in inside(scripted), "no token yet"
    step(scripted, Output(id=names[1], token_ids=[7]))
    wait_until(lambda: "b@1" in inside(scripted), 5, "the attempt has lived")
    scripted.abort(names[1])
    assert scripted._process.told_to_leave == {names[1]}  # type: ignore[union-attr]
    scripted.abort("a@1")
    assert scripted._process.told_to_leave == {*names[1:]}  # type: ignore[union-attr]
    verdict = scripted._trials.crashed({"b@1"})
    assert verdict.suspects == {"b@1"}


def test_an_engine_that_may_not_be_started_again_is_given_up(tiny: EngineSettings, jobs: Jobs) -> None:
    with client_of(tiny, jobs, restarts=0) as client:
        os.kill(engine_pid(client), signal.SIGKILL)
        wait_until(lambda: jobs.gone, 10, "it is given up")
        assert not client.alive
        client.submit(jobs.request("late", []))  # nobody takes it, and nobody is blocked
        client.abort("late")
