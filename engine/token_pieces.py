"""What one token contributes to the text: read off the ``decoder`` of a tokenizer.json.

Three kinds cover the tokenizers of today's causal language models. Byte-level (GPT-2's): a token is a
string of bytes, and the text is all bytes decoded at once. SentencePiece's: a token is text with a mark for
blanks, or one byte. Any other: only the tokenizer's own decode knows.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, cast

from tokenizers import Tokenizer as Backend

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class ByteLevel:
    """Each character of a token stands for one byte."""


@dataclass(frozen=True, slots=True)
class SentencePiece:
    """``replaced`` in order on each token; ``<0x0A>`` is that byte if ``byte_fallback``.

    ``strip_left`` copies of ``strip_char`` are dropped from the start of the text. ``blank_first``: every
    blank mark of the very first token is dropped (Metaspace) instead.
    """

    replaced: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    strip_char: str = " "
    strip_left: int = 0
    blank_first: str = ""


@dataclass(frozen=True, slots=True)
class Other:
    """Not known here: decode a window of tokens and compare."""


Kind = ByteLevel | SentencePiece | Other


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself where it is printable Latin-1, else 256 and up in
    order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


ALPHABET = byte_alphabet()


def decoder_kind(decoder: dict[str, Any] | None) -> Kind:
    """Classify the ``decoder`` object of a tokenizer.json. Whatever is not exactly understood is Other."""
    match decoder:
        case {"type": "ByteLevel"}:
            return ByteLevel()
        case {"type": "Metaspace", "replacement": str(mark)}:
            first = "" if decoder.get("prepend_scheme") == "never" else mark
            return SentencePiece(replaced=((mark, " "),), blank_first=first)
        case {"type": "Sequence"}:
            return _sequence_kind(decoder["decoders"])
        case _:
            return Other()


def _sequence_kind(steps: list[dict[str, Any]]) -> Kind:
    """Replace*, then ByteFallback, then Fuse, then at most one Strip from the left: Llama 2's, Mistral's,
    Gemma's."""
    if len(steps) == 1:
        return decoder_kind(steps[0])
    replaced: list[tuple[str, str]] = []
    rest = list(steps)
    while rest and rest[0].get("type") == "Replace":
        pattern = rest[0]["pattern"].get("String")
        if pattern is None:
            return Other()
        replaced.append((pattern, rest.pop(0)["content"]))
    names = [step.get("type") for step in rest]
    if names[:2] != ["ByteFallback", "Fuse"] or names[2:] not in ([], ["Strip"]):
        return Other()
    strip: dict[str, Any] = rest[2] if len(rest) == 3 else {"content": " ", "start": 0, "stop": 0}
    if strip["stop"]:
        return Other()
    return SentencePiece(tuple(replaced), True, strip["content"], strip["start"])


@dataclass(slots=True)
class TokenPieces:
    """Bytes and texts of tokens, each computed once. ``backend`` is never changed after this was made."""

    backend: Backend
    kind: Kind = field(init=False)
    special_ids: frozenset[int] = field(init=False)
    _bytes: dict[int, bytes] = field(default_factory=dict[int, bytes])

    def __post_init__(self) -> None:
        decoder = self.backend.decoder
        state: bytes | None = decoder.__getstate__() if decoder is not None else None
        self.kind = decoder_kind(json.loads(state) if state else None)
        added = self.backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of one token in the middle of a text; a character may begin in one token and end in
        another.

        Special tokens give their written form; ids that the vocabulary does not have give nothing.
        """
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._bytes_of(token)
        return known

    def _bytes_of(self, token: int) -> bytes:
        written = self.backend.id_to_token(token)
        if written is None:
            return b""
        match self.kind:
            case ByteLevel():
                mapped = [ALPHABET.get(char) for char in written]
                # An added token may hold characters that stand for no byte: then all of it is plain text.
                return written.encode() if None in mapped else bytes(cast("list[int]", mapped))
            case SentencePiece():
                byte = self.byte_of(token)
                return self.text_of(token).encode() if byte is None else bytes([byte])
            case Other():
                return self.backend.decode([token], skip_special_tokens=False).encode()

    def byte_of(self, token: int) -> int | None:
        """The byte that a SentencePiece byte token stands for."""
        assert isinstance(self.kind, SentencePiece)
        text = self.text_of(token)
        match_ = BYTE_TOKEN.fullmatch(text) if self.kind.byte_fallback else None
        return int(match_[1], 16) if match_ else None

    def text_of(self, token: int) -> str:
        """A SentencePiece token with its blanks in place; empty for an unknown id."""
        assert isinstance(self.kind, SentencePiece)
        text = self.backend.id_to_token(token) or ""
        for old, new in self.kind.replaced:
            text = text.replace(old, new)
        return text
