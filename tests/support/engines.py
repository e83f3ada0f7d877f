"""Settings of engines that tests start in processes of their own: small, with the same arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gristmill.engine.settings import EngineSettings

from .waiting import LOADED_S

READY_S = 60.0 + LOADED_S
"""How long one may take until it is ready: on a busy machine the imports alone take most of it."""


def tiny_settings(model: Path, **knobs: Any) -> EngineSettings:
    """For a model of ``write_tiny``; say only what matters."""
    return EngineSettings(
        **{
            "model": str(model),
            "device": "cpu",
            "dtype": "float32",
            "attention": "torch",
            "num_threads": 1,
            "max_num_seqs": 16,
            "max_batch_prefill_tokens": 64,
            "max_batch_total_tokens": 2048,
            **knobs,
        }
    )
