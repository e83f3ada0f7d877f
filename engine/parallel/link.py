"""Rank 0's ends of its links to the others: what it tells them, and that it notices when one is gone."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence

from .. import pipe
from ..messages import Failed
from .messages import Told

RANK_GONE = 4
"""Exit status of rank 0 after another one ended."""
LEAD_GONE = 5
"""That of the others after rank 0 ended."""
BLAME_S = 5.0
"""How long a rank whose exchange with another broke waits to be ended by its link, which knows the reason."""


class Links:
    """``tell`` may be called from any thread.

    A rank that is gone would leave the others in an exchange that nobody answers; so a thread for each link
    does nothing but wait for it to close.
    """

    def __init__(self, ends: Sequence[socket.socket], lost: Callable[[int, Failed | None], None]) -> None:
        """``lost``: what to do, on such a thread, when a rank has said why it ends, or just ended."""
        self._ends, self._lost = list(ends), lost
        self._telling = threading.Lock()
        for rank, end in enumerate(self._ends, 1):
            threading.Thread(target=self._watch, args=(rank, end), name=f"rank-{rank}", daemon=True).start()

    def tell(self, message: Told) -> None:
        """Raises OSError if one of them is gone; its thread is about to say so."""
        frame = pipe.encode(message)
        with self._telling:
            for end in self._ends:
                end.sendall(frame)

    def _watch(self, rank: int, end: socket.socket) -> None:
        said: Failed | None = None
        try:
            said = next((message for message in pipe.read(end) if isinstance(message, Failed)), None)
        finally:
            self._lost(rank, said)
