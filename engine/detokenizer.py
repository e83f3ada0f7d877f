"""Token ids to text, piece by piece, never half a character. Pure: no torch, no I/O.

However the ids are cut into pushes, the pieces join to what the tokenizer's own ``decode`` makes of all ids
at once. Constant time per token.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol

from .token_pieces import ByteLevel, Other, SentencePiece, TokenPieces
from .tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_WINDOW = 64
"""Tokens that the fallback for unknown decoders holds back at most: no character is made of more."""


class Text(Protocol):
    """Turns one token after another into text; ``finish`` gives what was held back."""

    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...


class Detokenizer:
    """The text of one sequence of output tokens.

    ``continues``: the ids go on after a text, so that a blank at their start is part of it. Byte-level
    tokenizers know no difference; SentencePiece ones drop that blank in ``decode``, which would glue a
    completion to its prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer, skip_special_tokens: bool = True, *, continues: bool = False
    ) -> None:
        pieces = tokenizer.pieces
        self._skipped = pieces.special_ids if skip_special_tokens else frozenset[int]()
        self._finished = False
        match pieces.kind:
            case ByteLevel():
                self._text: Text = _ByteLevelText(pieces)
            case SentencePiece():
                self._text = _SentencePieceText(pieces, pieces.kind, continues)
            case Other():
                self._text = _WindowText(tokenizer, skip_special_tokens)

    def push(self, ids: Iterable[int]) -> str:
        """Take the next tokens; the text that is settled now, maybe empty."""
        assert not self._finished, "push after finish"
        return "".join([self._text.push(token) for token in ids if token not in self._skipped])

    def finish(self) -> str:
        """No more tokens: the rest, with U+FFFD for bytes that never became a character. Once only."""
        assert not self._finished, "finished twice"
        self._finished = True
        return self._text.finish()


class _ByteLevelText:
    """All bytes are one UTF-8 text; what is no character in it becomes U+FFFD."""

    def __init__(self, pieces: TokenPieces) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._utf8.decode(self._pieces.bytes_of(token))

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _SentencePieceText:
    """Texts one after another; a run of byte tokens is one character string, or U+FFFD for each byte of it.

    That rule, the tokenizers library's, makes a run one unit: it is held back until it ends.
    """

    def __init__(self, pieces: TokenPieces, kind: SentencePiece, continues: bool) -> None:
        self._pieces, self._kind = pieces, kind
        self._run = bytearray()
        self._strip_left = 0 if continues else kind.strip_left
        self._blank_first = "" if continues else kind.blank_first

    def push(self, token: int) -> str:
        if self._pieces.backend.id_to_token(token) is None:
            return ""
        byte = self._pieces.byte_of(token)
        if byte is not None:
            self._run.append(byte)
            return ""
        if self._blank_first:
            text = (self._pieces.backend.id_to_token(token) or "").replace(self._blank_first, "")
            self._blank_first = ""
        else:
            text = self._pieces.text_of(token)
        return self._stripped(self._end_run() + text)

    def finish(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        run, self._run = bytes(self._run), bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip_left and text:
            if text[0] != self._kind.strip_char:
                self._strip_left = 0
                break
            text = text[1:]
            self._strip_left -= 1
        return text


class _WindowText:
    """Decode a few tokens with and without the new ones; the difference is theirs once it ends in no
    U+FFFD."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._shown: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        if self._tokenizer.pieces.backend.id_to_token(token) is None:
            return ""
        self._held.append(token)
        text = self._difference()
        if not text or (text.endswith(REPLACEMENT) and len(self._held) < MAX_WINDOW):
            return ""
        return self._settle(text)

    def finish(self) -> str:
        return self._settle(self._difference())

    def _difference(self) -> str:
        before = self._tokenizer.decode(self._shown, self._skip)
        return self._tokenizer.decode([*self._shown, *self._held], self._skip)[len(before) :]

    def _settle(self, text: str) -> str:
        self._shown, self._held = self._held, []
        return text
