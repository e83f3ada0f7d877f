"""Whether an exception means that memory ran out: what the engine answers by asking for less."""

from __future__ import annotations

import errno

import torch

OUT_OF_MEMORY = "out_of_memory"
"""Error code of a sequence, or of an engine, for which there is not enough memory."""
_CPU_ALLOCATOR = "DefaultCPUAllocator"


class OutOfStep(Exception):
    """Memory ran out on one of several ranks in the middle of a step: the others cannot know, and wait."""

    def __init__(self, ranks: int) -> None:
        super().__init__(
            f"memory ran out on one of {ranks} ranks, which cannot try a smaller step together; "
            "lower max_batch_prefill_tokens or memory_fraction, or add memory"
        )


def is_out_of_memory(exc: BaseException) -> bool:
    """An allocation failed, on a device or on the host, in torch or outside of it.

    torch's CPU allocator throws a plain RuntimeError: no class, no code. Its text is all there is, so this is
    the one place that looks at a text.
    """
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(exc, OSError):
        return exc.errno == errno.ENOMEM
    return type(exc) is RuntimeError and _CPU_ALLOCATOR in str(exc)
