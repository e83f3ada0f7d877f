"""The engine when memory runs out: steps get smaller, tokens stay the same.

The failures are torch's own: a step over a limit asks for more than any machine has, before the model has run
or after it, when all that it wrote is in the cache already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.engine import Engine
from gristmill.engine.kv_cache import CPU_LIMIT_BYTES, is_plentiful
from gristmill.engine.kv_room import KVRoom
from gristmill.engine.memory import is_out_of_memory
from gristmill.engine.messages import Output, Request
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.runner import Runner
from gristmill.engine.settings import EngineSettings
from gristmill.schemas.errors import Misconfigured

STEP, SEQS = 1024, 16


def ask_for_a_petabyte() -> None:
    torch.empty(2**50, dtype=torch.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


def make_engine(model: Path) -> Engine:
    return Engine(
        EngineSettings(
            model=str(model),
            dtype="float32",
            device="cpu",
            num_threads=1,
            max_num_seqs=SEQS,
            max_batch_prefill_tokens=STEP,
            max_batch_total_tokens=8192,
            prefix_cache=False,  # or the second run's steps would be small anyway
        )
    )


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    engine = make_engine(model)
    yield engine
    engine.check()


def run(engine: Engine) -> tuple[dict[str, list[int]], dict[str, Output]]:
    """Tokens and ends of twelve requests, half of them sampled."""
    for i in range(12):
        prompt = [(7 * i + 3 * k) % 250 for k in range(100 + 10 * i)]
        engine.add(
            Request(id=str(i), prompt_ids=prompt, max_tokens=8, seed=i, ignore_eos=True, temperature=i % 2)
        )
    tokens: dict[str, list[int]] = {}
    ends: dict[str, Output] = {}
    while engine.has_work:
        for output in engine.step():
            tokens.setdefault(output.id, []).extend(output.token_ids)
            if output.finish:
                ends[output.id] = output
        engine.check()
    return tokens, ends


def limit_steps(engine: Engine, fits: Callable[[Any], bool], *, late: bool, monkeypatch: Any) -> None:
    forward = engine._runner.forward

    def limited(plan: Any, *more: Any) -> torch.Tensor:
        logits = forward(plan, *more) if late else None
        if not fits(plan):
            ask_for_a_petabyte()
        return forward(plan, *more) if logits is None else logits

    monkeypatch.setattr(engine._runner, "forward", limited)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("tokens", [500, 60, 16])
def test_a_step_without_memory_is_made_smaller_and_says_the_same(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tokens: int, late: bool
) -> None:
    undisturbed, _ = run(engine)
    limit_steps(engine, lambda plan: plan.tokens <= tokens, late=late, monkeypatch=monkeypatch)
    said, ends = run(engine)
    assert {end.finish for end in ends.values()} == {"length"}
    assert said == undisturbed
    assert STEP > engine.stats.step_tokens >= tokens // 2
    assert engine.stats.free_blocks == engine.stats.total_blocks


def test_too_many_sequences_are_made_fewer(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, _ = run(engine)
    limit_steps(engine, lambda plan: len(plan.work) <= 3, late=True, monkeypatch=monkeypatch)
    said, _ = run(engine)
    assert said == undisturbed
    assert engine.stats.max_running <= 3
    assert engine.stats.preemptions > 0


def test_a_sequence_for_which_nothing_is_small_enough_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, _ = run(engine)
    limit_steps(
        engine,
        lambda plan: all(work.seq.id != "5" for work in plan.work),
        late=False,
        monkeypatch=monkeypatch,
    )
    said, ends = run(engine)
    assert ends["5"].finish == "error"
    assert ends["5"].error_code == "out_of_memory"
    assert "16 tokens of this sequence of 150" in (ends["5"].error or "")
    assert "max_batch_total_tokens" in (ends["5"].error or "")
    del undisturbed["5"], said["5"]
    assert said == undisturbed


def test_an_engine_that_shrank_grows_again_when_there_is_memory(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever took the memory may have gone; one failed step is what it costs to find out."""
    monkeypatch.setattr("gristmill.engine.engine.GROW_AFTER_STEPS", 5)
    with monkeypatch.context() as limited:
        limit_steps(engine, lambda plan: plan.tokens <= 20, late=False, monkeypatch=limited)
        run(engine)
    assert "engine.shrunk" in caplog.messages
    for _ in range(4):
        run(engine)
    assert (engine.stats.step_tokens, engine.stats.max_running) == (STEP, SEQS)


def test_a_cache_that_does_not_fit_is_halved_until_it_does(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = KVRoom.use

    def limited(room: KVRoom, blocks: int) -> None:
        if blocks > 200:
            ask_for_a_petabyte()
        use(room, blocks)

    monkeypatch.setattr(KVRoom, "use", limited)
    assert make_engine(model).stats.total_blocks == 128


def test_no_memory_for_the_largest_step_names_the_knobs(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runner, "forward", lambda *_: ask_for_a_petabyte())
    with pytest.raises(Misconfigured, match="max_batch_prefill_tokens or max_num_seqs"):
        make_engine(model)


@pytest.mark.parametrize("free_gib", [64, 8])
def test_the_largest_step_is_tried_where_its_memory_would_be_missed(
    model: Path, monkeypatch: pytest.MonkeyPatch, free_gib: int
) -> None:
    """Where there is plenty the cache is the same without, and the start half a second shorter."""
    sizes: list[int] = []
    forward = Runner.forward

    def seen(runner: Runner, plan: Any, *others: Any) -> torch.Tensor:
        sizes.append(sum(work.count for work in plan.work))
        return forward(runner, plan, *others)

    monkeypatch.setattr(Runner, "forward", seen)
    monkeypatch.setattr("gristmill.engine.kv_cache.available_bytes", lambda: free_gib * 1024**3)
    assert make_engine(model).stats.total_blocks == 512
    assert sizes == [16 if free_gib == 64 else STEP]


def test_plenty_is_what_leaves_the_caches_limit_twice_over(monkeypatch: pytest.MonkeyPatch) -> None:
    step = 2**28
    for free, enough in ((2 * CPU_LIMIT_BYTES + step, True), (2 * CPU_LIMIT_BYTES + step - 4, False)):
        monkeypatch.setattr("gristmill.engine.kv_cache.available_bytes", lambda free=free: free)
        assert is_plentiful(torch.device("cpu"), step) is enough
        assert not is_plentiful(torch.device("cuda"), step), "a card's memory is all given away"


@pytest.mark.parametrize(
    ("exc", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(2, "No such file"), False),
        (RuntimeError("shapes differ"), False),
    ],
)
def test_what_counts_as_memory(exc: Exception, memory: bool) -> None:
    assert is_out_of_memory(exc) is memory


def test_torchs_cpu_allocator_is_recognised() -> None:
    """By its text alone: a torch that changes it must fail here."""
    with pytest.raises(RuntimeError) as failed:
        ask_for_a_petabyte()
    assert is_out_of_memory(failed.value)
