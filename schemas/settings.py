"""The connections that producers and workers share, read once from ``GRISTMILL_*``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Self

from pydantic import (
    AliasChoices,
    Field,
    PositiveInt,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .errors import Misconfigured
from .home import default_home
from .job import DEFAULT_JOB_TTL_S, DEFAULT_TENANT, Tenant

Seconds = Annotated[float, Field(gt=0, le=1e9)]
"""A time span: 30 years are for ever, and infinity fits no server's clock."""

TRUE = frozenset({"1", "ON", "YES", "TRUE"})
SCHEMES = ("redis", "rediss", "unix", "redis+socket", "sqs", "embedded")


class Settings(BaseSettings):
    """Connections and limits both sides must agree on. Frozen. Durations are seconds, sizes bytes.

    ``broker_url``: ``redis(s)://host:port/db``, ``unix:///path``, ``sqs://`` (``sqs://KEY:SECRET@``,
    ``sqs://host:port?region=…`` for an emulator) or ``embedded:DIR``; empty means an embedded one under
    ``home``. ``state_url`` defaults to the broker when that is a Redis.
    ``results_url``: ``file:///dir`` or ``s3://bucket/prefix``; empty means ``home``/results.
    """

    model_config = SettingsConfigDict(
        env_prefix="GRISTMILL_", frozen=True, extra="ignore", populate_by_name=True
    )

    home: Path = Field(default_factory=default_home)
    broker_url: str = ""
    state_url: str = ""
    results_url: str = ""
    model: str | None = None
    tenant: Tenant = DEFAULT_TENANT

    broker_replicas: Annotated[int, Field(ge=0)] = 0
    """Replicas of the Redis broker that must have a job before ``submit`` returns."""
    visibility_timeout_s: Seconds = 60.0
    lease_renew_every_s: Seconds = 20.0
    job_ttl_s: Seconds = DEFAULT_JOB_TTL_S
    result_ttl_s: Seconds = 86_400.0
    results_keep_s: Seconds | None = None
    """How long `gristmill gc` leaves results of single jobs in the store; None: for ever."""
    max_payload_bytes: PositiveInt = 4 * 1024 * 1024
    inline_result_bytes: Annotated[int, Field(ge=0)] = 64 * 1024
    """Results up to this size also stay in Redis for ``result_ttl_s``."""
    connect_timeout_s: Seconds = 5.0
    command_timeout_s: Seconds = 10.0

    offline: Annotated[
        bool,
        Field(
            validation_alias=AliasChoices(
                "offline", "GRISTMILL_OFFLINE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"
            )
        ),
    ] = False
    """Models come from this machine only; nothing is asked of a hub, an index or a bucket of models."""
    hub_cache: Annotated[
        Path | None,
        Field(validation_alias=AliasChoices("hub_cache", "GRISTMILL_HUB_CACHE", "WEIGHTS_CACHE_OVERRIDE")),
    ] = None
    """Where the Hub's models are; default: as its library says (``HF_HUB_CACHE``, ``HF_HOME``)."""

    s3_endpoint_url: str | None = None
    s3_region: str | None = None
    s3_access_key: SecretStr | None = None
    s3_secret_key: SecretStr | None = None

    sqs_endpoint_url: str | None = None
    sqs_region: str | None = None
    sqs_queue_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]*$")] = ""
    """Stands before the name of every SQS queue: several fleets in one account."""
    sqs_queues: Annotated[dict[str, str], NoDecode] = Field(default_factory=dict)
    """Queue name → its URL, where queues are not found by name. In the environment: a JSON object."""

    @field_validator("offline", mode="before")
    @classmethod
    def _as_the_hub_library_reads_it(cls, value: object) -> object:
        return bool(value) and value.strip().upper() in TRUE if isinstance(value, str) else value

    @field_validator("sqs_queues", mode="before")
    @classmethod
    def _json_object(cls, value: object) -> object:
        return json_object(value, '{"queue": "https://…"}')

    @model_validator(mode="after")
    def _two_renewals_may_fail(self) -> Self:
        if self.visibility_timeout_s < 3 * self.lease_renew_every_s:
            raise ValueError(
                f"visibility_timeout_s ({self.visibility_timeout_s:g}) must be at least "
                f"3 x lease_renew_every_s ({self.lease_renew_every_s:g})"
            )
        return self

    @model_validator(mode="after")
    def _known_scheme(self) -> Self:
        for name in ("broker_url", "state_url"):
            url: str = getattr(self, name)
            scheme, _, rest = url.partition(":")
            if url and scheme not in SCHEMES:
                raise ValueError(
                    f"GRISTMILL_{name.upper()} starts with none of {', '.join(s + ':' for s in SCHEMES)}"
                )
            if scheme == "embedded" and not rest:
                raise ValueError(f"GRISTMILL_{name.upper()} names no directory: embedded:DIR")
        return self

    @property
    def broker(self) -> str:
        """The broker URL with its default filled in."""
        return self.broker_url or f"embedded:{self.home / 'embedded'}"

    @property
    def results(self) -> str:
        """The result store's URL with its default filled in."""
        return self.results_url or f"file://{self.home.absolute() / 'results'}"


def json_object(value: object, example: str) -> object:
    """A setting that is JSON in a variable, and an object in Python. Raises ValueError, for pydantic."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value or "{}")
    except ValueError as exc:
        raise ValueError(f"must be a JSON object, {example}") from exc


def load_settings(**overrides: object) -> Settings:
    """Environment plus overrides (None means: not given). Raises Misconfigured naming the setting."""
    try:
        return Settings(**{k: v for k, v in overrides.items() if v is not None})  # pyright: ignore[reportArgumentType]
    except ValidationError as exc:
        raise misconfigured(exc) from exc


def misconfigured(exc: ValidationError) -> Misconfigured:
    """The first rule broken, with the setting's name. Values are left out: they may be secrets."""
    first = exc.errors(include_input=False, include_url=False)[0]
    where = "_".join(str(part) for part in first["loc"])
    name = f"GRISTMILL_{where.upper().removeprefix('GRISTMILL_')}: " if where else ""
    return Misconfigured(name + first["msg"].removeprefix("Value error, "))
