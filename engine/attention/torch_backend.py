"""Paged attention in plain torch: any device, any dtype, never a padded batch. The kernels' fallback."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..batch import Batch, tensor
from ..kv_cache import KVCache
from ..kv_numbers import Numbers, dequantize, quantize
from ..layers.elementwise import TorchElementwise
from ..layers.rope import rotate, tables
from ..models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class _Span:
    """One sequence of the step: its rows, and the flat cache slots of its keys."""

    first: int
    count: int
    start: int
    slots: Tensor

    def rows(self) -> Iterator[_Span]:
        """The same, one row each, with the keys that row sees."""
        for i in range(self.count):
            yield _Span(self.first + i, 1, self.start + i, self.slots[: self.start + i + 1])


class _Plain:
    """Keys or values of a layer by slot, [kv_heads, head_dim] each."""

    def __init__(self, blocks: Tensor) -> None:
        self._flat = blocks.flatten(0, 1)

    def put(self, slots: Tensor, x: Tensor) -> None:
        self._flat.index_copy_(0, slots, x)

    def take(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        del dtype  # theirs
        return self._flat[slots]


class _Scaled:
    """The same in fewer bits. Seen as bytes: indexing is not there for every kind of number."""

    def __init__(self, blocks: Tensor, scales: Tensor, numbers: Numbers) -> None:
        self._flat, self._scales, self._numbers = blocks.flatten(0, 1).view(torch.uint8), scales, numbers

    def put(self, slots: Tensor, x: Tensor) -> None:
        kept, scales = quantize(x, self._numbers)
        self._flat.index_copy_(0, slots, kept.view(torch.uint8))
        self._scales[self._place(slots)] = scales

    def take(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        kept = self._flat[slots].view(self._numbers.dtype)
        return dequantize(kept, self._scales[self._place(slots)], dtype)

    def _place(self, slots: Tensor) -> tuple[Tensor, slice, Tensor]:
        size = self._scales.shape[-1]
        return slots // size, slice(None), slots % size


class TorchAttention:
    """Cache as flat slots; per sequence one gather and one scaled_dot_product_attention.

    The query heads of a group are rows against their one key head, so that keys are never repeated in decode.
    """

    name = "torch"
    graphs = False

    def __init__(
        self,
        spec: ModelSpec,
        block_size: int,
        max_len: int,
        device: torch.device,
        *,
        uniform: bool = False,
        numbers: Numbers | None = None,
    ) -> None:
        """``uniform``: each row by itself, as if it were decoded; slow.

        ``numbers``: keys and values in fewer bits.
        """
        self._numbers = numbers
        self.spec, self.block_size, self.device, self._uniform = spec, block_size, device, uniform
        self._angles = {
            rope: tuple(table.to(device) for table in tables(rope, spec.head_dim, max_len))
            for rope in dict.fromkeys(spec.ropes)
            if rope
        }
        self._norm = TorchElementwise().rms_norm
        self._is_bent = bool(spec.alibi) or spec.softcap is not None
        self._slopes = torch.tensor(spec.alibi, device=device)[:, None, None] if spec.alibi else None

    def block_shape(self) -> tuple[int, ...]:
        return (self.block_size, self.spec.num_kv_heads, self.spec.head_dim)

    def use(self, cache: KVCache) -> None:
        numbers = self._numbers
        self._keys: Sequence[_Plain | _Scaled] = [_Plain(keys) for keys in cache.keys]
        self._values: Sequence[_Plain | _Scaled] = [_Plain(values) for values in cache.values]
        if numbers:
            self._keys = [_Scaled(*pair, numbers) for pair in zip(cache.keys, cache.key_scales, strict=True)]
            self._values = [
                _Scaled(*pair, numbers) for pair in zip(cache.values, cache.value_scales, strict=True)
            ]

    def begin(self, batch: Batch) -> None:
        self._slots = batch.slots
        self._step_angles = {
            rope: tuple(table[batch.positions].unsqueeze(1) for table in angles)
            for rope, angles in self._angles.items()
        }
        slots = self._context_slots(batch)
        rows = zip(batch.first_row.tolist(), batch.counts.tolist(), batch.starts.tolist(), slots, strict=True)
        self._spans = [_Span(*row) for row in rows]
        if self._uniform:
            self._spans = [row for span in self._spans for row in span.rows()]

    def attend(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        spec = self.spec
        heads = qkv.view(len(qkv), -1, spec.head_dim)
        q, k, v = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if q_norm is not None and k_norm is not None:
            q, k = self._norm(q, q_norm, spec.norm_eps), self._norm(k, k_norm, spec.norm_eps)
        if (rope := spec.ropes[layer]) is not None:
            cos, sin = self._step_angles[rope]
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        keys, values = self._keys[layer], self._values[layer]
        keys.put(self._slots, k)
        values.put(self._slots, v)
        out = torch.empty_like(q)
        window = spec.windows[layer]
        for span in self._spans:
            rows = slice(span.first, span.first + span.count)
            oldest = 0 if window is None else max(0, span.start + 1 - window)
            slots = span.slots[oldest:]
            attend = self._bent if self._is_bent else self._one_row if span.count == 1 else self._many_rows
            queries = q[rows].clone() if self._uniform else q[rows]  # at an allocation's alignment
            k, v = keys.take(slots, q.dtype), values.take(slots, q.dtype)
            out[rows] = attend(queries, k, v, span.start - oldest, window)
        return out.view(len(qkv), -1)

    def _one_row(self, q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None) -> Tensor:
        """Decode: every key left is visible. q: [1, heads, dim]; k, v: [context, kv_heads, dim]."""
        del start, window
        rows = q.view(1, self.spec.num_kv_heads, self.spec.group, self.spec.head_dim)
        out = nnf.scaled_dot_product_attention(
            rows, k.transpose(0, 1)[None], v.transpose(0, 1)[None], scale=self.spec.scale
        )
        return out.view_as(q)

    def _many_rows(self, q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None) -> Tensor:
        """Prefill of ``count`` rows, the first of them at ``start``."""
        group, count, context = self.spec.group, len(q), len(k)
        k, v = (x.transpose(0, 1).repeat_interleave(group, 0)[None] for x in (k, v))
        queries = q.transpose(0, 1)[None]
        if start == 0 and (window is None or window >= context):
            out = nnf.scaled_dot_product_attention(queries, k, v, is_causal=True, scale=self.spec.scale)
        else:
            at = torch.arange(start, start + count, device=q.device)[:, None]
            seen = torch.arange(context, device=q.device)[None]
            mask = seen <= at
            if window is not None:
                mask &= seen > at - window
            out = nnf.scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=self.spec.scale)
        return out[0].transpose(0, 1)

    def _bent(self, q: Tensor, k: Tensor, v: Tensor, start: int, window: int | None) -> Tensor:
        """Any number of rows where more happens to scores than scaling: softcap, then ALiBi. In float32."""
        spec, count, context = self.spec, len(q), len(k)
        rows = q.float().view(count, spec.num_kv_heads, spec.group, spec.head_dim)
        scores = torch.einsum("qkgd,ckd->kgqc", rows, k.float()).flatten(0, 1) * spec.scale
        if spec.softcap is not None:
            scores = (scores / spec.softcap).tanh() * spec.softcap
        at = torch.arange(start, start + count, device=q.device)[:, None]
        back = at - torch.arange(context, device=q.device)[None]
        if self._slopes is not None:
            scores = scores - self._slopes * back
        hidden = back < 0 if window is None else (back < 0) | (back >= window)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        weights = weights.view(spec.num_kv_heads, spec.group, count, context)
        return torch.einsum("kgqc,ckd->qkgd", weights, v.float()).reshape(q.shape).to(q.dtype)

    def _context_slots(self, batch: Batch) -> tuple[Tensor, ...]:
        """Per sequence the flat slots of all its keys, in one copy to the device."""
        contexts = batch.contexts
        owner = np.repeat(np.arange(len(contexts)), contexts)
        place = np.arange(int(contexts.sum())) - np.repeat(np.cumsum(contexts) - contexts, contexts)
        blocks = batch.tables[owner, place // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + place % self.block_size
        return torch.split(tensor(slots, self.device), contexts.tolist())
