"""Models that run through transformers' code with our paged attention say what transformers says by itself.

And those that cannot be run so are refused at start, by name, instead of saying something else.
"""

from __future__ import annotations

import gc
import json
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.engine import Engine
from gristmill.engine.layers.linear import linear
from gristmill.engine.messages import Request
from gristmill.engine.models.config import Config
from gristmill.engine.models.fallback import Fallback
from gristmill.engine.settings import EngineSettings
from gristmill.schemas.errors import Misconfigured, ModelInvalid
from safetensors.torch import load_file, save_file

from ..support.feeding import generate
from ..support.model_types import ALTERNATING, BASE, ONE_SIZE, STEPS, VOCAB, prompts, runner, their_model

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {**BASE, "head_dim": 8}
EXPERTS: dict[str, Any] = {**SMALL, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    **BASE,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
    "head_dim": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_group": 1,
    "topk_group": 1,
}
LLAMA4: dict[str, Any] = {
    **SMALL,
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
    "attention_chunk_size": 32,
    "no_rope_layers": [1, 0],
    "attn_temperature_tuning": False,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "apertus": BASE,
    "arcee": BASE,
    "biogpt": ONE_SIZE,  # learned positions, and a head that asks for more than hidden states
    "deepseek_v3": LATENT,  # values are narrower than keys
    "ernie4_5": SMALL,
    "exaone4": {**BASE, **ALTERNATING},
    "glm4": {**SMALL, "partial_rotary_factor": 0.5},
    "granitemoe": EXPERTS,
    "nemotron": BASE,
    "olmo3": {**BASE, **ALTERNATING},
    "olmoe": EXPERTS,
    "seed_oss": SMALL,
    "vaultgemma": {
        **SMALL,
        **ALTERNATING,
        "query_pre_attn_scalar": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 1.5,
    },
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "state-space": (
        "mamba",
        {**BASE, "state_size": 4},
        "MambaForCausalLM keeps a state beside keys and values",
    ),
    "sinks": ("gpt_oss", EXPERTS, r"GptOssAttention \(attention layer 0\) wants attention sinks"),
    "convolution": (
        "lfm2",
        {**BASE, "layer_types": ["conv", "full_attention"]},
        r"'lfm2' cannot be run in pieces.* standard deviations off .*\(layers of type conv\)",
    ),
    "linear": (
        "minimax",
        {**EXPERTS, "layer_types": ["linear_attention", "full_attention"]},
        r"'minimax' cannot be run in pieces.*\(layers of type linear_attention\)",
    ),
    "rows": (
        "llama4_text",
        {**LLAMA4, "attention_chunk_size": 128, "attn_temperature_tuning": True},
        r"\(attention layer 1\) wants positions by the row of a step",
    ),
    "chunks": (
        "llama4_text",
        LLAMA4,
        "neither causal nor a sliding window, .* if it attends in chunks, set max_total_tokens",
    ),
}


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_model_type_equals_transformers_batched_and_chunked(kind: str, tmp_path: Path) -> None:
    theirs = their_model(kind, VARIANTS[kind], tmp_path)
    ours = runner(tmp_path)
    whole = generate(ours, prompts(), STEPS)
    chunked = generate(ours, prompts(), STEPS, budget=11, seed=3)
    assert [seq.tokens for seq in chunked] == [seq.tokens for seq in whole]
    for seq in whole + chunked:
        with torch.inference_mode():
            expected = theirs(torch.tensor([seq.tokens[:-1]])).logits[0, -STEPS:]
        torch.testing.assert_close(torch.stack(seq.rows), expected, rtol=1e-4, atol=1e-4)
        assert seq.tokens[-STEPS:] == expected.argmax(-1).tolist()


@pytest.mark.parametrize("why", REFUSED)
def test_a_model_that_does_more_than_we_can_is_refused_by_name(why: str, tmp_path: Path) -> None:
    kind, config, words = REFUSED[why]
    their_model(kind, config, tmp_path)
    with pytest.raises(ModelInvalid, match=words):
        runner(tmp_path)


def test_a_model_that_attends_in_chunks_runs_within_one(tmp_path: Path) -> None:
    theirs = their_model("llama4_text", LLAMA4, tmp_path)
    fed = generate(runner(tmp_path, max_total_tokens=32), prompts()[:2], STEPS, budget=11)
    for seq in fed:
        with torch.inference_mode():
            expected = theirs(torch.tensor([seq.tokens[:-1]])).logits[0, -STEPS:]
        torch.testing.assert_close(torch.stack(seq.rows), expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def arcee(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("arcee")
    their_model("arcee", BASE, directory)
    return directory


def reconfigured(model: Path, directory: Path, **fields: Any) -> Path:
    """The same model with other fields in its config.json."""
    directory.mkdir(exist_ok=True)
    for file in model.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


def test_preempted_beside_a_shared_prefix_a_request_says_what_it_says_alone(arcee: Path) -> None:
    def engine(tokens: int) -> Engine:
        return Engine(
            EngineSettings(
                model=str(arcee),
                device="cpu",
                dtype="float32",
                attention="torch",
                max_batch_total_tokens=tokens,
            )
        )

    draw = random.Random(3)
    begin = [draw.randrange(3, VOCAB) for _ in range(32)]
    requests = [
        Request(
            id=str(i),
            prompt_ids=begin + [draw.randrange(3, VOCAB) for _ in range(5 * i)],
            max_tokens=30,
            temperature=0.0,
            ignore_eos=True,
        )
        for i in range(5)
    ]
    roomy, cramped = engine(1024), engine(160)
    alone = {request.id: run(roomy, [request])[request.id] for request in requests}
    assert roomy.stats.prefix_hits
    assert run(cramped, requests) == alone
    assert cramped.stats.preemptions


def run(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            said.setdefault(output.id, []).extend(output.token_ids)
        engine.check()
    return said


@pytest.mark.parametrize("knobs", [{"quantize": "eetq"}, {"quantize": "int8"}, {"kv_cache_dtype": "int8"}])
def test_weights_and_cache_may_be_quantized_on_load(arcee: Path, knobs: dict[str, Any]) -> None:
    exact, packed = runner(arcee), runner(arcee, **knobs)
    a, b = (generate(each, prompts()[1:2], 1)[0].rows[0] for each in (exact, packed))
    assert 0.001 < (a - b).abs().max() / a.std() < 0.3


def test_weights_that_were_made_smaller_are_not_kept_beside(arcee: Path) -> None:
    """Quantized on load, a model took more memory than it does plain."""
    settings = EngineSettings(model=str(arcee))
    decoder = Fallback(arcee, Config.load(arcee), settings, torch.float32, torch.device("cpu"))
    linears = [weakref.ref(each) for each in decoder._model.modules() if type(each) is torch.nn.Linear]
    decoder.rebuild(linear, head=linear)
    gc.collect()
    assert linears
    assert not any(each() for each in linears)


def test_a_checkpoint_with_other_tensors_than_the_model_has_is_refused_by_name(
    arcee: Path, tmp_path: Path
) -> None:
    directory = reconfigured(arcee, tmp_path)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    bias = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}
    save_file({**tensors, **bias}, path, metadata={"format": "pt"})
    with pytest.raises(ModelInvalid, match=r"holds unexpected .*q_proj\.bias"):
        runner(directory)
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({n: each for n, each in tensors.items() if n != gone}, path, metadata={"format": "pt"})
    with pytest.raises(ModelInvalid, match=f"lacks '{gone}'"):
        runner(directory)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model_type": "arcade"}, "'arcade' is not supported; our own are .*pip install -U transformers"),
        (
            {"model_type": "arcade", "auto_map": {"AutoModelForCausalLM": "modeling_arcade.Arcade"}},
            "code of its own \\(auto_map\\), which is never run",
        ),
        ({"model_type": "t5"}, "'t5' is no causal language model"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "this one is quantized; take the one"),
        ({"hidden_size": "wide"}, "transformers does not take this config"),
    ],
)
def test_what_transformers_cannot_run_either_is_refused_before_weights_are_read(
    arcee: Path, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    directory = reconfigured(arcee, tmp_path, **fields)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelInvalid, match=words):
        runner(directory)


@pytest.mark.parametrize("knobs", [{"deterministic": True}, {"lora_dir": Path("adapters")}])
def test_knobs_of_our_own_models_are_refused(arcee: Path, knobs: dict[str, Any]) -> None:
    with pytest.raises(
        Misconfigured, match=f"{next(iter(knobs))} cannot be had with a model that runs through"
    ):
        runner(arcee, **knobs)


def test_frequencies_that_depend_on_the_batch_bound_the_context(tmp_path: Path) -> None:
    """transformers takes longrope's long factors for a whole batch as soon as one sequence is long."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "short_mscale": 1.0,
        "long_mscale": 1.0,
        "original_max_position_embeddings": 64,
    }
    their_model("phimoe", {**BASE, "num_local_experts": 4, "rope_parameters": rope}, tmp_path)
    assert runner(tmp_path).max_model_len == 64
