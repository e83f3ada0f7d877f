"""The keeper's settings: the connections that everybody shares, and how it goes about its rounds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationError

from ..schemas.settings import Seconds, Settings, misconfigured


class KeeperSettings(Settings):
    """Read once, at start-up, from flags and ``GRISTMILL_*``. Frozen. ``_s``: seconds."""

    keeper_every_s: Seconds = 1.0
    """How often it looks; a cancellation wakes it at once."""
    keeper_batch: PositiveInt = 200
    """Jobs it ends in one round."""
    keeper_threads: Annotated[int, Field(ge=1, le=256)] = 16
    """Jobs it ends side by side: most of the time goes into the result store."""
    keeper_lock_s: Seconds = 15.0
    """How long a leader that fell silent leads on."""
    health_host: str = "127.0.0.1"
    keeper_health_port: Annotated[int, Field(ge=0, le=65_535)] | None = None
    """None: no health page; 0: any free port."""
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"


def load_keeper_settings(**overrides: object) -> KeeperSettings:
    """Environment plus flags (None means: not given). Raises Misconfigured naming the setting."""
    try:
        return KeeperSettings(**{k: v for k, v in overrides.items() if v is not None})  # pyright: ignore[reportArgumentType]
    except ValidationError as exc:
        raise misconfigured(exc) from exc
