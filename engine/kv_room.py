"""The memory for keys and values: how many blocks there is room for, and the tensors that hold them."""

from __future__ import annotations

import logging

import torch

from ..schemas.errors import Misconfigured
from .attention.backend import Attention
from .kv_cache import HostBlocks, KVCache, block_bytes, spare_bytes
from .kv_numbers import Numbers
from .memory import is_out_of_memory
from .parallel.blocks import SharedBlocks
from .parallel.ranks import Ranks
from .settings import EngineSettings

log = logging.getLogger(__name__)


class KVRoom:
    """Of one rank. Whatever changes, ``attention`` uses the tensors that are there."""

    def __init__(
        self,
        attention: Attention,
        layers: int,
        kv_heads: int,
        numbers: Numbers | None,
        dtype: torch.dtype,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        """``kv_heads``: this rank's. ``numbers``: how keys and values are kept, if not as ``dtype``."""
        self._attention, self._layers, self._device, self._ranks = attention, layers, device, ranks
        self._dtype = numbers.dtype if numbers else dtype
        self._scales = (kv_heads, attention.block_size) if numbers else ()
        self.block_bytes = block_bytes(layers, attention.block_shape(), self._dtype, self._scales)

    def use(self, num_blocks: int) -> None:
        """Allocate so many blocks, for those that there were before."""
        self._cache = KVCache.allocate(
            self._layers, num_blocks, self._attention.block_shape(), self._dtype, self._device, self._scales
        )
        self._attention.use(self._cache)

    def fill(self, settings: EngineSettings, longest: int) -> int:
        """Allocate what is useful and fits beside what has been computed with; returns how many blocks.

        ``longest``: tokens of one sequence. Every rank calls it at the same time, and all have as many.
        Raises Misconfigured.
        """
        self._block_bytes_of_all = self._ranks.total(self.block_bytes)
        size = self._attention.block_size
        blocks = settings.max_num_seqs * -(-longest // size)
        if settings.max_batch_total_tokens:
            blocks = min(blocks, settings.max_batch_total_tokens // size)
        else:
            spare = spare_bytes(self._device, settings.memory_fraction)
            if self._device.type == "cpu":
                spare //= self._ranks.size  # they share what there is
            blocks = min(blocks, spare // self.block_bytes)
        if blocks < 1:
            raise Misconfigured(
                f"no memory is left for the KV cache (a block is {self.block_bytes:,} bytes); "
                "use a smaller model, lower max_batch_prefill_tokens, or raise memory_fraction"
            )
        fitted = self._fit(blocks)
        least = self._ranks.least(fitted)
        if least < fitted:
            self.use(least)
        return least

    def _fit(self, num_blocks: int) -> int:
        """Allocate so many blocks, or half, or half of that … Returns how many. Raises Misconfigured."""
        blocks = num_blocks
        while True:
            try:
                self.use(blocks)
            except Exception as exc:
                if not is_out_of_memory(exc):
                    raise
                if blocks < 2:
                    raise Misconfigured(
                        f"no memory for a KV cache of {num_blocks} blocks of {self._attention.block_size} "
                        "tokens, nor for one block; lower max_batch_total_tokens or memory_fraction, or add "
                        "memory"
                    ) from exc
            else:
                return blocks
            self.free_caches()
            log.warning("runner.cache_halved", extra={"blocks": blocks // 2, "wanted": num_blocks})
            blocks //= 2

    def free_caches(self) -> None:
        """Give memory back that torch keeps for the next allocation."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def host_blocks(self, gib: float) -> tuple[HostBlocks, int] | None:
        """A place for so many bytes of blocks, on all ranks, and how many those are. None: not even one."""
        count = int(gib * 1024**3) // self._block_bytes_of_all
        return (self.reserve(count), count) if count else None

    def reserve(self, count: int) -> HostBlocks:
        """A place for so many blocks. Raises Misconfigured."""
        try:
            if self._ranks.size > 1 and self._ranks.rank == 0:
                return SharedBlocks(self._cache, count, self._ranks.tell)
            return HostBlocks(self._cache, count)
        except Exception as exc:
            if not is_out_of_memory(exc):
                raise
            raise Misconfigured(
                f"no memory for {count} swapped blocks; lower swap_gib, or add memory: {exc}"
            ) from exc
