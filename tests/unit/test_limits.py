"""The limits that users of TGI know: each is read, each is kept, and a refusal says which and how much."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Request
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.settings import EngineSettings
from gristmill.producer.cli import cli as gristmill
from gristmill.schemas.errors import BadInput, Misconfigured
from gristmill.schemas.sampling import SamplingParams
from gristmill.worker import intake, wishes
from gristmill.worker.capacity import Held, claimable, max_places
from gristmill.worker.cli import cli as gristmill_worker
from gristmill.worker.settings import WorkerSettings, load_worker_settings

from ..support.journal import make_job
from ..support.played import PlayedEngine

LIMITS: dict[str, float] = {
    "max_concurrent_requests": 9,
    "max_input_tokens": 20,
    "max_total_tokens": 64,
    "max_batch_prefill_tokens": 512,
    "max_batch_total_tokens": 48,
    "max_best_of": 2,
    "max_stop_sequences": 3,
    "max_top_n_tokens": 5,
    "waiting_served_ratio": 1.2,
    "max_waiting_tokens": 7,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("limited"))


def engine(model: Path, **knobs: Any) -> Engine:
    return Engine(EngineSettings(model=str(model), attention="torch", num_threads=1, **knobs))


@pytest.mark.parametrize("prefix", ["GRISTMILL_", ""])
@pytest.mark.parametrize(("name", "value"), LIMITS.items())
def test_a_limit_is_read_under_our_prefix_and_under_its_bare_name(
    monkeypatch: pytest.MonkeyPatch, prefix: str, name: str, value: float
) -> None:
    monkeypatch.setenv(prefix + name.upper(), str(value))
    assert getattr(load_worker_settings(model="m"), name) == value


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_is_a_flag_with_a_word_of_help_wherever_a_worker_starts(name: str) -> None:
    for command in (gristmill_worker, gristmill):
        for verb in ("run", "up") if command is gristmill else ("run",):
            found = command.get_command(click.Context(command), verb)
            assert found is not None
            option = next(param for param in found.params if param.name == name)
            assert isinstance(option, click.Option)
            assert option.help


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(BadInput) as caught:
        call()
    return caught.value.message


def _wishes(**asked: Any) -> Callable[[Path], object]:
    settings = WorkerSettings(
        model="m",
        **{name: LIMITS[name] for name in ("max_best_of", "max_stop_sequences", "max_top_n_tokens")},
    )
    return lambda _: wishes.check_limits(SamplingParams(**asked), settings)


def _budget(prompt: int, **knobs: Any) -> Callable[[Path], object]:
    """A job of 50 tokens of output for a worker whose engine has these knobs."""
    job = make_job(sampling={"max_tokens": 50})

    def call(model: Path) -> object:
        most = knobs.pop("max_input_tokens", None)
        info = engine(model, **knobs).info
        limit, knob = info.max_model_len, info.length_knob
        return intake.budget(job, prompt, limit, 1024, max_input_tokens=most, knob=knob)

    return call


def _add(prompt: int, **knobs: Any) -> Callable[[Path], object]:
    request = Request(id="a", prompt_ids=[1] * prompt, max_tokens=1)
    return lambda model: engine(model, **knobs).add(request)


@pytest.mark.parametrize(
    ("name", "asked", "call"),
    [
        ("max_input_tokens", 21, _budget(21, max_input_tokens=20)),
        ("max_total_tokens", 65, _budget(15, max_total_tokens=64)),
        ("max_total_tokens", 64, _add(64, max_total_tokens=64)),
        ("max_batch_total_tokens", 60, _budget(10, max_batch_total_tokens=48)),
        ("max_batch_total_tokens", 48, _add(48, max_batch_total_tokens=48)),
        ("max_best_of", 3, _wishes(n=3)),
        ("max_best_of", 4, _wishes(best_of=4)),
        ("max_stop_sequences", 4, _wishes(stop=("a", "b", "c", "d"))),
        ("max_top_n_tokens", 6, _wishes(logprobs=6)),
        ("max_top_n_tokens", 7, _wishes(prompt_logprobs=7)),
    ],
)
def test_a_refusal_names_the_limit_its_value_what_was_asked_and_the_knob(
    model: Path, name: str, asked: int, call: Callable[[Path], object]
) -> None:
    said = refused(lambda: call(model))
    flag, variable = f"--{name.replace('_', '-')}", f"GRISTMILL_{name.upper()}"
    for word in (f"({name})", f" {LIMITS[name]} ", f" {asked} ", flag, variable):
        assert word in said, said


def test_what_just_fits_is_taken(model: Path) -> None:
    job = make_job(sampling={"max_tokens": 44})
    assert intake.budget(job, 20, 64, 1024, max_input_tokens=20) == 44
    whole = engine(model, max_total_tokens=64, max_batch_total_tokens=64)
    whole.add(Request(id="a", prompt_ids=[1] * 63, max_tokens=1))
    while whole.has_work:
        ended = whole.step()
    assert ended[0].finish == "length"


def test_a_prompt_that_the_model_itself_cannot_hold_is_no_knobs_fault(model: Path) -> None:
    said = refused(lambda: engine(model).add(Request(id="a", prompt_ids=[1] * 512, max_tokens=1)))
    assert "use a model with a longer context" in said
    assert "GRISTMILL" not in said


def test_prompts_as_long_as_the_whole_are_refused_at_the_start() -> None:
    with pytest.raises(
        Misconfigured, match=r"max_input_tokens \(64\) must be less than max_total_tokens \(64\)"
    ):
        load_worker_settings(model="m", max_input_tokens=64, max_total_tokens=64)


def test_a_worker_takes_on_no_more_than_it_is_allowed() -> None:
    info = PlayedEngine.info
    mine, others = [Held(1, 16, started=True)] * 9, [Held(2, 16, started=True)] * 9
    assert len(claimable(mine, info, None, most=9)) == 1, "normal work leaves room for interactive only"
    assert len(claimable(mine[1:], info, None, most=9)) == 3
    assert len(claimable(others, info, None, most=9)) == 2, "what makes way is no obstacle"
    assert max_places(info, most=1_000) == max_places(info)
