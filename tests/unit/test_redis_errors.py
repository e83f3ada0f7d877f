"""Redis clients: what their exceptions become, and what a URL may say."""

from __future__ import annotations

import inspect
import time

import pytest
import redis
from gristmill.backends.redis import (
    REDIS_ERRORS,
    TRANSLATION,
    connect,
    normalise,
    redact,
    redis_errors,
    translate,
)
from gristmill.schemas.errors import BrokerUnavailable, GristmillError, Misconfigured
from gristmill.schemas.settings import Settings
from redis import exceptions as rx

CLASSES = [
    cls for _, cls in inspect.getmembers(rx, inspect.isclass) if issubclass(cls, Exception)
]  # a newer redis-py adds its own
TRANSIENT = [
    rx.ConnectionError,
    rx.TimeoutError,
    rx.OutOfMemoryError,
    rx.ReadOnlyError,
    rx.BusyLoadingError,
    rx.MasterDownError,
    rx.ClusterDownError,
    rx.ResponseError,
    ConnectionResetError,
]
SETTINGS = [rx.AuthenticationError, rx.NoPermissionError, rx.AuthorizationError]


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_exception_of_redis_py_is_caught_and_translated(cls: type[Exception]) -> None:
    assert issubclass(cls, REDIS_ERRORS)
    assert isinstance(translate(cls.__new__(cls), "state"), GristmillError)
    decided_by = next(ancestor for ancestor in cls.__mro__ if ancestor in TRANSLATION)
    assert decided_by is not rx.RedisError or cls is rx.RedisError, "say what it means in TRANSLATION"


@pytest.mark.parametrize("cls", TRANSIENT, ids=lambda cls: cls.__name__)
def test_what_waiting_mends_is_broker_unavailable(cls: type[Exception]) -> None:
    assert type(translate(cls("x"), "state")) is BrokerUnavailable


@pytest.mark.parametrize("cls", SETTINGS, ids=lambda cls: cls.__name__)
def test_what_settings_mend_is_misconfigured_except_in_the_middle_of_a_job(cls: type[Exception]) -> None:
    with pytest.raises(Misconfigured, match="password"), redis_errors("state"):
        raise cls("no")
    with pytest.raises(BrokerUnavailable, match="password"), redis_errors("state", always_transient=True):
        raise cls("no")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://u:pw@host:7/3", "redis://u:pw@host:7/3"),
        ("redis+socket:///run/v.sock?virtual_host=/2", "unix:///run/v.sock?db=2"),
        ("unix://:pw@/run/v.sock?db=1", "unix://:pw@/run/v.sock?db=1"),
        ("rediss://h/0?ssl_cert_reqs=CERT_REQUIRED", "rediss://h/0?ssl_cert_reqs=required"),
    ],
)
def test_urls_of_kombu_and_of_redis_py_mean_the_same(url: str, expected: str) -> None:
    assert normalise(url) == expected


@pytest.mark.parametrize(
    "url",
    ["sqs://", "hello", "unix://", "redis://h:notaport/0", "redis://h/0?nonsense=1", "redis://:pw@h:x/0"],
)
def test_an_unusable_url_is_refused_before_anything_is_sent_and_keeps_its_password(url: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        connect(url, Settings())
    assert "pw" not in caught.value.message


def test_messages_never_carry_the_password() -> None:
    assert redact("redis://user:s3cret@host:6379/0?ssl_password=s3cret&db=1") == (
        "redis://***@host:6379/0?ssl_password=***&db=1"
    )
    assert "s3cret" not in redact("unix://:s3cret@/run/v.sock")


def test_a_frozen_server_costs_one_timeout_not_several(valkey) -> None:
    client = connect(valkey.url, Settings(command_timeout_s=0.3))
    client.ping()
    valkey.freeze()
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable), redis_errors("state"):
        client.get("k")
    assert time.monotonic() - began < 1.5


def test_a_connection_that_the_server_closed_is_replaced_without_an_error(valkey) -> None:
    client = connect(valkey.url, Settings())
    client.ping()
    valkey.drop_clients()
    assert client.ping()


def test_a_dead_server_fails_at_once(valkey) -> None:
    client = connect(valkey.url, Settings())
    valkey.kill()
    with pytest.raises(BrokerUnavailable), redis_errors("state"):
        client.get("k")
    assert isinstance(client, redis.Redis)
