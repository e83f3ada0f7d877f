"""The engine process: ``python -m gristmill.engine FD``, started by ``EngineProcess`` and by nobody else.

With several ranks, ``FD PLACE LINK…``: this one is rank 0, which leads the others (``parallel``).

What is here happens before torch is imported; ``serving`` is the rest.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys

from . import quick_torch
from .log_line import LogLine
from .settings import EngineSettings

log = logging.getLogger(__name__)


def main() -> None:
    """Load, say Ready, serve until Stop. Exit status 0, or that of the error tree after a Failed."""
    # Service managers send it to all processes of a service; the consumer then drains, and needs us for it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.disable()  # until the engine is made: hardly anything that a start makes is garbage
    handler = logging.StreamHandler()
    handler.setFormatter(LogLine())
    logging.basicConfig(handlers=[handler])
    logging.getLogger(f"{__package__}.native.build").setLevel(
        logging.INFO
    )  # a first start compiles: not in silence
    settings = EngineSettings.model_validate_json(sys.stdin.buffer.read())
    if _quick(settings):
        try:
            quick_torch.begin()
        except quick_torch.TorchIsOdd as exc:
            log.warning("engine.whole_torch", extra={"reason": str(exc)})
            _start_again(settings)
    from .serving import serve_consumer

    serve_consumer(settings)


def _quick(settings: EngineSettings) -> bool:
    alone = settings.tensor_parallel_size == 1
    on_cpu = settings.device == "cpu" or (settings.device == "auto" and not quick_torch.sees_a_gpu())
    return settings.quick_start and alone and on_cpu


def _start_again(settings: EngineSettings) -> None:
    """This process anew, with a plain import of torch: half of one cannot be taken back."""
    told = settings.model_copy(update={"quick_start": False}).model_dump_json()
    stdin = os.memfd_create("settings")
    os.write(stdin, told.encode())
    os.lseek(stdin, 0, os.SEEK_SET)
    os.dup2(stdin, 0)
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606  (no shell is wanted)


if __name__ == "__main__":
    main()
