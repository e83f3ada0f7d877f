"""The slow, obvious generate(): every token from the whole sequence, no cache, no batch, nothing fused.

What every faster path is compared against; they share only the checkpoint reader and the rope frequencies.
For models of Llama's shape; other families are compared with transformers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path

import torch
import torch.nn.functional as nnf
from torch import Tensor

from .layers.rope import tables
from .models.config import Config
from .models.families import from_hf
from .quant.weights import ModelWeights
from .weights import expected_tensors

_KNOWN = ("qkv_bias", "output_bias", "mlp_bias", "qk_norm")


class Reference:
    """One model on the CPU."""

    def __init__(self, directory: Path | str, dtype: torch.dtype = torch.float32) -> None:
        config = Config.load(Path(directory))
        self.spec, self.dtype = from_hf(config), dtype
        more = [
            field.name
            for field in fields(self.spec)
            if field.default is not MISSING
            and field.name not in _KNOWN
            and getattr(self.spec, field.name) != field.default
        ]
        assert not more, f"the reference knows nothing of {more}"
        weights = ModelWeights(Path(directory), config, self.spec)
        cpu = torch.device("cpu")
        self._weights = {name: weights.fetch(name, dtype, cpu) for name in expected_tensors(self.spec)}

    def generate(self, prompt_ids: Sequence[int], max_tokens: int, stop_ids: Sequence[int] = ()) -> list[int]:
        """Greedy output ids; a stop id is kept and ends the output."""
        tokens = list(prompt_ids)
        for _ in range(max_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
            if tokens[-1] in stop_ids:
                break
        return tokens[len(prompt_ids) :]

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """[len(tokens), vocab]: the scores of each next token."""
        x = nnf.embedding(torch.tensor(list(tokens)), self._weights["model.embed_tokens.weight"])
        for layer in range(self.spec.num_layers):
            prefix = f"model.layers.{layer}."
            x = x + self._attention(prefix, self._norm(prefix + "input_layernorm", x), layer)
            x = x + self._mlp(prefix + "mlp.", self._norm(prefix + "post_attention_layernorm", x))
        x = self._norm("model.norm", x)
        return self._linear("model.embed_tokens" if self.spec.tied_embeddings else "lm_head", x)

    def _attention(self, prefix: str, x: Tensor, layer: int) -> Tensor:
        spec, n = self.spec, len(x)
        window, rope = spec.windows[layer], spec.ropes[layer]
        prefix += "self_attn."
        q = self._linear(prefix + "q_proj", x).view(n, spec.num_heads, spec.head_dim)
        k = self._linear(prefix + "k_proj", x).view(n, spec.num_kv_heads, spec.head_dim)
        v = self._linear(prefix + "v_proj", x).view(n, spec.num_kv_heads, spec.head_dim)
        if spec.qk_norm:
            q, k = self._norm(prefix + "q_norm", q), self._norm(prefix + "k_norm", k)
        if rope is not None:
            cos, sin = (t[:, None].to(self.dtype) for t in tables(rope, spec.head_dim, n))
            q, k = self._rotate(q, cos, sin), self._rotate(k, cos, sin)
        k, v = k.repeat_interleave(spec.group, 1), v.repeat_interleave(spec.group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * spec.head_dim**-0.5
        at = torch.arange(n)
        hidden = at[None, :] > at[:, None]
        if window is not None:
            hidden |= at[None, :] <= at[:, None] - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1).to(self.dtype)
        return self._linear(prefix + "o_proj", torch.einsum("hqk,khd->qhd", weights, v).reshape(n, -1))

    def _mlp(self, prefix: str, x: Tensor) -> Tensor:
        gate, up = self._linear(prefix + "gate_proj", x), self._linear(prefix + "up_proj", x)
        return self._linear(prefix + "down_proj", nnf.silu(gate) * up)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.spec.norm_eps)
        return self._weights[name + ".weight"] * wide.to(self.dtype)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return nnf.linear(x, self._weights[name + ".weight"], self._weights.get(name + ".bias"))

    @staticmethod
    def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a, b), -1) * torch.cat((cos, cos), -1) + torch.cat((-b, a), -1) * torch.cat(
            (sin, sin), -1
        )
