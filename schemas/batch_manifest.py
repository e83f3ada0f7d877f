"""What a batch ended in: its files, with their checksums. ``manifest.json`` is written last."""

from __future__ import annotations

from typing import Literal

from .result import Usage
from .wire import WIRE_VERSION, Answer, Bool, Float, Int


class BatchFile(Answer):
    """A finished file of lines in the result store."""

    name: str
    rows: Int
    bytes: Int
    sha256: str
    """Of its content, in hexadecimal."""


class BatchManifest(Answer):
    """The files of a batch. Of its rows, ``completed`` lie in ``output`` and ``failed`` in ``errors``."""

    v: Literal[1] = WIRE_VERSION
    batch: str
    status: str
    """The batch's last one: completed, cancelled, expired, failed."""
    total: Int = 0
    completed: Int = 0
    failed: Int = 0
    usage: Usage = Usage()
    input_order: Bool = False
    """Both files are in the order of the input."""
    output: BatchFile | None = None
    """None: no row was answered."""
    errors: BatchFile | None = None
    """None: no row failed."""
    created_at: Float
    """Unix seconds by the state server's clock."""
