"""``python -m gristmill.engine.quantize``: what ``gristmill quantize`` runs where torch is.

Settings as JSON on standard input. On standard output one JSON object a line: ``{"stage", "done", "total"}``
and as the last one ``{"summary": …}`` or ``{"failed": {"code", "message"}}`` and the error tree's status.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import traceback
from dataclasses import asdict
from typing import Any

import torch
from pydantic import ValidationError

from ...schemas.errors import GristmillError, InvalidRequest
from ..memory import is_out_of_memory
from .run import quantize
from .settings import QuantizeSettings

OUT_OF_MEMORY = "out_of_memory"


def main() -> int:
    signal.signal(signal.SIGINT, _interrupted)
    logging.basicConfig(format="quantize[%(process)d] %(levelname)s %(name)s: %(message)s")
    try:
        settings = QuantizeSettings.model_validate_json(sys.stdin.buffer.read())
        if settings.num_threads:
            torch.set_num_threads(settings.num_threads)
        summary = quantize(settings, lambda stage, done, total: _say(stage=stage, done=done, total=total))
    except KeyboardInterrupt:
        return 130
    except Exception as exc:  # noqa: BLE001 - the process's edge: whatever it is, the command is told
        return _failed(exc)
    _say(summary=asdict(summary))
    return 0


def _interrupted(number: int, frame: object) -> None:
    """A terminal sends it, and the command passes it on: the second must not end what takes files away."""
    del number, frame
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _failed(exc: Exception) -> int:
    if isinstance(exc, ValidationError):
        exc = InvalidRequest(f"settings are not valid: {exc.errors()[0]['loc']}: {exc.errors()[0]['msg']}")
    if isinstance(exc, GristmillError):
        _say(failed={"code": exc.code, "message": exc.message})
        return exc.exit_code
    code = OUT_OF_MEMORY if is_out_of_memory(exc) else GristmillError.code
    traceback.print_exc()
    _say(failed={"code": code, "message": f"{type(exc).__name__}: {exc}"})
    return GristmillError.exit_code


def _say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # all is said: taking torch apart would cost half a second
