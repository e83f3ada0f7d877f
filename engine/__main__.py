"""The engine process: ``python -m gristmill.engine FD``, started by ``EngineProcess`` and by nobody else.

With several ranks, ``FD PLACE LINK…``: this one is rank 0, which leads the others (``parallel``).
``quick_start`` comes here, too, where only part of torch is wanted.
"""

from __future__ import annotations

import gc
import logging
import signal
import sys

from .log_line import log_to_stderr
from .priority import step_forward
from .settings import EngineSettings


def main() -> None:
    """Load, say Ready, serve until Stop. Exit status 0, or that of the error tree after a Failed."""
    step_forward()
    # Service managers send it to all processes of a service; the consumer then drains, and needs us for it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.disable()  # until the engine is made: hardly anything that a start makes is garbage
    log_to_stderr()
    building = logging.getLogger(f"{__package__}.native.build")
    building.setLevel(logging.INFO)  # a first start compiles: not in silence
    given = sys.stdin.buffer.read()
    if not given:
        return  # begun early, and not wanted after all
    settings = EngineSettings.model_validate_json(given)
    from .serving import serve_consumer  # brings torch

    serve_consumer(settings)


if __name__ == "__main__":
    main()
