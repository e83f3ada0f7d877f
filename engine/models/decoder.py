"""The one decoder that all families share: weights in, hidden states and logits out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..attention.backend import Attention
from ..batch import Batch
from ..layers.elementwise import Elementwise
from ..layers.invariant import Make
from ..layers.linear import Linear, linear
from ..lora.rows import Adapted, project
from .spec import ModelSpec

Fetch = Callable[[str], Tensor]
"""A tensor by its Hugging Face name, in the engine's dtype on the engine's device."""

Quantized = Callable[[Sequence[str], Tensor | None], Linear | None]
"""The layer over modules' quantized weights, one above the other, and a bias. None: they are dense."""


def none_is(_modules: Sequence[str], _bias: Tensor | None) -> None:
    """No weight of this checkpoint is quantized."""


NOBODY = Adapted()


@dataclass(frozen=True, slots=True)
class Layer:
    """One block. Query, key and value are one matrix, gate and up another: fewer, larger multiplications."""

    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear


class Decoder:
    """Pre-norm transformer over packed tokens. Knows nothing of sequences: attention does."""

    def __init__(
        self,
        spec: ModelSpec,
        fetch: Fetch,
        ops: Elementwise,
        make: Make = linear,
        quantized: Quantized = none_is,
        head: Make | None = None,
    ) -> None:
        """``head`` makes the output layer, where that is to be made otherwise than ``make`` does."""
        self.spec, self._ops = spec, ops
        self._embed = fetch("model.embed_tokens.weight")
        self._layers = [_layer(spec, fetch, index, make, quantized) for index in range(spec.num_layers)]
        self._norm = fetch("model.norm.weight")
        self._head = (head or make)(self._embed if spec.tied_embeddings else fetch("lm_head.weight"), None)

    def forward(self, batch: Batch, attention: Attention, adapted: Adapted = NOBODY) -> Tensor:
        """Hidden states [wanted rows, hidden] of one step, for ``logits``; keys and values are cached."""
        norm, silu_mul, eps = self._ops.rms_norm, self._ops.silu_mul, self.spec.norm_eps
        attention.begin(batch)
        rows = adapted.fed
        residual = nnf.embedding(batch.tokens, self._embed)
        last = len(self._layers) - 1
        update: Tensor | None = None  # what the previous half-layer adds to the residual
        for index, layer in enumerate(self._layers):
            if update is None:
                x = norm(residual, layer.input_norm, eps)
            else:
                x = norm(update, layer.input_norm, eps, residual)
            x = attention.attend(index, project(layer.qkv, x, rows, index, "qkv"), layer.q_norm, layer.k_norm)
            if index == last and batch.wanted is not None:
                x, residual = x[batch.wanted], residual[batch.wanted]  # nobody reads the other rows any more
                rows = adapted.wanted
            x = norm(project(layer.output, x, rows, index, "output"), layer.mlp_norm, eps, residual)
            inner = silu_mul(project(layer.gate_up, x, rows, index, "gate_up"))
            update = project(layer.down, inner, rows, index, "down")
        assert update is not None, "a model without layers"
        return norm(update, self._norm, eps, residual)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] to [rows, vocab], in the engine's dtype."""
        return self._head(hidden)


def _layer(spec: ModelSpec, fetch: Fetch, index: int, make: Make, quantized: Quantized) -> Layer:
    prefix = f"model.layers.{index}."

    def joined(bias: bool, *names: str) -> Linear:
        modules = [f"{prefix}{name}" for name in names]
        biases = torch.cat([fetch(f"{module}.bias") for module in modules]) if bias else None
        layer = quantized(modules, biases)
        return layer or make(torch.cat([fetch(f"{module}.weight") for module in modules]), biases)

    return Layer(
        input_norm=fetch(f"{prefix}input_layernorm.weight"),
        qkv=joined(spec.qkv_bias, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        q_norm=fetch(f"{prefix}self_attn.q_norm.weight") if spec.qk_norm else None,
        k_norm=fetch(f"{prefix}self_attn.k_norm.weight") if spec.qk_norm else None,
        output=joined(spec.output_bias, "self_attn.o_proj"),
        mlp_norm=fetch(f"{prefix}post_attention_layernorm.weight"),
        gate_up=joined(spec.mlp_bias, "mlp.gate_proj", "mlp.up_proj"),
        down=joined(spec.mlp_bias, "mlp.down_proj"),
    )
