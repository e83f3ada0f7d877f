"""Guesses change when tokens come out, and never which."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Output, Processors, Request
from gristmill.engine.settings import EngineSettings
from gristmill.engine.speculation import STALE_STEPS, StepTimes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LOOP = [5, 6, 7, 8, 9, 10]


class AlwaysWorthIt(StepTimes):
    """Any step takes a second, so that every guess is checked."""

    def expect(self, tokens: int) -> float | None:
        return 1.0


def make_engine(model: Path, **more: object) -> Engine:
    engine = Engine(
        EngineSettings.model_validate(
            {"model": str(model), "dtype": "float32", "kv_block_size": 16}
            | {"max_num_seqs": 8, "max_batch_prefill_tokens": 64, "max_batch_total_tokens": 512}
            | more
        )
    )
    if engine._speculation:
        engine._speculation.times = AlwaysWorthIt()
    return engine


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Engine:
    return make_engine(tiny, speculate=0)


@pytest.fixture(scope="module")
def guessing(tiny: Path) -> Engine:
    return make_engine(tiny)


def run(engine: Engine, requests: list[Request]) -> tuple[dict[str, list[Output]], int]:
    """What came out for each, and in how many steps."""
    for request in requests:
        engine.add(request)
    said: dict[str, list[Output]] = {request.id: [] for request in requests}
    steps = 0
    while engine.has_work:
        steps += 1
        for output in engine.step():
            said[output.id].append(output)
        engine.check()
    return said, steps


def in_all(outputs: list[Output]) -> tuple[list[int], object, object, object]:
    """Everything but the steps it came in."""
    tokens = [token for output in outputs for token in output.token_ids]
    last = outputs[-1]
    return tokens, last.finish, last.stop_token_id, last.error_code


PROMPTS = st.one_of(
    st.lists(st.integers(0, 9), min_size=1, max_size=40),
    st.integers(1, 8).map(lambda times: LOOP * times),
)


@st.composite
def request(draw: st.DrawFn) -> Request:
    max_tokens = draw(st.integers(1, 24))
    return Request(
        id=draw(st.uuids()).hex,
        prompt_ids=draw(PROMPTS),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        temperature=draw(st.sampled_from([0.0, 0.0, 0.05, 1.0])),
        top_k=draw(st.sampled_from([0, 2])),
        seed=draw(st.integers(0, 3)),
        ignore_eos=draw(st.booleans()),
        stop_token_ids=draw(st.lists(st.integers(0, 500), max_size=20)),
        group=draw(st.sampled_from(["", "bulk", "bulk"])),
        processors=draw(st.sampled_from([None, None, Processors(repetition_penalty=1.3)])),
    )


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(request(), min_size=1, max_size=6, unique_by=lambda one: one.id))
def test_what_comes_out_is_what_comes_out_without_guesses(
    plain: Engine, guessing: Engine, requests: list[Request]
) -> None:
    """Twice, so that the second time finished texts of the group make most guesses right."""
    expected, _ = run(plain, requests)
    for _ in range(2):
        said, _ = run(guessing, requests)
        assert {name: in_all(outputs) for name, outputs in said.items()} == {
            name: in_all(outputs) for name, outputs in expected.items()
        }


def test_a_row_learns_from_rows_of_its_group_that_have_ended(guessing: Engine) -> None:
    first = Request(
        id="1", prompt_ids=[40, 41, 42], max_tokens=60, temperature=1.0, seed=7, ignore_eos=True, group="g"
    )
    said, steps = run(guessing, [first])
    again, fewer = run(guessing, [replace(first, id="2")])
    assert in_all(again["2"]) == in_all(said["1"])
    assert fewer < steps / 2
    _, alone = run(guessing, [replace(first, id="3", group="another")])
    assert alone > fewer * 2


def test_an_interrupted_row_goes_on_as_if_nothing_had_been(plain: Engine, guessing: Engine) -> None:
    whole = Request(id="a", prompt_ids=LOOP * 3, max_tokens=50, temperature=0.05, seed=3, ignore_eos=True)
    tokens = in_all(run(plain, [whole])[0]["a"])[0]
    for cut in range(0, 50, 7):
        rest, _ = run(guessing, [replace(whole, output_ids=tokens[:cut])])
        assert in_all(rest["a"])[0] == tokens[cut:]


@pytest.mark.parametrize("overlap", [False, True])
def test_any_number_of_rows_is_guessed_for_unless_steps_are_launched_ahead(tiny: Path, overlap: bool) -> None:
    room = {"max_num_seqs": 40, "max_batch_prefill_tokens": 512, "max_batch_total_tokens": 4096}
    requests = [
        Request(id=str(n), prompt_ids=[n, *LOOP * 4], max_tokens=12, temperature=0.0, ignore_eos=True)
        for n in range(40)
    ]
    engine = make_engine(tiny, **room, overlap=overlap)
    assert engine._speculation is not None
    said, _ = run(engine, requests)
    assert (engine._speculation.drafted == 0) is overlap  # 40 are more than what is waited for then
    exact, _ = run(make_engine(tiny, **room, speculate=0), requests)
    assert {key: in_all(outputs) for key, outputs in said.items()} == {
        key: in_all(outputs) for key, outputs in exact.items()
    }


def test_little_memory_limits_guesses_and_nothing_else(plain: Engine, tiny: Path) -> None:
    """The second time, when finished texts make guesses right."""
    tight = make_engine(tiny, max_batch_total_tokens=96)
    requests = [
        Request(
            id=str(n), prompt_ids=LOOP * 3, max_tokens=50, temperature=0.0, seed=n, ignore_eos=True, group="g"
        )
        for n in range(4)
    ]
    expected, _ = run(plain, requests)
    for _ in range(2):
        said, _ = run(tight, requests)
        assert {n: in_all(o) for n, o in said.items()} == {n: in_all(o) for n, o in expected.items()}
    assert tight.stats.drafted > 0


def test_times_are_interpolated_tried_beyond_what_is_known_and_forgotten() -> None:
    times = StepTimes()
    assert times.expect(4) is None
    times.add(4, 1.0)
    assert times.expect(4) == 1.0
    assert times.expect(8) == 1.0, "worth a try"
    times.add(8, 3.0)
    assert times.expect(6) == 2.0
    assert times.expect(3) is None
    for _ in range(STALE_STEPS + 1):
        times.add(4, 1.0)
    assert times.expect(8) == 1.0, "the machine may have become faster"


def test_one_spike_is_not_believed() -> None:
    times = StepTimes()
    times.add(4, 1.0)
    times.add(4, 1_000.0)
    expected = times.expect(4)
    assert expected is not None
    assert expected < 1.5
