"""The engine process with the part of torch that it needs: ``python -m gristmill.engine.quick_start FD``."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import signal
import sys

from . import quick_torch
from .log_line import log_to_stderr
from .priority import step_forward

log = logging.getLogger(__name__)


def main() -> None:
    """As ``python -m gristmill.engine FD``; and that itself, if this torch cannot be had in part."""
    step_forward()  # before there are other threads
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.disable()
    quick_torch.open_libraries()
    for name in ("numpy", f"{__package__}.settings", f"{__package__}.messages"):  # meanwhile
        importlib.import_module(name)
    try:
        quick_torch.begin()
    except quick_torch.TorchIsOdd as exc:
        log_to_stderr()
        log.warning("engine.whole_torch", extra={"reason": str(exc)})
        again = [sys.executable, "-P", "-m", str(__package__), *sys.argv[1:]]
        os.execv(sys.executable, again)  # noqa: S606  (no shell is wanted)
    importlib.import_module(f"{__package__}.__main__").main()


if __name__ == "__main__":
    main()
