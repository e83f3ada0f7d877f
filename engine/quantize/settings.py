"""What a quantization is told: JSON on the standard input of ``python -m gristmill.engine.quantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

LayoutName = Literal["awq", "int8", "fp8"]


class QuantizeSettings(BaseModel):
    """Frozen. None means: decided from the model and the machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Path
    """A directory with a plain checkpoint."""
    out: Path
    """Must not exist; appears whole, by a rename."""
    method: LayoutName
    group_size: PositiveInt | None = None
    """Inputs that share a scale, for layouts that have groups. None: the largest usual one that divides."""
    calibration: Path | None = None
    """Shows which inputs are large: .txt, or .jsonl of "text", "prompt" or "messages". None: ours."""
    calibration_tokens: PositiveInt = 16_384
    """At most so many are used."""
    clip: bool = True
    """Search for narrower ranges of the weights, too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: PositiveInt | None = None
