"""`gristmill queues create | list`, on SQS and on a Redis."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gristmill.backends import broker
from gristmill.backends.state import open_state
from gristmill.producer.cli import cli
from gristmill.producer.console import run_guarded
from gristmill.schemas.settings import Settings

from ..support.sqs import SqsServer
from ..support.valkey import Valkey


def run(settings: Settings, capfd: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    capfd.readouterr()
    urls = ["--broker", settings.broker_url, "--state", settings.state_url, "--results", settings.results_url]
    return run_guarded(cli, ["queues", *args, *urls]), *capfd.readouterr()


def test_queues_are_created_once_with_a_dead_letter_queue_behind_them(
    sqs: SqsServer, valkey: Valkey, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = sqs.settings(valkey, tmp_path)
    code, out, err = run(settings, capfd, "list")
    assert (code, "queues create" in err) == (2, True)

    for created in (True, False):
        code, out, _ = run(settings, capfd, "create", "--model", sqs.model, "--redrive", "7", "--json")
        found = {line["queue"]: line["created"] for line in map(json.loads, out.splitlines())}
        assert (code, found) == (0, dict.fromkeys([*sqs.queues, sqs.dead], created))
    with open_state(settings) as state:
        assert set(state.models()) == {sqs.model}

    url = sqs.queue_url(sqs.queues[0])
    attributes = sqs.client.get_queue_attributes(QueueUrl=url, AttributeNames=["All"])["Attributes"]
    assert attributes["MessageRetentionPeriod"] == str(14 * 86400)
    redrive = json.loads(attributes["RedrivePolicy"])
    assert (int(redrive["maxReceiveCount"]), redrive["deadLetterTargetArn"].rpartition(":")[2]) == (
        7,
        sqs.dead,
    )

    app = broker.make_app(settings)
    broker.publish(app, sqs.queues[1], "{}", "job-1")
    with broker.queues_of(app) as queues:
        queues.pause(sqs.queues[2], paused=True)
    broker.close(app)
    code, out, _ = run(settings, capfd, "list", "--json")
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"queue": queue, "waiting": waiting, "claimed": 0, "paused": paused}
        for queue, waiting, paused in zip(sqs.queues, (0, 1, 0), (False, False, True), strict=True)
    ]


def test_on_a_redis_there_is_nothing_to_create_and_as_much_to_list(
    valkey: Valkey, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(broker_url=valkey.url, state_url=valkey.url, results_url=f"file://{tmp_path}")
    code, out, err = run(settings, capfd, "create", "--model", "m")
    assert (code, out) == (0, "")
    assert "known now" in err
    app = broker.make_app(settings)
    for number in range(3):
        broker.publish(app, "gm-m-normal", "{}", f"job-{number}")
    with broker.queues_of(app) as queues:
        queues.claim(["gm-m-normal"])
    broker.close(app)
    _, out, _ = run(settings, capfd, "list")
    assert out.splitlines()[1].split() == ["gm-m-normal", "2", "waiting", "1", "claimed"]
