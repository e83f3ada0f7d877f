"""The key/value tensors, and how many blocks of them the memory takes."""

from __future__ import annotations

import contextlib
import mmap
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

CPU_FRACTION = 0.5
"""Of the memory free after the warm-up: the page cache and other processes want some too."""
CPU_LIMIT_BYTES = 4 * 1024**3
COPIES_MEASURED = 8
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class KVCache:
    """Per layer one tensor of keys and one of values; [blocks, ...as the backend likes].

    Numbers in fewer bits (kv_numbers.py) have scales, with every backend float32 [blocks, kv_heads,
    block_size].
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    num_blocks: int
    key_scales: tuple[Tensor, ...] = ()
    value_scales: tuple[Tensor, ...] = ()

    @classmethod
    def allocate(
        cls,
        layers: int,
        num_blocks: int,
        block_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        scales: tuple[int, ...] = (),
    ) -> KVCache:
        """``scales``: the shape of a block's, where there are any.

        Zeroed memory. On CPU it is reserved only: a page costs memory when its first token is written."""
        made = [_zeros(2 * layers, (num_blocks, *block_shape), dtype, device)]
        if scales:
            made.append(_zeros(2 * layers, (num_blocks, *scales), torch.float32, device))
        keys, values, *scaled = [
            part for both in made for part in (tuple(both[:layers]), tuple(both[layers:]))
        ]
        return cls(keys, values, num_blocks, *scaled)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that a block is made of."""
        return (*self.keys, *self.values, *self.key_scales, *self.value_scales)


class HostBlocks:
    """A second place for blocks in the host's memory: slots that whole blocks are copied to and from.

    Copies take their place among the device's other work, in the order of the calls; nothing waits for them.
    """

    def __init__(self, cache: KVCache, capacity: int) -> None:
        self._device = cache.tensors
        pinned = any(tensor.is_cuda for tensor in self._device)
        self._host = [
            torch.empty((capacity, *tensor.shape[1:]), dtype=tensor.dtype, pin_memory=pinned)
            for tensor in self._device
        ]

    def save(self, block: int, slot: int) -> None:
        for device, host in zip(self._device, self._host, strict=True):
            host[slot].copy_(device[block], non_blocking=True)

    def load(self, slot: int, block: int) -> None:
        for device, host in zip(self._device, self._host, strict=True):
            device[block].copy_(host[slot], non_blocking=True)

    def measure_s(self) -> float:
        """Seconds to move a block one way. Overwrites a few slots; blocks keep what they hold."""
        count = min(COPIES_MEASURED, len(self._host[0]), len(self._device[0]))
        best = float("inf")
        for _ in range(3):
            started = time.monotonic()
            for at in range(count):
                self.save(at, at)
            for at in range(count):
                self.load(at, at)
            if self._device[0].is_cuda:
                torch.cuda.synchronize(self._device[0].device)
            best = min(best, (time.monotonic() - started) / (2 * count))
        return best


def block_bytes(
    layers: int, block_shape: tuple[int, ...], dtype: torch.dtype, scales: tuple[int, ...] = ()
) -> int:
    """Bytes of one block: keys and values of all layers, and their scales."""
    numbers = prod(block_shape) * dtype.itemsize
    return 2 * layers * (numbers + (prod(scales) * torch.float32.itemsize if scales else 0))


def spare_bytes(device: torch.device, fraction: float) -> int:
    """What the KV cache may take, asked right after the largest step has been run (but see ``is_plentiful``).

    CUDA: ``fraction`` of the card, less the peak seen and what others hold. CPU: half of what is free once
    the step's peak is set aside, at most 4 GiB.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        stats = torch.cuda.memory_stats(device)
        reserved, peak = stats["reserved_bytes.all.current"], stats["allocated_bytes.all.peak"]
        others = total - free - reserved
        return int(total * fraction) - others - peak
    return min(CPU_LIMIT_BYTES, int(CPU_FRACTION * max(0, available_bytes() - step_peak_bytes())))


def is_plentiful(device: torch.device, step_bytes: int) -> bool:
    """Whether ``spare_bytes`` says the same after any step of up to ``step_bytes``: a CPU with memory."""
    return device.type == "cpu" and CPU_FRACTION * (available_bytes() - step_bytes) >= CPU_LIMIT_BYTES


def step_peak_bytes() -> int:
    """What this process once used above what it uses now, and will use again. 0 where /proc does not say.

    Not getrusage's ru_maxrss: a new program inherits it from whoever started it.
    """
    peak, now = _kernel_says("/proc/self/status", "VmHWM"), _kernel_says("/proc/self/status", "VmRSS")
    return 0 if peak is None or now is None else max(0, peak - now)


def available_bytes() -> int:
    """Memory this process could still take: the machine's, or its container's if that is less."""
    free = _kernel_says("/proc/meminfo", "MemAvailable") or torch.iinfo(torch.int64).max
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        bound, taken = _number(limit), _number(used)
        if bound is not None and taken is not None:
            free = min(free, max(0, bound - taken))
    return free


def _zeros(count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    if device.type == "cpu":
        return _reserve(count, shape, dtype)
    return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(count)]


def _reserve(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """One anonymous mapping cut into tensors, in huge pages where the system gives them.

    Blocks are scattered: with 4 KiB pages each would cost TLB misses.
    """
    size = prod(shape) * dtype.itemsize
    step = -(-size // _PAGE) * _PAGE
    memory = mmap.mmap(-1, max(step * count, _PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: slower, not wrong
            memory.madvise(mmap.MADV_HUGEPAGE)
    return [
        torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=i * step).view(shape)
        for i in range(count)
    ]


def _kernel_says(path: str, field: str) -> int | None:
    """Bytes, from a file whose lines read ``VmRSS:   1234 kB``."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def _number(path: str) -> int | None:
    """The integer in a cgroup file; None where there is no such file or no limit ("max")."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None
