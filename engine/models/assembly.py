"""From a spec and a checkpoint to the decoder's parts, each in the form that costs a step the least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..layers.across import ALONE, Across
from ..layers.elementwise import Elementwise
from ..layers.invariant import Make
from ..layers.linear import Linear
from ..native.products import Chain, Link, NormOf, Product
from .layout import Joint, MlpJoints, MoeJoints, head_order, joints, layer_prefix, moe_joints
from .mlp import Experts, FeedForward, Mlp, Norm, Summed
from .spec import ModelSpec

Fetch = Callable[[str], Tensor]
"""A tensor by its Hugging Face name, in the engine's dtype on the engine's device."""

Quantized = Callable[[Sequence[str], Tensor | None], Linear | None]
"""The layer over modules' quantized weights, one above the other, and a bias. None: they are dense."""

Rowwise = Callable[[Tensor], Tensor]


def none_is(_modules: Sequence[str], _bias: Tensor | None) -> None:
    """No weight of this checkpoint is quantized."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One block. Query, key and value are one matrix, gate and up another: fewer, larger multiplications."""

    attention_norm: Norm
    qkv: Linear
    qkv_normed: tuple[Product, NormOf] | None
    """attention_norm and qkv in one, for rows without adapters. None: there is no such."""
    on_qkv: Rowwise | None
    """What happens to queries, keys and values before attention, if it is not ``q_norm`` and ``k_norm``."""
    q_norm: Tensor | None
    k_norm: Tensor | None
    """RMS norm weights of each head, which attention applies."""
    output: Linear
    attention_post: Rowwise | None
    """Of what attention adds to the residual."""
    parallel: bool
    """The MLP reads the residual as attention found it."""
    mlp_norm: Norm | None
    """None: the MLP reads what attention reads."""
    mlp: FeedForward
    mlp_normed: Chain | None
    """mlp_norm and mlp in one, likewise."""
    mlp_post: Rowwise | None
    rest: tuple[Link, ...]
    """All behind attention in one, likewise; empty: there is no such."""


class Embedding:
    """Tokens, and where a model has learned them positions, to rows."""

    def __init__(
        self, weight: Tensor, positions: Tensor | None, after: Rowwise | None, across: Across
    ) -> None:
        self.weight, self._positions, self._after, self._across = weight, positions, after, across

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self._across.embed(tokens, self.weight)
        if self._positions is not None:
            x += nnf.embedding(positions, self._positions)
        return x if self._after is None else self._after(x)


class Assembly:
    """Fetches weights as it is asked for parts, and puts them in the decoder's order.

    Of a model on several ranks, ``spec`` and what ``fetch`` gives are this rank's part, which looks like a
    narrower model's; what the ranks' parts add up to is known to ``across``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        fetch: Fetch,
        ops: Elementwise,
        make: Make,
        quantized: Quantized,
        across: Across = ALONE,
        lend: Fetch | None = None,
    ) -> None:
        """``lend``: as ``fetch``, for weights that are copied anyway; what it gives may be the file's."""
        self.spec, self._fetch, self._ops, self._make = spec, fetch, ops, make
        self._quantized, self._across, self._lend = quantized, across, lend or fetch

    def embedding(self) -> Embedding:
        spec, base = self.spec, self.spec.names.base
        weight = self._fetch(f"{base}{spec.names.embedding}.weight")
        positions = None
        if spec.names.positions is not None:
            positions = self._fetch(f"{base}{spec.names.positions}.weight")[spec.position_offset :]
        # Rounded as the numbers that it multiplies: Gemma was trained so.
        scale = torch.tensor(spec.embedding_scale, dtype=weight.dtype).item()
        after = None if scale == 1 else _scaled(scale)
        if spec.names.embedding_norm is not None:
            after = _then(after, self.norm(base + spec.names.embedding_norm))
        return Embedding(weight, positions, after, self._across)

    def head(self, embedding: Tensor, make: Make) -> Linear:
        spec, name = self.spec, self.spec.names.head
        weight = embedding if spec.tied_embeddings else self._fetch(f"{name}.weight")
        head = make(weight, self._fetch(f"{name}.bias") if spec.head_bias else None)
        if spec.logit_scale != 1:
            head = _then(head, _scaled(spec.logit_scale))
        if (cap := spec.logit_softcap) is not None:
            head = _then(head, lambda x: self._ops.softcap(x, cap))
        return head if self._across.alone else _then(head, self._across.joined)

    def layer(self, index: int) -> Layer:
        spec, names, prefix = self.spec, self.spec.names, layer_prefix(self.spec, index)
        linears = {place: self._linear(prefix, joint) for place, joint in joints(spec, index).items()}
        fused = spec.qk_norm == "head" and spec.norm == "rms"  # the form that attention kernels know
        moe = moe_joints(spec, index)
        mlp = (
            self._experts(prefix, moe, index)
            if moe
            else self._made(linears["gate_up"], linears["down"], index)
        )
        norm = self._fusible(prefix, names.mlp_norm) if self._across.alone else None
        links = mlp.links(norm) if isinstance(mlp, Mlp) else ()
        attention_post, mlp_post = self._attention_post(prefix), self._post(prefix, names.mlp_post_norm)
        bare = attention_post is None and mlp_post is None and not spec.parallel
        return Layer(
            attention_norm=self._norm_or_none(prefix, names.attention_norm) or _unnormed,
            qkv=linears["qkv"],
            qkv_normed=self._normed(linears["qkv"], self._fusible(prefix, names.attention_norm)),
            on_qkv=self._on_qkv(prefix, fused),
            q_norm=self._head_weight(f"{prefix}{names.q_norm}.weight") if fused else None,
            k_norm=self._head_weight(f"{prefix}{names.k_norm}.weight") if fused else None,
            output=linears["output"],
            attention_post=attention_post,
            parallel=spec.parallel,
            mlp_norm=self._norm_or_none(prefix, names.mlp_norm) or (None if spec.parallel else _unnormed),
            mlp=self._whole(mlp),
            mlp_normed=Chain(links) if links else None,
            mlp_post=mlp_post,
            rest=self._rest(linears["output"], links) if bare else (),
        )

    def norm(self, name: str) -> Norm:
        eps, weight = self.spec.norm_eps, self._norm_weight(f"{name}.weight")
        if self.spec.norm == "rms":
            rms = self._ops.rms_norm
            return lambda x, residual=None: rms(x, weight, eps, residual)
        layer, bias = self._ops.layer_norm, self._fetch(f"{name}.bias") if self.spec.norm_bias else None
        return lambda x, residual=None: layer(x, weight, bias, eps, residual)

    def _fusible(self, prefix: str, name: str | None) -> NormOf | None:
        """A norm that products do themselves, and alike."""
        if name is None or self.spec.norm != "rms" or not self._ops.native:
            return None
        return self._norm_weight(f"{prefix}{name}.weight"), self.spec.norm_eps

    def _normed(self, linear: Linear, norm: NormOf | None) -> tuple[Product, NormOf] | None:
        if norm is None or self.spec.parallel or not isinstance(linear, Product):
            return None
        return linear, norm

    @staticmethod
    def _rest(output: Linear, mlp: tuple[Link, ...]) -> tuple[Link, ...]:
        return ((output, None), *mlp) if mlp and isinstance(output, Product) else ()

    def _norm_or_none(self, prefix: str, name: str | None) -> Norm | None:
        return None if name is None else self.norm(prefix + name)

    def _post(self, prefix: str, name: str | None) -> Rowwise | None:
        norm = self._norm_or_none(prefix, name)
        scale = self.spec.residual_scale
        return norm if scale == 1 else _then(norm, _scaled(scale))

    def _attention_post(self, prefix: str) -> Rowwise | None:
        post = self._post(prefix, self.spec.names.attention_post_norm)
        if self._across.alone:
            return post
        return self._across.total if post is None else _then(self._across.total, post)

    def _whole(self, mlp: FeedForward) -> FeedForward:
        return mlp if self._across.alone else Summed(mlp, self._across.total)

    def _norm_weight(self, name: str) -> Tensor:
        weight = self._fetch(name)
        return weight + 1 if self.spec.norm_plus_one else weight

    def _linear(self, prefix: str, joint: Joint) -> Linear:
        modules = [f"{prefix}{module.name}" for module in joint.modules]
        bias = torch.cat([self._fetch(f"{module}.bias") for module in modules]) if joint.bias else None
        quantized = self._quantized(modules, bias)
        if quantized is not None:  # its rows stay where they are: what it says is put in order instead
            return quantized if joint.order is None else _then(quantized, _columns(joint.order))
        weight = torch.cat([self._lent_weight(module) for module in modules])  # a copy, of a single one, too
        if joint.order is not None:
            order = torch.tensor(joint.order, device=weight.device)
            weight, bias = weight[order], None if bias is None else bias[order]
        return self._make(weight, bias)

    def _lent_weight(self, module: str) -> Tensor:
        weight = self._lend(f"{module}.weight")
        return weight.T.contiguous() if self.spec.names.transposed else weight

    def _mlp(self, prefix: str, mlp: MlpJoints, index: int) -> Mlp:
        return self._made(self._linear(prefix, mlp.up), self._linear(prefix, mlp.down), index)

    def _made(self, up: Linear, down: Linear, index: int) -> Mlp:
        if self.spec.gated and self.spec.activation == "silu" and self._ops.native:
            halved = up.halved() if isinstance(up, Product) else None
            if halved is not None:
                return Mlp(halved, down, self._activation(), index, halved)
        return Mlp(up, down, self._activation(), index)

    def _experts(self, prefix: str, moe: MoeJoints, index: int) -> Experts:
        assert self.spec.moe is not None
        return Experts(
            self._linear(prefix, Joint((moe.router,))),
            [self._mlp(prefix, expert, index) for expert in moe.experts],
            self.spec.moe.chosen,
            self.spec.moe.normalised,
            self._mlp(prefix, moe.shared, index) if moe.shared else None,
            self._linear(prefix, Joint((moe.gate,))) if moe.gate else None,
        )

    def _activation(self) -> Rowwise:
        ops, kind = self._ops, self.spec.activation
        if not self.spec.gated:
            return lambda x: ops.activate(kind, x)
        return ops.silu_mul if kind == "silu" else lambda x: ops.gate(kind, x)

    # ---- norms of queries and keys that attention does not do itself

    def _on_qkv(self, prefix: str, fused: bool) -> Rowwise | None:
        spec, clip = self.spec, self.spec.qkv_clip
        clamp: Rowwise | None = None if clip is None else lambda qkv: qkv.clamp_(-clip, clip)
        if spec.qk_norm is None or fused:
            return clamp
        norm_q = self._norm_part(prefix + spec.names.q_norm, spec.num_heads)
        norm_k = self._norm_part(prefix + spec.names.k_norm, spec.num_kv_heads)

        def norm(qkv: Tensor) -> Tensor:
            q, k, _ = torch.split(qkv, [spec.q_size, spec.kv_size, spec.kv_size], dim=1)
            q.copy_(norm_q(q))
            k.copy_(norm_k(k))
            return qkv

        return _then(clamp, norm)

    def _norm_part(self, name: str, heads: int) -> Rowwise:
        """Norm of [rows, heads * head_dim], over all or over each head, then a weight for each number."""
        spec, ops = self.spec, self._ops
        weight = self._head_weights(name, "weight", heads)
        bias = self._head_weights(name, "bias", heads) if spec.qk_norm_bias else None
        ones = torch.ones(len(weight) if spec.qk_norm == "row" else spec.head_dim).to(weight)

        def norm(part: Tensor) -> Tensor:
            x = part.reshape(-1, len(ones)).contiguous()
            if spec.qk_norm == "row" and not self._across.alone:
                assert spec.norm == "rms", "a layer norm over all heads, on several ranks"
                wide = x.float()
                x = (wide * torch.rsqrt(self._across.mean(wide.square()) + spec.norm_eps)).to(x.dtype)
            elif spec.norm == "rms":
                x = ops.rms_norm(x, ones, spec.norm_eps)
            else:
                x = ops.layer_norm(x, ones, None, spec.norm_eps)
            x = x.view(part.shape) * weight
            return x if bias is None else x + bias

        return norm

    def _head_weights(self, name: str, which: str, heads: int) -> Tensor:
        """[heads * head_dim], in the decoder's order."""
        if self.spec.qk_norm == "listed":
            return torch.cat([self._head_weight(f"{name}.norms.{i}.{which}") for i in range(heads)])
        stored = self._head_weight(f"{name}.{which}")
        return stored.repeat(heads) if self.spec.qk_norm == "head" else stored

    def _head_weight(self, name: str) -> Tensor:
        """One or more heads' weights, flat, in the decoder's order within each."""
        weight = self._norm_weight(name).view(-1, self.spec.head_dim)
        order = head_order(self.spec)
        if order is not None:
            weight = weight[:, torch.tensor(order, device=weight.device)]
        return weight.flatten()


def _unnormed(x: Tensor, residual: Tensor | None = None) -> Tensor:
    return x if residual is None else residual.add_(x)


def _columns(order: Sequence[int]) -> Rowwise:
    @cache
    def wanted(device: torch.device) -> Tensor:  # copied once: a copy in every step would wait for the device
        return torch.tensor(order, device=device)

    return lambda x: x.index_select(1, wanted(x.device))


def _scaled(factor: float) -> Rowwise:
    return lambda x: x * factor


def _then(first: Rowwise | None, second: Rowwise) -> Rowwise:
    return second if first is None else lambda x: second(first(x))
