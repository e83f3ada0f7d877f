"""The keeper's settings: the connections that everybody shares, and how it goes about its rounds."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import NoDecode

from ..schemas.settings import Seconds, Settings, json_object, misconfigured
from ..schemas.webhook import check_url, normal_url, secret_key

Network = IPv4Network | IPv6Network


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
    webhook_secret: SecretStr | None = None
    """``whsec_…``, the key of webhooks' signatures. Several, with spaces between: each signs, while an old
    one is being replaced."""
    webhook_secrets: Annotated[dict[str, SecretStr], NoDecode] = Field(default_factory=dict[str, SecretStr])
    """The same for URLs that begin so, in any spelling; the longest beginning counts. In the environment: a
    JSON object."""
    webhook_allow: Annotated[tuple[Network, ...], NoDecode] = ()
    """Networks that are not public and may be called all the same, with commas between: ``10.0.0.0/8``."""
    webhook_timeout_s: Annotated[float, Field(gt=0, le=60)] = 15.0
    """For one delivery, from the look-up of its host to the answer."""
    webhook_threads: Annotated[int, Field(ge=1, le=1024)] = 128
    """Deliveries at once …"""
    webhook_per_host: Annotated[int, Field(ge=1, le=256)] = 8
    """… and of those to one host, whatever its port and path: they share a machine."""
    webhook_ca_file: Path | None = None
    """Certificates of authorities to be trusted besides the system's."""
    health_host: str = "127.0.0.1"
    keeper_health_port: Annotated[int, Field(ge=0, le=65_535)] | None = None
    """None: no health page; 0: any free port."""
    log_format: Literal["text", "json"] = "text"
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("webhook_secrets", mode="before")
    @classmethod
    def _json_object(cls, value: object) -> object:
        return json_object(value, '{"https://…": "whsec_…"}')

    @field_validator("webhook_allow", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        try:
            return tuple(ip_network(part.strip()) for part in value.split(",") if part.strip())
        except ValueError as exc:
            raise ValueError(f"{exc}; write networks, 10.0.0.0/8,127.0.0.1/32") from exc

    @model_validator(mode="after")
    def _usable_secrets(self) -> Self:
        for secret in (self.webhook_secret, *self.webhook_secrets.values()):
            for one in secret.get_secret_value().split() if secret else ():
                secret_key(one)
        return self

    @field_validator("webhook_secrets")
    @classmethod
    def _distinct_beginnings(cls, secrets: dict[str, SecretStr]) -> dict[str, SecretStr]:
        starts: dict[str, str] = {}
        for each in secrets:
            try:
                check_url(each)
            except ValueError as exc:
                raise ValueError(f"{each!r} {exc}") from exc
            if starts.setdefault(_start(each), each) != each:
                raise ValueError(f"{starts[_start(each)]} and {each} are the same; leave one out")
        return secrets

    def webhook_keys(self, url: str) -> list[bytes]:
        """What signs events for ``url``; empty: nothing does, and nothing may be sent."""
        begins = {
            _start(each): each for each in self.webhook_secrets if _begins(normal_url(url), _start(each))
        }
        secret = self.webhook_secrets[begins[max(begins, key=len)]] if begins else self.webhook_secret
        return [secret_key(one) for one in secret.get_secret_value().split()] if secret else []


def _start(url: str) -> str:
    """A beginning of URLs as it is compared: what is meant is the same with a slash at its end."""
    return normal_url(url).rstrip("/")


def _begins(url: str, start: str) -> bool:
    """Not in the middle of a name: ``https://a.example`` is no beginning of ``https://a.example.org``."""
    return url.startswith(start) and url[len(start) :][:1] in ("", "/", "?")


def shared_settings(settings: Settings) -> KeeperSettings:
    """Of a keeper in a process that has ``settings`` for itself. Raises Misconfigured naming the setting."""
    return load_keeper_settings(**{name: getattr(settings, name) for name in Settings.model_fields})


def load_keeper_settings(**overrides: object) -> KeeperSettings:
    """Environment plus flags (None means: not given). Raises Misconfigured naming the setting."""
    try:
        return KeeperSettings(**{k: v for k, v in overrides.items() if v is not None})  # pyright: ignore[reportArgumentType]
    except ValidationError as exc:
        raise misconfigured(exc) from exc
