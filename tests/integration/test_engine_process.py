"""The engine in its own process: what goes in comes out in order, and every way it can end is seen."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Failed, Output, Request, Step
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.process import EngineProcess
from gristmill.engine.settings import EngineSettings
from gristmill.schemas.errors import EngineUnavailable, InvalidRequest, ModelNotFound

from ..support.engines import READY_S, tiny_settings
from ..support.waiting import LOADED_S, wait_until


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    return tiny_settings(write_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def engine(tiny: EngineSettings) -> Iterator[EngineProcess]:
    """One that lives through the tests that leave it idle."""
    with EngineProcess(tiny) as engine:
        engine.wait_ready(READY_S)
        yield engine
    assert not engine.alive


def request(name: str, *, max_tokens: int = 8, prompt: int = 5, **knobs: object) -> Request:
    ids = [(7 * i + len(name)) % 256 for i in range(prompt)]
    return Request(id=name, prompt_ids=ids, max_tokens=max_tokens, ignore_eos=True, seed=5, **knobs)  # type: ignore[arg-type]


def collect(
    engine: EngineProcess, ids: set[str], report: Step | None = None, timeout_s: float = 60.0
) -> dict[str, list[Output]]:
    """Everything up to the end of each of ``ids``, from ``report`` on if that was received already."""
    outputs: dict[str, list[Output]] = {name: [] for name in ids}
    deadline = time.monotonic() + timeout_s
    while ids:
        received = report or engine.recv(deadline - time.monotonic())
        report = None
        assert isinstance(received, Step), received
        for output in received.outputs:
            outputs[output.id].append(output)
            if output.finish:
                ids = ids - {output.id}
    return outputs


def tokens(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def test_sigterm_is_for_the_consumer_which_drains_with_it(engine: EngineProcess) -> None:
    """systemd sends it to all processes of a service: the engine was gone before the drain began."""
    assert engine.pid
    os.kill(engine.pid, signal.SIGTERM)
    engine.add([request("after", max_tokens=4)])
    assert len(tokens(collect(engine, {"after"})["after"])) == 4


def test_many_requests_come_out_as_the_synchronous_engine_would_have_them(
    engine: EngineProcess, tiny: EngineSettings
) -> None:
    requests = [request(f"r{i}", prompt=1 + i % 60, max_tokens=1 + i % 20) for i in range(100)]
    for at in range(0, 100, 7):
        engine.add(requests[at : at + 7])
    outputs = collect(engine, {r.id for r in requests})
    direct = Engine(tiny)
    for r in requests:
        direct.add(r)
    expected: dict[str, list[int]] = {r.id: [] for r in requests}
    while direct.has_work:
        for output in direct.step():
            expected[output.id] += output.token_ids
    direct.check()
    assert {name: tokens(some) for name, some in outputs.items()} == expected
    assert all([o.finish for o in some][-1] == "length" for some in outputs.values())
    assert all(o.finish is None for some in outputs.values() for o in some[:-1])


def test_a_request_that_cannot_run_is_answered_and_the_others_do_not_notice(
    engine: EngineProcess,
) -> None:
    bad = Request(id="bad", prompt_ids=[1, 99_999], max_tokens=4)
    long = request("long", prompt=600)
    engine.add([request("a"), bad, long, request("b")])
    outputs = collect(engine, {"a", "bad", "long", "b"})
    assert len(tokens(outputs["a"])) == len(tokens(outputs["b"])) == 8
    (answer,) = outputs["bad"]
    assert (answer.finish, answer.error_code) == ("error", "invalid_request")
    assert answer.error == "token id 99999 in prompt_ids is not below 288"
    assert outputs["long"][0].error_code == "context_length_exceeded"


def test_an_aborted_request_ends_once_and_frees_its_blocks(engine: EngineProcess) -> None:
    engine.add([request("long", max_tokens=500), request("short", max_tokens=40)])
    first = engine.recv(10)
    assert isinstance(first, Step)
    engine.abort(["long", "unknown"])
    outputs = collect(engine, {"long", "short"}, first)
    assert [o.finish for o in outputs["long"] if o.finish] == ["abort"]
    assert len(tokens(outputs["long"])) < 500
    assert len(tokens(outputs["short"])) == 40
    engine.add([request("long", max_tokens=2)])  # the name is free again
    collect(engine, {"long"})
    engine.abort(["long"])  # too late: nothing to end
    last = engine.recv(10)
    assert isinstance(last, Step)
    assert last.stats.free_blocks == last.stats.total_blocks
    assert last.outputs == []


def test_a_name_that_is_running_is_refused_before_anything_is_sent(
    engine: EngineProcess,
) -> None:
    engine.add([request("a", max_tokens=100)])
    with pytest.raises(InvalidRequest, match="a"):
        engine.add([request("b"), request("a")])
    with pytest.raises(InvalidRequest, match="c"):
        engine.add([request("c"), request("c")])
    outputs = collect(engine, {"a"})
    assert set(outputs) == {"a"}


def test_a_killed_engine_is_the_last_word(tiny: EngineSettings) -> None:
    engine = EngineProcess(tiny)
    engine.start()
    engine.wait_ready(READY_S)
    engine.add([request("a", max_tokens=400)])
    assert isinstance(engine.recv(10), Step)
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    report = engine.recv(LOADED_S)
    while isinstance(report, Step):
        report = engine.recv(LOADED_S)
    assert isinstance(report, Failed)
    assert report.code == "engine_died"
    assert report.message.startswith(
        f"the engine (pid {pid}) was ended by SIGKILL; the kernel does that when memory"
    )
    assert engine.recv(0) == report
    assert not engine.alive
    with pytest.raises(EngineUnavailable):
        engine.add([request("b")])
    with pytest.raises(EngineUnavailable):
        engine.abort(["a"])
    engine.stop()


def test_an_engine_that_takes_no_more_commands_is_stopped_all_the_same(tiny: EngineSettings) -> None:
    """Frozen, and its socket full to the brim: a send of Stop would have waited for ever."""
    engine = EngineProcess(tiny)
    engine.start()
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)
    with suppress(BlockingIOError):
        while True:
            engine._sock.send(bytes(4096), socket.MSG_DONTWAIT)  # no public call fills it that exactly
    stopping = threading.Thread(target=engine.stop, args=(0.2,), daemon=True)
    stopping.start()
    stopping.join(10)
    assert not stopping.is_alive()
    assert not engine.alive


def test_a_model_that_is_not_there_is_told_as_such(tiny: EngineSettings, tmp_path: Path) -> None:
    engine = EngineProcess(tiny.model_copy(update={"model": str(tmp_path / "nothing")}))
    engine.start()
    with pytest.raises(ModelNotFound):
        engine.wait_ready(READY_S)
    assert isinstance(engine.recv(1), Failed)
    wait_until(lambda: not engine.alive, 5, "the engine leaves after its last word")
    engine.stop()


def test_waiting_for_ready_gives_up_in_time_and_may_be_repeated(tiny: EngineSettings) -> None:
    with EngineProcess(tiny) as engine:
        with pytest.raises(EngineUnavailable, match=r"not ready after 0\.01 s"):
            engine.wait_ready(0.01)
        assert engine.wait_ready(READY_S).vocab_size == 288


def test_an_idle_engine_uses_no_processor_and_picks_up_at_once(engine: EngineProcess) -> None:
    pid = engine.pid
    assert pid is not None
    engine.add([request("warm")])
    collect(engine, {"warm"})
    before = cpu_s(pid)
    assert engine.recv(1.0) is None
    assert cpu_s(pid) - before < 0.1
    overheads: list[float] = []
    for i in range(20):
        sent_at = time.perf_counter()
        engine.add([request(f"r{i}", max_tokens=1)])
        report = engine.recv(10)
        assert isinstance(report, Step)
        overheads.append(time.perf_counter() - sent_at - report.stats.step_s)
    # Under a millisecond on a machine of our own; the best of twenty forgives a busy one.
    assert min(overheads) < 0.003, overheads


def test_an_engine_whose_consumer_dies_goes_with_it(tiny: EngineSettings) -> None:
    code = (
        "import sys, time\n"
        "from gristmill.engine.process import EngineProcess\n"
        "from gristmill.engine.settings import EngineSettings\n"
        "engine = EngineProcess(EngineSettings.model_validate_json(sys.argv[1]))\n"
        "engine.start(); engine.wait_ready(60)\n"
        "print(engine.pid, flush=True); time.sleep(60)\n"
    )
    consumer = subprocess.Popen([sys.executable, "-c", code, tiny.model_dump_json()], stdout=subprocess.PIPE)
    assert consumer.stdout
    pid = int(consumer.stdout.readline())
    consumer.kill()
    consumer.wait()
    consumer.stdout.close()
    wait_until(lambda: not running(pid), 5, "the engine ends after its consumer was killed")


def test_a_terminals_interrupt_does_not_reach_the_engine(engine: EngineProcess) -> None:
    assert engine.pid is not None
    assert os.getsid(engine.pid) != os.getsid(0)


def test_a_consumer_that_does_not_read_stops_the_engine_and_loses_nothing(
    engine: EngineProcess,
) -> None:
    names = {f"r{i}" for i in range(16)}
    engine.add([request(name, max_tokens=300) for name in sorted(names)])
    pid = engine.pid
    assert pid is not None

    spent = [-1.0]

    def stalled() -> bool:
        spent.append(cpu_s(pid))
        return spent[-1] == spent[-2]

    wait_until(stalled, 60, "the engine stops stepping once the pipe is full", poll_s=0.3)
    said: Counter[str] = Counter()
    running_still, longest_s = set(names), 0.0
    while running_still:
        step = engine.recv(60)
        assert isinstance(step, Step), step
        longest_s = max(longest_s, step.stats.report_s)
        for output in step.outputs:
            said[output.id] += len(output.token_ids)
            if output.finish:
                running_still.remove(output.id)
    assert dict(said) == dict.fromkeys(names, 300)
    assert longest_s > 0.3, "it says how long it was kept waiting"


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
