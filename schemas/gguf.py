"""Read a GGUF file: its metadata, and where its tensors lie.

What their bytes mean is elsewhere: ``engine/quant/gguf_blocks.py`` in torch, ``backends/gguf_blocks.py`` in
numpy. Nothing writes GGUF here. The file is untrusted: every count and offset is checked against the size of
the file before it is used. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .errors import ModelInvalid

Metadata = dict[str, Any]

MAX_DIMENSIONS = 4

# Value type id -> struct code; 8 is a string and 9 an array, read by hand.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class Layout:
    """How ``block`` consecutive elements of a row are stored in ``size_bytes`` bytes."""

    name: str
    block: int
    size_bytes: int


LAYOUTS = {
    0: Layout("F32", 1, 4),
    1: Layout("F16", 1, 2),
    2: Layout("Q4_0", 32, 18),
    3: Layout("Q4_1", 32, 20),
    6: Layout("Q5_0", 32, 22),
    7: Layout("Q5_1", 32, 24),
    8: Layout("Q8_0", 32, 34),
    10: Layout("Q2_K", 256, 84),
    11: Layout("Q3_K", 256, 110),
    12: Layout("Q4_K", 256, 144),
    13: Layout("Q5_K", 256, 176),
    14: Layout("Q6_K", 256, 210),
    30: Layout("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file. ``shape`` is rows first (the file stores it the other way round)."""

    name: str
    shape: tuple[int, ...]
    layout: Layout
    offset: int

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) // self.layout.block * self.layout.size_bytes


class GgufFile:
    """An open GGUF file. ``metadata`` and ``tensors`` are read at once, tensor data when asked for.

    Raises ModelInvalid on anything that is not a well-formed file with layouts that we know.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: Metadata = {}
        self.tensors: dict[str, TensorInfo] = {}
        with path.open("rb") as file:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError as exc:
                raise ModelInvalid(f"{path}: the file is empty") from exc
        self._position = 0
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._map.close()

    def raw(self, name: str) -> bytes:
        """A tensor's bytes, a copy. Raises ModelInvalid if the file has no such tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise ModelInvalid(f"{self.path}: has no tensor {name}")
        return self._map[info.offset : info.offset + info.size_bytes]

    def _read_header(self) -> None:
        if self._take(4) != b"GGUF":
            raise ModelInvalid(f"{self.path}: not a GGUF file")
        version = self._scalar("I")
        if version not in (2, 3):
            raise ModelInvalid(f"{self.path}: GGUF version {version}; versions 2 and 3 are known")
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        for _ in range(field_count):
            name = self._string()
            self.metadata[name] = self._value(self._scalar("I"))
        infos = [self._tensor_info() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise ModelInvalid(f"{self.path}: alignment {str(alignment)[:80]}")
        start = -(-self._position // alignment) * alignment
        for info in infos:
            placed = TensorInfo(info.name, info.shape, info.layout, start + info.offset)
            if placed.offset + placed.size_bytes > len(self._map):
                raise ModelInvalid(f"{self.path}: tensor {info.name} reaches past the end of the file")
            self.tensors[info.name] = placed

    def _tensor_info(self) -> TensorInfo:
        name = self._string()
        dimensions = self._scalar("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ModelInvalid(f"{self.path}: tensor {name} has {dimensions} dimensions")
        sizes = [self._scalar("Q") for _ in range(dimensions)]
        kind, offset = self._scalar("I"), self._scalar("Q")
        layout = LAYOUTS.get(kind)
        if layout is None:
            known = ", ".join(each.name for each in LAYOUTS.values())
            raise ModelInvalid(f"{self.path}: tensor {name} has layout {kind}; known are {known}")
        if sizes[0] % layout.block:
            raise ModelInvalid(f"{self.path}: tensor {name} has rows of {sizes[0]}, not whole blocks")
        return TensorInfo(name, tuple(reversed(sizes)), layout, offset)

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(self._code(kind))
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind == STRING:
            return [self._string() for _ in range(count)]
        code = self._code(kind)
        return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize(f"<{code}"))))

    def _code(self, kind: int) -> str:
        code = SCALARS.get(kind)
        if (
            code is None
        ):  # nested arrays too: no model has them, and they would let a small file recurse deeply
            raise ModelInvalid(f"{self.path}: unknown metadata type {kind}")
        return code

    def _string(self) -> str:
        return self._take(self._scalar("Q")).decode("utf-8", errors="replace")

    def _scalar(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._map):
            raise ModelInvalid(f"{self.path}: cut short at byte {len(self._map)}")
        data = self._map[self._position : end]
        self._position = end
        return data
