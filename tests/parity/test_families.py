"""Every supported family, with random weights, says what transformers says: logits and tokens, in fp32."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.native.build import find_compiler
from gristmill.engine.reference import Reference
from gristmill.engine.runner import Runner
from gristmill.engine.settings import EngineSettings

from ..support.feeding import Fed, generate

pytestmark = pytest.mark.usefixtures("one_thread")

THETA = {"rope_theta": 10_000.0}
LLAMA3 = {
    **THETA,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SLIDING = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-untied-biases": (
        "llama",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-no-groups": ("llama", {"num_key_value_heads": 6}),
    "llama-one-kv-head-dim-20": ("llama", {"num_key_value_heads": 1, "head_dim": 20}),
    "llama-linear": ("llama", {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 3.0}}),
    "llama-linear-old-field": (
        "llama",
        {"rope_parameters": None, "rope_theta": 5_000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    ),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "llama",
        {"rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False}},
    ),
    "mistral-window": ("mistral", {}),
    "mistral-no-window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied-some-layers-sliding": ("qwen2", {"tie_word_embeddings": True, **SLIDING}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases-layer-types": (
        "qwen3",
        {
            **SLIDING,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
STEPS = 20


def prompts() -> list[list[int]]:
    """Around and across block and tile borders; the longest passes every window and old context above."""
    draw = random.Random(7)
    return [[draw.randrange(256) for _ in range(n)] for n in (1, 2, 15, 16, 17, 33, 64, 130)]


def runner(directory: Path, attention: str, **settings: Any) -> Runner:
    if attention == "cpu" and find_compiler() is None:
        pytest.skip("no C++ compiler: the engine runs on torch here")
    return Runner(
        EngineSettings(
            model=str(directory),
            device="cpu",
            dtype="float32",
            attention=attention,
            max_batch_prefill_tokens=512,
            max_num_seqs=16,
            **settings,
        )
    )


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family, config = VARIANTS[request.param]
    return write_tiny(tmp_path_factory.mktemp("model"), family, **config)


@pytest.fixture(scope="module")
def theirs(model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")


def assert_greedy_of(theirs: Any, fed: list[Fed]) -> None:
    """Each sequence is their greedy output: by induction, if they too would choose each token next."""
    for seq in fed:
        with torch.inference_mode():
            logits = theirs(torch.tensor([seq.tokens[:-1]])).logits[0]
        expected = logits[-len(seq.rows) :]
        torch.testing.assert_close(torch.stack(seq.rows), expected, rtol=1e-4, atol=1e-4)
        assert seq.tokens[-len(seq.rows) :] == expected.argmax(-1).tolist()


@pytest.mark.parametrize("attention", ["torch", "cpu"])
def test_a_batch_of_mixed_lengths_equals_transformers(model: Path, theirs: Any, attention: str) -> None:
    ours = runner(model, attention)
    assert ours.attention == attention
    assert_greedy_of(theirs, generate(ours, prompts(), STEPS))


@pytest.mark.parametrize("attention", ["torch", "cpu"])
def test_prompts_fed_in_chunks_beside_decode_equal_transformers(
    model: Path, theirs: Any, attention: str
) -> None:
    fed = generate(runner(model, attention), prompts(), STEPS, budget=23, seed=3)
    assert_greedy_of(theirs, fed)


def test_the_reference_equals_transformers(model: Path, theirs: Any) -> None:
    reference, prompt = Reference(model), prompts()[-1]
    with torch.inference_mode():
        expected = theirs(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(reference.logits(prompt), expected, rtol=1e-4, atol=1e-4)
    together = generate(runner(model, "torch"), [prompts()[3]], 5)
    assert reference.generate(prompts()[3], 5) == together[0].tokens[-5:]


def test_blocks_of_any_multiple_of_16_give_the_same_tokens(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "m", "qwen3", max_position_embeddings=1024)
    draw = random.Random(1)
    long = [[draw.randrange(256) for _ in range(n)] for n in (700, 40, 513)]  # decode of 700 splits its keys
    expected = generate(runner(directory, "torch"), long, 8, budget=300)
    for size in (16, 48, 256):
        fed = generate(runner(directory, "cpu", kv_block_size=size), long, 8, budget=300)
        assert [seq.tokens for seq in fed] == [seq.tokens for seq in expected]


def test_bf16_stays_near_fp32(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "m", "qwen3", head_dim=32)
    exact = Reference(directory)
    for attention in ("torch", "cpu") if find_compiler() else ("torch",):
        ours = Runner(
            EngineSettings(
                model=str(directory), device="cpu", dtype="bfloat16", attention=attention, max_num_seqs=8
            )
        )
        for seq in generate(ours, prompts(), 4):
            expected = exact.logits(seq.tokens[:-1])[-4:]
            error = (torch.stack(seq.rows) - expected).abs().max() / expected.std()
            assert error < 0.25, (
                f"{attention}, {len(seq.tokens)} tokens: {error:.3f} of the logits' deviation"
            )
