"""The native kernels compiled for ARM and run by qemu, call by call, in the place of the built library."""

from __future__ import annotations

import ctypes
import functools
import struct
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gristmill.engine.native import build
from gristmill.engine.native.library import Library
from gristmill.engine.native.sampling import NativeSampling
from gristmill.schemas.settings import default_home

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
INTEGER, REAL, BUFFER = 0, 1, 2
RMS_NORM, SILU_MUL, ROPE_STORE, ATTEND, SAMPLE = range(5)
ITEM_BYTES, MERGE_BYTES = 28, 12


class Arm:
    """The process that computes. Pointers are followed here: it gets bytes and gives them back changed."""

    def __init__(self, target: str) -> None:
        program = _compiled(target)
        self._process = subprocess.Popen([EMULATOR, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, function: int, arguments: tuple[Any, ...], sizes: Mapping[int, int]) -> None:
        """``sizes``: in bytes, of what the argument of that number points to."""
        assert self._process.stdin
        assert self._process.stdout
        parts = [struct.pack("qq", function, len(arguments))]
        buffers: list[tuple[int, int]] = []
        for index, value in enumerate(arguments):
            if index in sizes:
                size = sizes[index] if value else 0
                parts += [struct.pack("qq", BUFFER, size), ctypes.string_at(value, size) if size else b""]
                if size:
                    buffers.append((value, size))
            elif isinstance(value, float):
                parts.append(struct.pack("qd", REAL, value))
            else:
                parts.append(struct.pack("qq", INTEGER, value or 0))
        self._process.stdin.write(b"".join(parts))
        self._process.stdin.flush()
        for at, size in buffers:
            ctypes.memmove(at, self._process.stdout.read(size), size)


class EmulatedLibrary(Library):
    """Rows and blocks as far as a call's own arguments say that they are there."""

    lanes = 16

    def __init__(self, arm: Arm, dtype: torch.dtype) -> None:
        self._arm, self.dtype, self.threads = arm, dtype, 1
        self.wide = int(dtype == torch.float32)
        self._element = 4 if self.wide else 2
        self._norm, self._silu = self._run_norm, self._run_silu
        self.rope_store_raw, self.attend_raw = self._run_rope_store, self._run_attend

    def _run_norm(self, *given: Any) -> None:
        row = given[6] * self._element
        self._arm.call(RMS_NORM, given, {**dict.fromkeys((1, 2, 3), given[5] * row), 4: row})

    def _run_silu(self, *given: Any) -> None:
        half = given[3] * given[4] * self._element
        self._arm.call(SILU_MUL, given, {1: half, 2: 2 * half})

    def _run_rope_store(self, *given: Any) -> None:
        rows, heads, kv_heads, dim, block = given[11:16]
        of_rows = ctypes.c_int64 * rows
        slots, positions = (np.ctypeslib.as_array(of_rows.from_address(given[at])) for at in (4, 5))
        angles = (int(positions.max()) + 1) * (dim // 2) * 4
        sizes = {1: rows * (heads + 2 * kv_heads) * dim * self._element, 4: rows * 8, 5: rows * 8}
        sizes |= {6: angles, 7: angles, 8: dim * self._element, 9: dim * self._element}
        cache = self._cache(int(slots.max()) // block + 1, kv_heads, dim, block, packed=given[17])
        self._arm.call(ROPE_STORE, given, sizes | dict(zip((2, 3, 18, 19), cache, strict=True)))

    def _run_attend(self, *given: Any) -> None:
        n_items, n_merges, width = given[6], given[8], given[10]
        heads, kv_heads, dim, block = given[16:20]
        items = np.ctypeslib.as_array((ctypes.c_int32 * (7 * n_items)).from_address(given[5])).reshape(-1, 7)
        rows, parts = int((items[:, 0] + items[:, 1]).max()), int(items[:, 6].max()) + 1
        n_tables = int(items[:, 3].max()) + 1
        tables = np.ctypeslib.as_array((ctypes.c_int32 * (n_tables * width)).from_address(given[9]))
        used = [tables.reshape(-1, width)[item[3], : -(-item[5] // block)].max() for item in items]
        row = dim * self._element
        sizes = {1: rows * heads * row, 2: rows * (heads + 2 * kv_heads) * row, 5: n_items * ITEM_BYTES}
        sizes |= {7: n_merges * MERGE_BYTES, 9: n_tables * width * 4, 15: heads * 4}
        sizes |= {11: parts * heads * (-(-dim // 16) * 16 + 2) * 4}
        cache = self._cache(int(max(used)) + 1, kv_heads, dim, block, packed=given[22])
        self._arm.call(ATTEND, given, sizes | dict(zip((3, 4, 23, 24), cache, strict=True)))

    def _cache(self, blocks: int, kv_heads: int, dim: int, block: int, *, packed: int) -> tuple[int, ...]:
        """Bytes of keys, values, and the scales of both."""
        tokens = blocks * kv_heads * block
        kept = tokens * (-(-dim // 16) * 16) * (1 if packed else self._element)
        return kept, kept, 4 * tokens, 4 * tokens


class EmulatedSampling(NativeSampling):
    def __init__(self, arm: Arm) -> None:
        self._arm, self._threads = arm, 1
        self._sample = self._run

    def _run(self, places: int, wide: int, rows: int, vocab: int, *given: Any) -> None:
        at = np.ctypeslib.as_array((ctypes.c_uint64 * rows).from_address(places))
        floats = np.ctypeslib.as_array((ctypes.c_uint8 * rows).from_address(wide))
        sizes = [vocab * (4 if each else 2) for each in floats]
        logits = b"".join(ctypes.string_at(int(a), size) for a, size in zip(at, sizes, strict=True))
        held = ctypes.create_string_buffer(logits, len(logits))
        buffers = {0: len(logits), 1: rows, 4: rows * 24, 5: rows * 8, 6: rows * 8, 7: rows * 8}
        self._arm.call(SAMPLE, (ctypes.addressof(held), wide, rows, vocab, *given), buffers)


@functools.cache
def arm(target: str) -> Arm:
    """One process a target; it ends when the tests' does."""
    return Arm(target)


def _compiled(target: str) -> Path:
    """The program, kept like the libraries are."""
    source = Path(__file__).with_suffix(".cpp")
    sources = {**build.read_sources("kernels"), **build.read_sources("sampling"), "": source.read_bytes()}
    program = default_home() / "kernels" / f"{target}-{build.key(sources, target)}"
    if not program.exists():
        flags = [flag for flag in build.flags(target, "aarch64") if flag not in ("-fPIC", "-shared")]
        made = program.with_suffix(".new")
        headers = Path(build.__file__).parent
        command = [COMPILER, *flags, "-static", "-fopenmp", f"-I{headers}", str(source), "-o", str(made)]
        subprocess.run(command, check=True, timeout=build.BUILD_TIMEOUT_S)
        made.replace(program)
    return program
