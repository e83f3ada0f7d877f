"""Frames on the socket between the engine process and its consumer, and between rank 0 and the other ranks.

A frame is the length of what follows (4 bytes, big-endian), one byte for the type, and msgpack.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

import msgspec

from .messages import Abort, Add, Command, Failed, Ready, Report, Step, Stop, Taken
from .parallel.messages import Adapt, Feed, Load, Reserve, Save, Told

MAX_FRAME_BYTES = 256 * 1024 * 1024
"""Far above any real message: a longer one means that the two ends have lost step."""
RECEIVE_BYTES = 256 * 1024
HEAD = struct.Struct(">I")
Message = Command | Report | Told
KINDS: tuple[type[Message], ...] = (
    *(Add, Abort, Stop, Ready, Taken, Step, Failed),
    *(Feed, Adapt, Reserve, Save, Load),
)
_DECODERS = tuple(msgspec.msgpack.Decoder(kind) for kind in KINDS)
_CODES = {kind: code for code, kind in enumerate(KINDS)}
_ENCODER = msgspec.msgpack.Encoder()


class BrokenFrame(Exception):
    """What came through the pipe is not a frame of ours."""


def encode(message: Message) -> bytes:
    """``message`` as one frame."""
    body = _ENCODER.encode(message)
    return HEAD.pack(1 + len(body)) + bytes([_CODES[type(message)]]) + body


class FrameReader:
    """Bytes in, messages out."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are complete with ``data``. Raises BrokenFrame."""
        self._buffer += data
        start = 0
        while len(self._buffer) - start >= HEAD.size:
            (size,) = HEAD.unpack_from(self._buffer, start)
            if not 1 <= size <= MAX_FRAME_BYTES:
                raise BrokenFrame(f"a frame of {size:,} bytes")
            end = start + HEAD.size + size
            if len(self._buffer) < end:
                break
            yield _decode(self._buffer[start + HEAD.size], self._buffer[start + HEAD.size + 1 : end])
            start = end
        del self._buffer[:start]


def read(sock: socket.socket) -> Iterator[Message]:
    """Messages until the other end closes. Blocks. Raises BrokenFrame."""
    frames = FrameReader()
    while data := sock.recv(RECEIVE_BYTES):
        yield from frames.feed(data)


def _decode(code: int, body: bytearray) -> Message:
    try:
        return _DECODERS[code].decode(body)
    except (IndexError, msgspec.MsgspecError) as exc:
        raise BrokenFrame(f"a frame of type {code} and {len(body):,} bytes: {exc}") from exc
