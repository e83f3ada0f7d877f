"""`gristmill webhooks …` and the README's receiver: a real Valkey, a keeper's courier, real receivers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends.outbox import open_outbox
from gristmill.backends.state import State, open_state
from gristmill.keeper.courier import Courier
from gristmill.keeper.settings import load_keeper_settings
from gristmill.producer.cli import cli
from gristmill.producer.console import run_guarded
from gristmill.schemas.job import Job
from gristmill.schemas.settings import Settings
from gristmill.schemas.webhook import new_secret

from ..support.journal import Attempt, make_job
from ..support.receiver import Receiver, event_of, receiving
from ..support.valkey import Valkey

ROOT = Path(__file__).resolve().parents[2]
SECRET = new_secret()


@pytest.fixture
def state(settings: Settings) -> Iterator[State]:
    with open_state(settings) as state:
        yield state


@pytest.fixture
def courier(settings: Settings) -> Iterator[Courier]:
    """Delivers when told to, as a keeper would."""
    outbox = open_outbox(settings)
    courier = Courier(outbox, load_keeper_settings(webhook_secret=SECRET, webhook_allow="127.0.0.1,::1"))
    yield courier
    courier.stop()
    outbox.close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


class Shell:
    """`gristmill webhooks …`, in this process."""

    def __init__(self, valkey: Valkey, capsys: pytest.CaptureFixture[str]) -> None:
        self._url, self._capsys = valkey.url, capsys

    def run(self, *args: str, code: int = 0) -> tuple[str, str]:
        assert run_guarded(cli, ["webhooks", *args, "--broker", self._url]) == code
        said = self._capsys.readouterr()
        return said.out, said.err

    def json(self, *args: str) -> list[Any]:
        return [json.loads(line) for line in self.run(*args, "--json")[0].splitlines()]


@pytest.fixture
def shell(valkey: Valkey, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(valkey, capsys)


def ended(state: State, url: str) -> str:
    """The event of a job that has ended."""
    job: Job = make_job(webhook=url)
    state.submit(job)
    Attempt.begin(state, job).finish()
    return event_of(job)


def test_an_operator_finds_what_failed_and_sends_it_again(
    shell: Shell, state: State, courier: Courier, receiver: Receiver
) -> None:
    receiver.answer = lambda got: (410 if "gone" in got.path else 200, {})
    good, gone = ended(state, receiver.url("/good")), ended(state, receiver.url("/gone?token=hush"))
    courier.drain()
    assert {row["id"]: row["state"] for row in shell.json("list")} == {good: "delivered", gone: "failed"}
    assert [row["id"] for row in shell.json("list", "--failed", "--since-h", "1")] == [gone]
    assert shell.json("list", "--endpoint", receiver.url("/none")) == []
    (details,) = shell.json("show", gone)
    assert [(each["status"], each["code"]) for each in details["log"]] == [(410, "status")]
    (trouble,) = shell.json("endpoints")
    assert trouble["url"] == receiver.url("/gone")
    text = "".join(part for args in (("list",), ("show", gone), ("endpoints",)) for part in shell.run(*args))
    assert "it answered 410" in text
    assert "switched off" in text
    assert "hush" not in text, "a query may be a secret"

    receiver.answer = lambda _: (204, {})
    assert shell.json("enable", receiver.url("/gone")) == [{"was_in_trouble": True, "waiting": 0}]
    assert shell.json("replay", "--failed", "--endpoint", receiver.url("/gone")) == [{"replayed": [gone]}]
    courier.drain()
    assert [row["state"] for row in shell.json("show", gone)] == ["delivered"]
    assert shell.run("endpoints") == ("", "no receiver is in trouble\n")


def test_what_cannot_be_done_says_so(shell: Shell) -> None:
    assert "[webhook_not_found]" in shell.run("show", "evt_none", code=2)[1]
    assert "[webhook_not_found]" in shell.run("replay", "evt_none", code=2)[1]
    assert "--failed" in shell.run("replay", code=2)[1]
    assert "https://" in shell.run("test", "ftp://x/", code=2)[1]
    assert shell.run("list") == ("", "no events\n")
    assert "gristmill-keeper" in shell.run("test", "https://example.com/", "--timeout-s", "0", code=75)[1]


def test_a_receiver_is_tried_out_the_way_all_events_go(
    shell: Shell, courier: Courier, receiver: Receiver
) -> None:
    courier.start(lambda: True)
    (found,) = shell.json("test", receiver.url())
    assert (found["state"], found["type"], receiver.ids) == ("delivered", "webhook.test", [found["id"]])
    receiver.answer = lambda _: (500, {})
    for _ in range(6):
        said = shell.run("test", receiver.url(), code=75)[1]
        assert "it answered 500 [webhook_failed]" in said
    assert shell.json("endpoints") == [], "a test harms no endpoint"
    assert "not public" in shell.run("test", "https://10.0.0.1/", code=75)[1]


def test_a_trial_without_a_secret_is_not_worth_another_try(
    shell: Shell, settings: Settings, receiver: Receiver
) -> None:
    with closing(open_outbox(settings)) as outbox:
        courier = Courier(outbox, load_keeper_settings(webhook_allow="127.0.0.1,::1"))
        courier.start(lambda: True)
        said = shell.run("test", receiver.url(), code=2)[1]
        courier.stop()
    assert "GRISTMILL_WEBHOOK_SECRET" in said


def test_the_readmes_receiver_and_our_listener_take_what_is_sent(
    state: State, courier: Courier, tmp_path: Path
) -> None:
    readme = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(import http\.server.*?)```", readme, re.DOTALL)
    start = 'http.server.ThreadingHTTPServer(("127.0.0.1", 8099), Hook).serve_forever()'
    assert start in code
    with_a_free_port = """
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
print(server.server_port, flush=True)
server.serve_forever()
"""
    program = tmp_path / "hook.py"
    program.write_text(code.replace(start, with_a_free_port))
    commands = {
        "readme": [sys.executable, str(program)],
        "listen": [sys.executable, "-P", "-m", "gristmill.producer.cli", "webhooks", "listen", "--port", "0"],
    }
    environment = os.environ | {"GRISTMILL_WEBHOOK_SECRET": SECRET, "PYTHONUNBUFFERED": "1"}
    for name, command in commands.items():
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                assert process.stdout is not None
                port = re.findall(r"[0-9]{4,5}", process.stdout.readline())[-1]
                event = ended(state, f"http://127.0.0.1:{port}/hook")
                courier.drain()
                line = process.stdout.readline()
                assert event in line, name
                assert "job.completed" in line, name
            finally:
                process.terminate()


def test_the_listener_tells_a_forged_event_from_ours() -> None:
    import http.client
    import time

    from gristmill.producer.listener import Listener, Received
    from gristmill.schemas.webhook import secret_key, signed_headers

    got: list[Received] = []
    listener = Listener("127.0.0.1", 0, [secret_key(SECRET)], got.append)
    try:
        for key in (secret_key(SECRET), secret_key(new_secret())):
            headers = signed_headers([key], "evt_1", int(time.time()), b'{"id":"evt_1"}')
            connection = http.client.HTTPConnection("127.0.0.1", listener.port, timeout=30)
            connection.request("POST", "/x", b'{"id":"evt_1"}', headers)
            got.append(Received(str(connection.getresponse().status), None))
            connection.close()
    finally:
        listener.close()
    assert [each.event for each in got] == [{"id": "evt_1"}, None, None, None]
    assert [each.path for each in got] == ["/x", "204", "/x", "401"]
