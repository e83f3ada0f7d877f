"""What a broker URL becomes, and whose error is raised, without a server."""

from __future__ import annotations

import kombu
import pytest
import redis
from gristmill.backends.broker import broker_errors, kombu_url
from gristmill.backends.transport import Channel
from gristmill.schemas.errors import BrokerUnavailable, GristmillError, InvalidRequest, Misconfigured
from kombu.exceptions import KombuError, OperationalError


@pytest.mark.parametrize(
    ("url", "ours"),
    [
        ("redis://host:6380/3", "gristmill://host:6380/3"),
        ("redis://host", "gristmill://host/0"),
        ("redis://host?db=4", "gristmill://host/4"),
        ("redis://user:p%40ss@host/1", "gristmill://user:p%40ss@host/1"),
        ("rediss://host/0", "gristmill://host/0?ssl_cert_reqs=required"),
        (
            "rediss://host/0?ssl_ca_certs=/ca.pem&ssl_cert_reqs=CERT_NONE",
            "gristmill://host/0?ssl_ca_certs=%2Fca.pem&ssl_cert_reqs=none",
        ),
        ("unix:///run/v.sock?db=2", "gristmill+socket:///run/v.sock?virtual_host=2"),
        (
            "redis+socket://u:pw@/run/v.sock?virtual_host=/1",
            "gristmill+socket://u:pw@/run/v.sock?virtual_host=1",
        ),
        ("unix:///run/a b/v.sock", "gristmill+socket:///run/a%20b/v.sock?virtual_host=0"),
    ],
)
def test_a_url_as_redis_py_takes_it_becomes_one_of_our_transport(url: str, ours: str) -> None:
    assert kombu_url(url) == ours


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("amqp://host", "not a Redis"),
        ("redis://host/jobs", "the database is a number"),
        ("redis://host?socket_timeout=3", "does not know the option socket_timeout"),
        ("redis://host?ssl_ca_certs=/ca.pem", "need rediss://"),
        ("unix://", "names no socket"),
    ],
)
def test_a_url_that_cannot_work_is_refused_with_its_reason(url: str, why: str) -> None:
    with pytest.raises(Misconfigured, match=why):
        kombu_url(url)


def test_a_refusal_does_not_quote_the_password() -> None:
    with pytest.raises(Misconfigured) as caught:
        kombu_url("redis://user:s3cret@host/jobs")
    assert "s3cret" not in str(caught.value)


class Unconnected(Channel):
    """Its parameters can be read without a server."""

    def __init__(self, url: str, **options: object) -> None:
        self.connection = kombu.Connection(kombu_url(url), transport_options=options).transport
        for name, value in options.items():
            setattr(self, name, value)
        self._registered = False


def test_tls_verifies_the_server_unless_told_otherwise() -> None:
    params = Unconnected("rediss://user:pw@host:6390/2")._connparams()
    assert issubclass(params["connection_class"], redis.SSLConnection)
    assert params["ssl_cert_reqs"].name == "CERT_REQUIRED"
    assert (params["host"], params["port"], params["db"]) == ("host", 6390, 2)
    assert (params["username"], params["password"]) == ("user", "pw")


def test_a_socket_keeps_its_path_its_user_and_its_database() -> None:
    params = Unconnected("unix://user:p%40w@/run/a%20b/v.sock?db=5")._connparams()
    assert issubclass(params["connection_class"], redis.UnixDomainSocketConnection)
    assert (params["path"], params["db"]) == ("/run/a b/v.sock", 5)
    assert (params["username"], params["password"]) == ("user", "p@w")


@pytest.mark.parametrize("url", ["redis://host", "rediss://host", "unix:///v.sock"])
def test_every_connection_has_limits_and_no_hidden_retries(url: str) -> None:
    params = Unconnected(url)._connparams()
    assert params["socket_timeout"]
    assert url.startswith("unix") or params["socket_connect_timeout"]
    assert params["retry"].get_retries() == 0


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (OperationalError("down"), BrokerUnavailable),
        (redis.ConnectionError("down"), BrokerUnavailable),
        (redis.AuthenticationError("who?"), Misconfigured),
        (ConnectionRefusedError(), BrokerUnavailable),
        (redis.DataError("ours"), GristmillError),
    ],
)
def test_errors_of_libraries_become_ours(theirs: Exception, ours: type[GristmillError]) -> None:
    with pytest.raises(ours) as caught, broker_errors():
        raise theirs
    assert type(caught.value) is ours
    assert caught.value.__cause__ is theirs


def test_the_cause_behind_kombus_error_decides() -> None:
    """kombu wraps whatever happened while connecting in one class."""
    wrapped = OperationalError("wrapped")
    wrapped.__cause__ = redis.AuthenticationError("who?")
    with pytest.raises(Misconfigured), broker_errors():
        raise wrapped


def test_every_exception_of_kombu_becomes_one_of_ours() -> None:
    """Walks kombu.exceptions, so that a new one cannot slip through to a user."""
    theirs = [
        kind
        for kind in vars(kombu.exceptions).values()
        if isinstance(kind, type) and issubclass(kind, (KombuError, OSError))
    ]
    assert len(theirs) > 10
    for kind in theirs:
        with pytest.raises(GristmillError), broker_errors():
            raise kind("x")


def test_our_own_errors_pass_unchanged() -> None:
    mine = InvalidRequest("bad tenant")
    with pytest.raises(InvalidRequest) as caught, broker_errors():
        raise mine
    assert caught.value is mine
