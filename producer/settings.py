"""What only the submitting side decides. Read once, from ``GRISTMILL_*``."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import Field, PositiveInt, SecretStr, ValidationError

from ..schemas.settings import Seconds, Settings, misconfigured


class ProducerSettings(Settings):
    """Frozen. Durations are seconds."""

    batch_max_rows: PositiveInt = 10_000_000
    """Rows of one bulk input."""
    batch_max_bytes: PositiveInt = 1 << 40
    """What they may take together, as they are sent."""
    bulk_poll_s: Seconds = 0.1
    """How often `gristmill run` asks how far its batch is."""
    webhook_secret: SecretStr | None = None
    """What `gristmill webhooks listen` checks with; workers and keepers sign with it."""
    worker_restarts: Annotated[int, Field(ge=0)] = 3
    """How often `gristmill run` starts a worker again that died, without a finished row in between."""
    worker_start_s: Seconds = 900.0
    """How long a worker may load its model."""
    worker_stop_s: Seconds = 30.0
    """How long a worker may take to hand its jobs back before it is killed."""


def load_producer_settings(**overrides: object) -> ProducerSettings:
    """Environment plus overrides (None means: not given). Raises Misconfigured naming the setting."""
    try:
        return ProducerSettings(**{k: v for k, v in overrides.items() if v is not None})  # pyright: ignore[reportArgumentType]
    except ValidationError as exc:
        raise misconfigured(exc) from exc


def producer_settings(settings: Settings) -> ProducerSettings:
    """The same with what only this side decides, from the environment."""
    if isinstance(settings, ProducerSettings):
        return settings
    return load_producer_settings(**settings.model_dump())


def child_environment(settings: Settings) -> dict[str, str]:
    """Our environment for a worker process of our own, with our connections: passwords belong in neither argv
    nor logs."""
    return os.environ | {
        "GRISTMILL_HOME": str(settings.home),
        "GRISTMILL_BROKER_URL": settings.broker_url,
        "GRISTMILL_STATE_URL": settings.state_url,
        "GRISTMILL_RESULTS_URL": settings.results_url,
        "PYTHONUNBUFFERED": "1",
    }
