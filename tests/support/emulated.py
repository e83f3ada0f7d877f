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
from gristmill.engine.attention.native_work import ITEM_FIELDS, MERGE_FIELDS, QUERY_FIELDS
from gristmill.engine.batch import Int32
from gristmill.engine.native import build
from gristmill.engine.native.library import Library
from gristmill.engine.native.sampling import NativeSampling
from gristmill.schemas.settings import default_home

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
INTEGER, REAL, BUFFER = 0, 1, 2
RMS_NORM, SILU_MUL, ATTEND, SAMPLE = range(4)


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
        self.attend_raw = self._run_attend

    def _run_norm(self, *given: Any) -> None:
        row = given[6] * self._element
        self._arm.call(RMS_NORM, given, {**dict.fromkeys((1, 2, 3), given[5] * row), 4: row})

    def _run_silu(self, *given: Any) -> None:
        half = given[3] * given[4] * self._element
        self._arm.call(SILU_MUL, given, {1: half, 2: 2 * half})

    def _run_attend(self, *given: Any) -> None:
        rows, (n_items, n_merges, width) = given[12], (given[15], given[17], given[19])
        heads, kv_heads, dim, block = given[25:29]
        items = _ints(given[14], n_items * ITEM_FIELDS).reshape(-1, ITEM_FIELDS)
        n_queries, n_tables = int((items[:, 0] + items[:, 1]).max()), int(items[:, 2].max()) + 1
        queries = _ints(given[13], n_queries * QUERY_FIELDS).reshape(-1, QUERY_FIELDS)
        tables = _ints(given[18], n_tables * width).reshape(-1, width)
        used = max(tables[item[2], : -(-item[4] // block)].max() for item in items)
        positions = np.ctypeslib.as_array((ctypes.c_int64 * rows).from_address(given[6]))
        angles, row = (int(positions.max()) + 1) * (dim // 2) * 4, dim * self._element
        sizes = {1: rows * heads * row, 2: rows * (heads + 2 * kv_heads) * row, 5: rows * 8, 6: rows * 8}
        sizes |= {7: angles, 8: angles, 9: row, 10: row, 13: queries.nbytes, 14: items.nbytes}
        sizes |= {16: n_merges * MERGE_FIELDS * 4, 18: tables.nbytes, 24: heads * 4}
        sizes[20] = (int(queries[:, 2].max()) + 1) * heads * (-(-dim // 16) * 16 + 2) * 4
        cache = self._cache(int(used) + 1, kv_heads, dim, block, packed=given[30])
        self._arm.call(ATTEND, given, sizes | dict(zip((3, 4, 31, 32), cache, strict=True)))

    def _cache(self, blocks: int, kv_heads: int, dim: int, block: int, *, packed: int) -> tuple[int, ...]:
        """Bytes of keys, values, and the scales of both."""
        tokens = blocks * kv_heads * block
        kept = tokens * (-(-dim // 16) * 16) * (1 if packed else self._element)
        return kept, kept, 4 * tokens, 4 * tokens


def _ints(place: int, count: int) -> Int32:
    return np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(place))


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
