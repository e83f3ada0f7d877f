"""What a quantization is told: JSON on the standard input of ``python -m gristmill.engine.quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

LayoutName = Literal["int8", "fp8"]


class QuantizeSettings(BaseModel):
    """Frozen. None means: decided from the model and the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    """A directory with a plain checkpoint."""
    out: Path
    """Must not exist; appears whole, by a rename."""
    method: LayoutName
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: PositiveInt | None = None
