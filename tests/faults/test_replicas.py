"""A broker with a replica: when a job is accepted, and what becomes of running ones in a failover."""

from __future__ import annotations

import pytest
from gristmill.backends import broker
from gristmill.backends.message_queue import MessageQueue
from gristmill.schemas.errors import BrokerUnavailable, NotReplicated
from gristmill.schemas.settings import Settings

from ..support.valkey import Valkey


def queued(valkey: Valkey) -> int:
    return MessageQueue(valkey.client(), lease_s=1).depth("q")


def test_a_job_is_accepted_once_a_replica_has_it(valkey: Valkey, valkey_replica: Valkey) -> None:
    app = broker.make_app(Settings(broker_url=valkey.url, broker_replicas=1, command_timeout_s=2))
    try:
        broker.publish(app, "q", "{}", "job-1")
        assert queued(valkey_replica) == 1
        valkey.client().script_flush()
        broker.publish(app, "q", "{}", "job-2")
        assert queued(valkey_replica) == 2, "the first one after the server forgot the script"
    finally:
        broker.close(app)


def test_without_enough_replicas_submitting_says_how_many_there_are(
    valkey: Valkey, valkey_replica: Valkey
) -> None:
    app = broker.make_app(Settings(broker_url=valkey.url, broker_replicas=2, command_timeout_s=0.5))
    try:
        with pytest.raises(
            NotReplicated, match=r"1 of 2 replicas .* 0\.4 s.*GRISTMILL_BROKER_REPLICAS"
        ) as one:
            broker.publish(app, "q", "{}", "job-1")
        assert isinstance(one.value, BrokerUnavailable)
        assert queued(valkey) == 1, "sent once, not until somebody confirms"
        valkey_replica.freeze()
        with pytest.raises(NotReplicated, match="0 of 2 replicas"):
            broker.publish(app, "q", "{}", "job-2")
    finally:
        valkey_replica.thaw()
        broker.close(app)
