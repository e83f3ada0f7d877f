"""Ranks in processes of their own: they start, speak and end together, whichever of them ends first."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Failed, Request, Step
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.process import DIED, EngineProcess
from gristmill.schemas.errors import Misconfigured

from ..support.engines import READY_S, tiny_settings
from ..support.waiting import LOADED_S, wait_until


def requests(max_tokens: int) -> list[Request]:
    return [
        Request(id=f"r{n}", prompt_ids=[*range(n + 1)], max_tokens=max_tokens, seed=n, ignore_eos=True)
        for n in range(3)
    ]


def test_two_processes_say_what_one_says_and_end_when_either_is_killed(tmp_path: Path) -> None:
    model = write_tiny(tmp_path)
    direct = Engine(tiny_settings(model))
    for request in requests(20):
        direct.add(request)
    expected: dict[str, list[int]] = {}
    while direct.has_work:
        for output in direct.step():
            expected.setdefault(output.id, []).extend(output.token_ids)

    with EngineProcess(tiny_settings(model, tensor_parallel_size=2)) as engine:
        engine.wait_ready(READY_S)
        engine.add(requests(20))
        said: dict[str, list[int]] = {}
        ended = 0
        while ended < 3:
            report = engine.recv(LOADED_S)
            assert isinstance(report, Step), report
            for output in report.outputs:
                said.setdefault(output.id, []).extend(output.token_ids)
                ended += output.finish is not None
        assert said == expected

        engine.add(requests(500))
        assert isinstance(engine.recv(LOADED_S), Step)
        pids = engine.rank_pids
        os.kill(pids[1], signal.SIGKILL)
        last = engine.recv(LOADED_S)
        while isinstance(last, Step):
            last = engine.recv(LOADED_S)
        assert isinstance(last, Failed)
        assert last.code == DIED
        assert f"lost rank 1 (pid {pids[1]}), which was ended by SIGKILL" in last.message
        gone(pids)

    with EngineProcess(tiny_settings(model, tensor_parallel_size=2)) as engine:
        engine.wait_ready(READY_S)
        pids = engine.rank_pids
        os.kill(pids[0], signal.SIGKILL)
        last = engine.recv(LOADED_S)
        assert isinstance(last, Failed)
        assert last.message.startswith(f"the engine (pid {pids[0]}) was ended by SIGKILL")
        gone(pids)


def gone(pids: list[int]) -> None:
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10, "no rank is left")


def test_a_model_that_cannot_be_cut_is_refused_at_start_up(tmp_path: Path) -> None:
    model = write_tiny(tmp_path, num_attention_heads=1, num_key_value_heads=1)
    with EngineProcess(tiny_settings(model, tensor_parallel_size=2)) as engine:
        with pytest.raises(
            Misconfigured, match=r"tensor_parallel_size is 2, .* 1 attention heads in 1 groups"
        ):
            engine.wait_ready(READY_S)
        pids = engine.rank_pids
    gone(pids)
