"""A request with a LoRA adapter says what PEFT says, token for token in fp32, whoever is in the batch."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Processors, Request
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.settings import EngineSettings

from ..support.adapters import ATTENTION, write_adapter

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "everywhere": {},
    "queries-and-values": {"targets": ("q_proj", "v_proj"), "rank": 8, "use_rslora": True},
    "some-layers": {"targets": ("k_proj", "o_proj", "up_proj"), "layers_to_transform": [0, 2], "rank": 3},
    "patterns": {
        "targets": r".*\.layers\.\d+\.(self_attn\.(q|k)_proj|mlp\.down_proj)",
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7},
        "alpha_pattern": {r".*k_proj": 3, "model.layers.0.mlp.down_proj": 1},
    },
    "all-linear": {"targets": "all-linear", "exclude_modules": ["v_proj"], "rank": 1},
}
STEPS = 24
NEAR_TIE = 1e-4


class Judge:
    """transformers and PEFT with every adapter of one model."""

    def __init__(self, model: Path, adapters: Path) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        self.model, self.adapters = model, adapters
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
        first, *others = ADAPTERS
        self._theirs: Any = PeftModel.from_pretrained(base, adapters / first, adapter_name=first).eval()
        for name in others:
            self.load(name, adapters / name)

    def load(self, name: str, directory: Path) -> None:
        """Make one more adapter known."""
        found = self._theirs.load_adapter(directory, adapter_name=name)
        assert not found.unexpected_keys, found.unexpected_keys
        assert not [key for key in found.missing_keys if f".{name}." in key], found.missing_keys

    @torch.inference_mode()
    def logits(self, adapter: str | None, tokens: list[int]) -> torch.Tensor:
        ids = torch.tensor([tokens])
        if adapter is None:
            with self._theirs.disable_adapter():
                return self._theirs(ids).logits[0]
        self._theirs.set_adapter(adapter)
        return self._theirs(ids).logits[0]

    def assert_greedy(self, request: Request, output: list[int]) -> None:
        """Each token is the one they would choose next: by induction, all of them are."""
        assert len(output) == request.max_tokens
        rows = self.logits(request.adapter, request.prompt_ids + output[:-1])[-len(output) :]
        for place, (row, token) in enumerate(zip(rows, output, strict=True)):
            behind = float(row.max() - row[token])
            assert behind < NEAR_TIE, f"{request.id}: token {place} is {token}, {behind:.2e} behind the best"


@pytest.fixture(scope="module", params=FAMILIES)
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return appoint(tmp_path_factory.mktemp("adapted"), request.param, **FAMILIES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return appoint(tmp_path_factory.mktemp("llama"), "llama")


def appoint(directory: Path, family: str, **config: Any) -> Judge:
    """A judge over a fresh model and its adapters."""
    model = write_tiny(directory / "model", family, **config)
    for seed, (name, knobs) in enumerate(ADAPTERS.items()):
        write_adapter(directory / "adapters" / name, model, seed=seed, **knobs)
    return Judge(model, directory / "adapters")


def engine(judge: Judge, **knobs: Any) -> Engine:
    usual: dict[str, Any] = {
        "lora_dir": judge.adapters,
        "max_num_seqs": 16,
        "max_batch_prefill_tokens": 256,
        "max_batch_total_tokens": 8192,
    }
    return Engine(EngineSettings(model=str(judge.model), dtype="float32", device="cpu", **usual | knobs))


def requests(seed: int, count: int = 18) -> list[Request]:
    """Every adapter and none in turn, prompts around block borders."""
    draw = random.Random(seed)
    names = [None, *ADAPTERS]
    return [
        Request(
            id=f"r{i}",
            prompt_ids=[draw.randrange(256) for _ in range(draw.choice((1, 5, 15, 16, 17, 40, 90)))],
            max_tokens=STEPS,
            temperature=0.0,
            ignore_eos=True,
            adapter=names[i % len(names)],
            arrival=float(i),
        )
        for i in range(count)
    ]


def run(engine: Engine, todo: list[Request], at_once: int = 1000) -> dict[str, list[int]]:
    """What each said; ``at_once`` of them come before each step."""
    said = {request.id: list(request.output_ids) for request in todo}
    coming = list(todo)
    while engine.has_work or coming:
        for request in coming[:at_once]:
            engine.add(request)
        del coming[:at_once]
        for output in engine.step():
            assert output.error is None, output.error
            said[output.id] += output.token_ids
        engine.check()
    assert engine.stats.free_blocks == engine.stats.total_blocks
    return said


@pytest.mark.parametrize("attention", ["torch", "cpu"])
def test_mixed_adapters_in_one_batch_equal_peft(judge: Judge, attention: str) -> None:
    todo = requests(1)
    said = run(engine(judge, attention=attention), todo)
    for request in todo:
        judge.assert_greedy(request, said[request.id])


def test_adapters_really_change_what_is_said(judge: Judge) -> None:
    prompt = requests(2)[5]
    todo = [replace(prompt, id=str(name), adapter=name) for name in [None, *ADAPTERS]]
    said = run(engine(judge), todo)
    assert len({tuple(tokens) for tokens in said.values()}) == len(todo)


def test_chunked_prefill_with_adapters_equals_peft(llama: Judge) -> None:
    todo = requests(3)
    said = run(engine(llama, max_batch_prefill_tokens=16), todo)
    for request in todo:
        llama.assert_greedy(request, said[request.id])


def test_preempted_sequences_with_adapters_equal_peft(llama: Judge) -> None:
    cramped = engine(llama, max_batch_total_tokens=256, max_total_tokens=192)
    todo = [replace(request, max_tokens=3 * STEPS) for request in requests(4)]
    first = [replace(todo[0], id=name, adapter=name, max_tokens=1) for name in ADAPTERS]
    run(cramped, first)  # the adapters are here: nobody comes late and spares the others
    said = run(cramped, todo)
    assert cramped.stats.preemptions > 0, "nobody was preempted: the test shows nothing"
    for request in todo:
        llama.assert_greedy(request, said[request.id])


def test_adapters_evicted_and_loaded_again_equal_peft(tmp_path: Path, llama: Judge) -> None:
    """Room for two of eight adapters, whose requests come interleaved, one a step, in every class."""
    names = [f"big{i}" for i in range(8)]
    for i, name in enumerate(names):
        write_adapter(tmp_path / name, llama.model, seed=50 + i, targets=ATTENTION, rank=160)
        llama.load(name, tmp_path / name)
    small = engine(llama, lora_dir=tmp_path, lora_memory_mib=2)
    todo = [
        replace(r, adapter=names[i % 8], priority=i % 3, max_tokens=8) for i, r in enumerate(requests(5, 32))
    ]
    said = run(small, todo, at_once=1)
    assert small.stats.adapter_loads > len(names), "nothing was loaded twice: the test shows nothing"
    for request in todo:
        llama.assert_greedy(request, said[request.id])


def test_who_ran_and_then_lost_its_adapter_leaves_nothing_behind(tmp_path: Path, llama: Judge) -> None:
    """It had to give way, and the files had changed when it was to go on: an idle engine's books were wrong,
    which ended it."""
    for seed, name in enumerate(("first", "urgent")):
        write_adapter(tmp_path / name, llama.model, seed=seed, targets=ATTENTION, rank=160)
    small = engine(llama, lora_dir=tmp_path, lora_memory_mib=1, attention="torch")
    asked = replace(requests(9, 1)[0], processors=Processors(repetition_penalty=1.1))
    small.add(replace(asked, id="first", adapter="first", priority=2))
    while not any(output.token_ids for output in small.step()):
        pass
    small.add(replace(asked, id="urgent", adapter="urgent", priority=0))
    write_adapter(tmp_path / "first", llama.model, seed=9, targets=ATTENTION, rank=160)
    ended: dict[str, str | None] = {}
    while small.has_work:
        ended |= {output.id: output.finish for output in small.step() if output.finish}
    assert ended == {"urgent": "length", "first": "error"}
    small.check()


def test_keys_and_values_of_one_adapter_are_not_found_by_another(llama: Judge) -> None:
    """The prefix cache holds them by what made them: one prompt, each adapter after the other, twice."""
    prompt = list(range(100, 164))
    names = [None, *ADAPTERS, None, *ADAPTERS]
    todo = [replace(requests(7, 1)[0], id=f"p{i}", prompt_ids=prompt, adapter=n) for i, n in enumerate(names)]
    one_by_one = engine(llama)
    for request in todo:
        llama.assert_greedy(request, run(one_by_one, [request])[request.id])
    assert one_by_one.stats.prefix_hits == 48 * len(ADAPTERS) + 48, "found too much, or too little"


def test_log_probabilities_of_prompts_are_those_of_each_rows_adapter(llama: Judge) -> None:
    made = engine(llama)
    todo = {request.id: replace(request, prompt_logprobs=0) for request in requests(8)}
    told: dict[str, list[float]] = {request_id: [] for request_id in todo}
    for request in todo.values():
        made.add(request)
    while made.has_work:
        for output in made.step():
            told[output.id] += [one.logprob for one in output.prompt_logprobs]
    for request in todo.values():
        theirs = llama.logits(request.adapter, request.prompt_ids).double().log_softmax(-1)
        expected = [float(row[token]) for row, token in zip(theirs, request.prompt_ids[1:], strict=False)]
        assert told[request.id] == pytest.approx(expected, abs=1e-4)


def test_a_resumed_request_with_an_adapter_continues_as_peft(llama: Judge) -> None:
    todo = [r for r in requests(6) if r.adapter]
    whole = run(engine(llama), todo)
    resumed = [replace(r, output_ids=whole[r.id][: 5 + i]) for i, r in enumerate(todo)]
    said = run(engine(llama), resumed)
    assert said == whole
    for request in todo:
        llama.assert_greedy(request, said[request.id])
