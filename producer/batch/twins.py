"""Which rows of a file say the same as an earlier one, found on disk: memory does not grow with the file."""

from __future__ import annotations

import hashlib
import secrets
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import ExitStack
from typing import BinaryIO, Self, cast

from ...schemas.errors import Misconfigured

PARTS = 256
DIGEST_BYTES = 12
"""Two of ten million different keys share a digest with a chance of 1 in 10^15."""
WHERE_BYTES = 6
RECORD_BYTES = DIGEST_BYTES + WHERE_BYTES
BLOCK_BYTES = 228 * RECORD_BYTES


class Twins:
    """Takes a key for each row, and where the row is (any number that grows); tells those whose key an
    earlier one has.

    A key is kept as a salted digest, in one of many parts by its first byte, so that equal ones meet in a
    part that is small enough to sort: 18 bytes on disk for a row, and no look-ups while rows come. All parts
    share a file, block by block: a shell may allow a process no more than 256 of them.
    """

    def __init__(self) -> None:
        self._salt = secrets.token_bytes(16)
        self._buffers = [bytearray() for _ in range(PARTS)]
        self._stack = ExitStack()
        self._file: BinaryIO | None = None
        self._written = 0
        """Blocks in the file."""
        self._blocks = [array("L") for _ in range(PARTS)]
        """Which of them are whose."""

    def add(self, key: bytes, where: int) -> None:
        """Raises Misconfigured when the disk is full."""
        digest = hashlib.blake2b(key, digest_size=DIGEST_BYTES, key=self._salt).digest()
        part = digest[0]
        buffer = self._buffers[part]
        buffer += digest
        buffer += where.to_bytes(WHERE_BYTES, "big")
        if len(buffer) == BLOCK_BYTES:
            self._flush(part)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(where it is, where the first with its key is) of each but the first, in no promised order.

        Raises Misconfigured when the disk is full.
        """
        for part in range(PARTS):
            data = self._take(part)
            records = sorted(data[at : at + RECORD_BYTES] for at in range(0, len(data), RECORD_BYTES))
            first = b""
            for record in records:  # those of one key follow each other in order
                if record[:DIGEST_BYTES] == first[:DIGEST_BYTES]:
                    yield _where(record), _where(first)
                else:
                    first = record

    def _take(self, part: int) -> bytes:
        blocks: list[bytes] = []
        for block in self._blocks[part]:
            assert self._file is not None, "a block was written somewhere"
            try:
                self._file.seek(block * BLOCK_BYTES)  # writes what is buffered, the first time
                blocks.append(self._file.read(BLOCK_BYTES))
            except OSError as exc:
                raise temporary_full(exc) from exc
        return b"".join([*blocks, self._buffers[part]])

    def _flush(self, part: int) -> None:
        try:
            if self._file is None:
                file = tempfile.TemporaryFile(prefix="gristmill-")  # noqa: SIM115 - closed by the stack
                self._stack.callback(file.close)
                self._file = cast("BinaryIO", file)
            self._file.write(self._buffers[part])
        except OSError as exc:
            raise temporary_full(exc) from exc
        self._blocks[part].append(self._written)
        self._written += 1
        self._buffers[part].clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


class Lines:
    """A set of line numbers: a bit for each line up to the greatest."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self.count = 0

    def add(self, line: int) -> None:
        """It may be in already."""
        byte, bit = line >> 3, 1 << (line & 7)
        if byte >= len(self._bits):
            self._bits.extend(bytes(max(4096, byte + 1 - len(self._bits))))
        self.count += not self._bits[byte] & bit
        self._bits[byte] |= bit

    def __contains__(self, line: int) -> bool:
        byte = line >> 3
        return byte < len(self._bits) and bool(self._bits[byte] & 1 << (line & 7))


def _where(record: bytes) -> int:
    return int.from_bytes(record[DIGEST_BYTES:], "big")


def temporary_full(exc: OSError) -> Misconfigured:
    """The error for a directory of temporary files that takes no more."""
    return Misconfigured(
        f"cannot write to {tempfile.gettempdir()}: {exc.strerror}; make room there, or set TMPDIR"
    )
