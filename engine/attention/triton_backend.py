"""Paged attention by our Triton kernels. What it computes is written down in ``torch_backend``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..batch import Batch, Frame, Int32, tensor
from ..gpu import attention as kernels
from ..kv_cache import KVCache
from ..kv_numbers import Numbers
from ..models.spec import ModelSpec
from .rope_store import RopeStore, power_of_two

SPLIT_TOKENS = 512
"""Short tiles with more keys than this are cut at multiples of it, computed in parallel and merged. The cut
depends on the row's own length only, so that a sequence's arithmetic is the same in any batch."""
RUNS_AT_ONCE = 16
"""Runs that a program of the merge reads together."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows (tokens x heads of a group) and keys that a program holds at a time, and how it is compiled."""

    rows: int
    keys: int
    warps: int
    stages: int


def tiles(spec: ModelSpec, dtype: torch.dtype) -> tuple[Tile, Tile]:
    """For prompts, which are bound by arithmetic, and for a token or a few, bound by reading keys."""
    group, dim = power_of_two(spec.group), spec.head_dim
    few = max(16, group)
    if dtype.itemsize == 4:
        return Tile(max(32, group), 32, 8, 2), Tile(few, 32, 4, 2)
    if dim > 128:
        return Tile(max(64, group), 32, 8, 2), Tile(few, 32, 4, 2)
    return Tile(max(128, group), 64, 4 if dim <= 64 else 8, 3), Tile(few, 64, 4, 3)


@dataclass(frozen=True, slots=True)
class Items:
    """Tiles of one size: tokens of one sequence each. The kernel's columns are written down beside it."""

    columns: Tensor
    """[4, n] int32: first row, tokens, block table, first part."""
    contexts: Tensor
    """[n] int32."""
    most: int
    """Tokens in one of them."""
    longest: int
    """Keys that one of them may see."""
    parts: int
    """Places of scratch, of each head a vector and a weight."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of a step share, on the device."""

    positions: Tensor
    slots: Tensor
    tables: Tensor
    long: Items | None
    short: Items | None
    partial: Tensor
    lse: Tensor


class TritonAttention:
    """Blocks are [tokens, kv heads, head dim]; the query heads of a group are rows against their key head.

    A step is two kinds of tiles: long ones of prompts, each against all its keys, and short ones, whose keys
    are cut into runs of ``split`` that are computed in parallel.
    """

    name = "triton"
    graphs = True

    def __init__(
        self,
        spec: ModelSpec,
        block_size: int,
        max_len: int,
        device: torch.device,
        *,
        split: int = SPLIT_TOKENS,
        numbers: Numbers | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``dtype``: of queries, where keys are kept as other ``numbers``."""
        self.spec, self.block_size, self.device, self._split = spec, block_size, device, split
        self._rope_store = RopeStore(spec, block_size, max_len, device, numbers)
        self._scaled, self._dtype = numbers is not None, dtype
        self._slopes = torch.tensor(spec.alibi or (0.0,), dtype=torch.float32, device=device)
        self._columns: dict[tuple[int, int], Tensor] = {}
        self._wide = max(16, power_of_two(spec.head_dim))  # the least that a matrix unit multiplies

    def block_shape(self) -> tuple[int, ...]:
        return (self.block_size, self.spec.num_kv_heads, self.spec.head_dim)

    def use(self, cache: KVCache) -> None:
        self._cache = cache
        self._rope_store.use(cache)
        self._long, self._short = tiles(self.spec, self._dtype or cache.keys[0].dtype)
        assert self._split % self._short.keys == 0, f"{self._split} is no multiple of {self._short.keys}"

    def begin(self, batch: Batch) -> None:
        if batch.frame is not None:
            tables, long, short = batch.frame.tables, None, self._framed(batch.frame)
        else:
            tables, long, short = self._packed(batch)
        parts = short.parts if short else 0
        heads, dim = self.spec.num_heads, self.spec.head_dim
        partial = torch.empty(parts, heads, dim, dtype=torch.float32, device=self.device)
        lse = torch.empty(parts, heads, dtype=torch.float32, device=self.device)
        self._step = _Step(batch.positions, batch.slots, tables, long, short, partial, lse)

    def attend(self, layer: int, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None) -> Tensor:
        assert qkv.is_contiguous()
        step, window = self._step, self.spec.windows[layer]
        self._rope_store(layer, qkv, step.positions, step.slots, q_norm, k_norm)
        out = qkv.new_empty(len(qkv), self.spec.q_size)
        if step.long:
            self._launch(layer, out, qkv, step.long, self._long, 0)
        if step.short:
            self._launch(layer, out, qkv, step.short, self._short, self._split)
            if self._runs(step.short, window) > 1:
                self._merge(out, step.short, window)
        return out

    # ---- launches

    def _launch(self, layer: int, out: Tensor, qkv: Tensor, items: Items, tile: Tile, split: int) -> None:
        spec, step, window = self.spec, self._step, self.spec.windows[layer]
        runs = self._runs(items, window) if split else 1
        kernels.attend[(len(items.contexts), spec.num_kv_heads, runs)](
            out,
            step.partial,
            step.lse,
            qkv,
            self._cache.keys[layer],
            self._cache.values[layer],
            step.tables,
            items.columns,
            items.contexts,
            self._slopes,
            *self._rope_store.scales(layer),
            len(items.contexts),
            step.tables.shape[1],
            spec.scale,
            spec.softcap or 0.0,
            HEADS=spec.num_heads,
            KV_HEADS=spec.num_kv_heads,
            DIM=spec.head_dim,
            WIDE=self._wide,
            PAGE=self.block_size,
            WINDOW=window or 0,
            SPLIT=split,
            SOFTCAP=spec.softcap is not None,
            ALIBI=bool(spec.alibi),
            BLOCK_M=tile.rows,
            BLOCK_N=tile.keys,
            SCALED=self._scaled,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def _merge(self, out: Tensor, items: Items, window: int | None) -> None:
        spec, step = self.spec, self._step
        kernels.merge[(len(items.contexts), items.most, spec.num_heads)](
            out,
            step.partial,
            step.lse,
            items.columns,
            items.contexts,
            len(items.contexts),
            HEADS=spec.num_heads,
            DIM=spec.head_dim,
            WIDE=self._wide,
            WINDOW=window or 0,
            SPLIT=self._split,
            BLOCK_P=RUNS_AT_ONCE,
            num_warps=2,
        )

    def _runs(self, items: Items, window: int | None) -> int:
        """Into how many an item's keys are cut at most: those behind the window are not looked at."""
        runs = -(-items.longest // self._split)
        seen = runs if window is None else -(-(window + items.most - 1) // self._split) + 1
        return max(1, min(runs, seen))

    # ---- a step as items

    def _framed(self, frame: Frame) -> Items:
        runs = -(-frame.longest // self._split)
        columns = self._columns.get((frame.rows, runs))
        if columns is None:
            row, one = np.arange(frame.rows, dtype=np.int32), np.ones(frame.rows, np.int32)
            columns = tensor(np.stack([row, one, row, row * runs]), self.device)
            self._columns[frame.rows, runs] = columns
        return Items(columns, frame.contexts, 1, frame.longest, frame.rows * runs if runs > 1 else 0)

    def _packed(self, batch: Batch) -> tuple[Tensor, Items | None, Items | None]:
        """Block tables and items of a step, in one copy to the device."""
        few = batch.counts * self.spec.group <= self._short.rows
        long = cut(batch, ~few, self._long.rows // self.spec.group)
        short = cut(batch, few, self._short.rows // self.spec.group)
        counts, contexts = short[1], short[4]
        places = np.where(contexts > self._split, -(-contexts // self._split) * counts, 0)
        short[3, 1:] = np.cumsum(places)[:-1]
        whole = tensor(np.concatenate([part.ravel() for part in (batch.tables, long, short)]), self.device)
        first, second = batch.tables.size, batch.tables.size + long.size
        return (
            whole[:first].view(batch.tables.shape),
            _items(long, whole[first:second].view(long.shape), 0),
            _items(short, whole[second:].view(short.shape), int(places.sum())),
        )


def cut(batch: Batch, chosen: NDArray[np.bool_], most: int) -> Int32:
    """[5, n]: the chosen sequences' tokens, ``most`` an item: first row, tokens, block table, 0, context.

    Items with many keys come first: the longest work.
    """
    owner = np.flatnonzero(chosen).astype(np.int32)
    pieces = -(-batch.counts[owner] // most)
    table = np.repeat(owner, pieces)
    begin = (np.arange(len(table)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * most
    count = np.minimum(most, batch.counts[table] - begin)
    columns = [batch.first_row[table] + begin, count, table, 0 * table, batch.starts[table] + begin + count]
    items = np.stack(columns).astype(np.int32)
    return items[:, np.argsort(-items[4], kind="stable")]


def _items(host: Int32, device: Tensor, parts: int) -> Items | None:
    if not host.shape[1]:
        return None
    return Items(device[:4], device[4], int(host[1].max()), int(host[4].max()), parts)
