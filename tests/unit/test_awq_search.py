"""AWQ of our own: scaling changes nothing but what rounding does, and it rounds better than without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gristmill.engine.layers.across import ALONE
from gristmill.engine.layers.elementwise import TorchElementwise
from gristmill.engine.layers.linear import unpacked
from gristmill.engine.models.assembly import Assembly, none_is
from gristmill.engine.models.config import Config
from gristmill.engine.models.tiny import write_tiny
from gristmill.engine.quant.awq import Awq
from gristmill.engine.quant.grouped import Grouped
from gristmill.engine.quant.method import Site
from gristmill.engine.quantize.awq import norm_fold, rounded, scale_layer
from gristmill.engine.quantize.calibration import Calibration, Seen, sequences
from gristmill.engine.quantize.layouts import AwqGemm, Rounded
from gristmill.engine.quantize.run import Source, quantize
from gristmill.engine.quantize.settings import QuantizeSettings
from gristmill.engine.reference import Reference
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.errors import InvalidRequest, Misconfigured
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensorMode

from ..support.model_types import VARIANTS, VOCAB, their_model
from ..support.quantized import PROMPT, SHAPE, spoken

CPU = torch.device("cpu")
FOLDS = (
    *("gemma2", "phi3", "gpt_neox", "codegen", "cohere-normed", "olmo2"),
    *("opt", "falcon-two-norms", "stablelm", "mpt-clipped", "granite"),
)
"""Families that differ in who makes what a linear is fed, and how it is stored."""
GROUP = 8


def texts(vocab: int, count: int = 3) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (20 + 9 * i,), generator=generator).tolist() for i in range(count)]


def told(source: Source, calibration: Calibration) -> torch.Tensor:
    """Logits after the last layer."""
    others, names = source.others(), source.spec.names
    parts = Assembly(
        source.spec, lambda name: others[name].float(), TorchElementwise(), unpacked, none_is, ALONE
    )
    head = parts.head(parts.embedding().weight, unpacked)
    return head(parts.norm(names.base + names.norm)(torch.cat(calibration.rows)))


@pytest.mark.parametrize("kind", FOLDS)
def test_a_scaled_model_says_what_it_said(kind: str, tmp_path: Path) -> None:
    family, config = VARIANTS[kind]
    theirs = their_model(family, config, tmp_path)
    source, fed = Source(tmp_path), texts(VOCAB)
    plain, scaled = (Calibration(source.spec, fed, source.embeddings(), CPU) for _ in range(2))
    changed = 0
    with torch.inference_mode():
        for index in range(source.spec.num_layers):
            tensors = source.layer(index)
            seen = plain.feed(index, tensors)
            after = {name: tensor.clone() for name, tensor in tensors.items()}
            expected = scale_layer(source.spec, index, after, seen, GROUP)
            changed += sum(not torch.equal(after[name], tensors[name]) for name in tensors)
            # What linears were said to be fed from now on is what they are fed.
            for name, found in scaled.feed(index, after).items():
                torch.testing.assert_close(found.gram, expected[name].gram, rtol=2e-3, atol=2e-3)
        assert changed >= 2 * source.spec.num_layers
        before = told(source, plain)
        torch.testing.assert_close(told(source, scaled), before, rtol=1e-3, atol=2e-3)
        reference = torch.cat([theirs(torch.tensor([ids])).logits[0] for ids in fed])
        torch.testing.assert_close(before, reference.float(), rtol=1e-3, atol=2e-3)


def test_a_norm_is_scaled_where_it_is_by_scales_from_a_card(tmp_path: Path) -> None:
    """`gristmill quantize --method awq` ended in an error on every machine with a card."""
    write_tiny(tmp_path, "qwen2", **SHAPE)
    spec = Source(tmp_path).spec
    with FakeTensorMode():  # knows where each tensor is, and computes nothing
        tensors = {"norm.weight": torch.ones(64, dtype=torch.bfloat16)}
        assert norm_fold(spec, "norm")(tensors, torch.ones(64, device="cuda")).device.type == "cuda"
        assert tensors["norm.weight"].device.type == "cpu"


def test_a_checkpoint_holds_what_was_chosen_in_autoawqs_layout(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", "qwen2", tokenizer=True, **SHAPE)
    settings = QuantizeSettings(
        model=plain, out=tmp_path / "out", method="awq", group_size=32, calibration_tokens=600
    )
    summary = quantize(settings, lambda *_: None)
    assert summary.group_size == 32
    out = tmp_path / "out"
    before, after = Reference(plain).logits(PROMPT), Reference(out).logits(PROMPT)
    assert 0 < (after - before).norm() < 0.35 * before.norm()
    assert (spoken(out)[0] - after[-1]).norm() < 1e-3 * after[-1].norm()
    stored = load_file(out / "model.safetensors")
    assert stored["model.layers.0.mlp.down_proj.qweight"].shape == (128, 64 // 8)
    assert stored["model.layers.0.mlp.down_proj.scales"].dtype == torch.float16
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["version"], config["bits"]) == ("awq", "gemm", 4)


def test_the_layout_is_what_our_reader_reads() -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    layout, found = AwqGemm(32), Rounded.nearest(weight, 32)
    reader = Awq(Config({}, "config"), Config(layout.quantization(()), "config"))
    packed = reader.read(Site("linear", 24, 64), layout.packed(found))
    assert isinstance(packed, Grouped)
    torch.testing.assert_close(packed.dense(torch.float32), found.dense(), rtol=0, atol=0)


def test_a_large_weight_of_a_small_input_is_clipped() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 64, generator=generator)
    x[:, ::16] *= 100
    weight = torch.randn(32, 64, generator=generator)
    seen = Seen(x.T @ x, x.abs().sum(0), len(x))
    weight[3, 5] = 8.0  # an input that is small
    clipped = rounded(weight, seen, 32, clip=True).dense()
    unclipped = rounded(weight, seen, 32, clip=False).dense()
    error = [float((x @ (each - weight).T)[:, 3].norm()) for each in (clipped, unclipped)]
    assert error[0] < 0.9 * error[1]


def test_awq_is_nearer_to_the_model_than_rounding_alone(tmp_path: Path) -> None:
    """On a model whose inputs differ much in size, which random ones' do not."""
    plain = write_tiny(tmp_path / "plain", "llama", tokenizer=True, **SHAPE)
    tensors = load_file(plain / "model.safetensors")
    for name in tensors:
        if name.endswith("layernorm.weight"):
            tensors[name][::13] *= 20
    save_file(tensors, plain / "model.safetensors")
    source = Source(plain)
    text = texts(source.spec.vocab_size, 6)
    calibration = Calibration(source.spec, text, source.embeddings(), CPU)
    with torch.inference_mode():
        tensors = source.layer(0)
        seen = calibration.feed(0, tensors)
        name = "model.layers.0.self_attn.v_proj.weight"
        weight, was = tensors[name], seen["model.layers.0.self_attn.q_proj.weight"]
        scaled = dict(tensors)
        fed = scale_layer(source.spec, 0, scaled, seen, 32)
        errors = [
            float(
                ((Rounded.nearest(w, 32).dense() - w) @ s.gram * (Rounded.nearest(w, 32).dense() - w)).sum()
            )
            / float((w @ s.gram * w).sum())
            for w, s in ((scaled[name], fed[name]), (weight, was))
        ]
    assert errors[0] < 0.5 * errors[1]


def test_group_sizes_and_texts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    plain = write_tiny(tmp_path / "plain", "llama", tokenizer=True, **SHAPE)
    base = {"model": plain, "out": tmp_path / "out", "method": "awq"}
    with pytest.raises(
        Misconfigured, match=r"q_proj has 64 inputs, which 48 does not divide; group size 64 or"
    ):
        quantize(QuantizeSettings.model_validate({**base, "group_size": 48}), lambda *_: None)
    short, rows = tmp_path / "short.txt", tmp_path / "rows.jsonl"
    short.write_text("too short")
    with pytest.raises(InvalidRequest, match="is 9 tokens to this model; calibration takes at least 256"):
        quantize(QuantizeSettings.model_validate({**base, "calibration": short}), lambda *_: None)
    rows.write_text('{"text": "ab"}\n{"messages": [{"role": "user", "content": "x"}]}\n{"other": 1}\n')
    with pytest.raises(InvalidRequest, match=r'line 3: has no "text", "prompt" or "messages"'):
        sequences(rows, Tokenizer(plain), 100, 512)
    assert not (tmp_path / "out").exists()
