"""Where files are kept. Apart from the settings, so that the engine runs without pydantic-settings."""

from __future__ import annotations

import os
from pathlib import Path


def default_home() -> Path:
    """Where models and embedded brokers live unless ``GRISTMILL_HOME`` says otherwise.

    The XDG rule: a relative ``XDG_DATA_HOME`` is ignored.
    """
    data_home = Path(os.environ.get("XDG_DATA_HOME", ""))
    return (data_home if data_home.is_absolute() else Path.home() / ".local" / "share") / "gristmill"
