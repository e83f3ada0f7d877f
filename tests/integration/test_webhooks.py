"""From a job's end to its receiver: real servers on loopback, a real Valkey, a clock that the test moves."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from gristmill.backends.outbox import Limits, Outbox, Outcome
from gristmill.backends.redis import connect
from gristmill.keeper import courier as couriers
from gristmill.keeper import guard
from gristmill.keeper import post as http
from gristmill.keeper.courier import GIVE_UP_S, LEASE_S, RETRY_AFTER_MAX_S, SCHEDULE_S, Courier
from gristmill.keeper.guard import Guard, resolve
from gristmill.keeper.health import metrics
from gristmill.keeper.settings import load_keeper_settings
from gristmill.schemas import keys
from gristmill.schemas.errors import WebhookFailed
from gristmill.schemas.events import End
from gristmill.schemas.job import Job, JobState
from gristmill.schemas.settings import Settings
from gristmill.schemas.webhook import (
    DeliveryState,
    EventType,
    WebhookDelivery,
    WebhookTry,
    endpoint_of,
    new_secret,
)
from openai import OpenAI
from standardwebhooks import Webhook

from ..support.dying import Died, Dying
from ..support.fleet import Fleet
from ..support.journal import Attempt, make_job
from ..support.receiver import Authority, Got, Receiver, event_of, receiving
from ..support.valkey import Valkey
from ..support.waiting import wait_until

SECRET = new_secret()
HOUR_S = 3600.0


class Post:
    """A fleet, its outbox, and couriers."""

    def __init__(self, valkey: Valkey, settings: Settings, tmp_path: Path) -> None:
        self.fleet = Fleet(valkey, settings, tmp_path)
        self.clock, self.state = self.fleet.clock, self.fleet.state
        self.outbox = Outbox(connect(valkey.url, settings), clock=self.clock)

    def courier(self, *, guard: Guard | None = None, **settings: Any) -> Courier:
        given = {"webhook_secret": SECRET, "webhook_allow": "127.0.0.0/8,::1", "webhook_timeout_s": 5.0}
        return Courier(self.outbox, load_keeper_settings(**given | settings), guard=guard, draw=lambda: 0.5)

    def job(self, url: str, **fields: Any) -> Job:
        job = make_job(webhook=url, **fields)
        self.state.submit(job)
        return job

    def ended(self, url: str, **fields: Any) -> Job:
        job = self.job(url, **fields)
        assert Attempt.begin(self.state, job).finish()
        return job

    def delivery(self, job: Job, kind: EventType = EventType.JOB_COMPLETED) -> WebhookDelivery:
        found = self.outbox.get(event_of(job, kind))
        assert found is not None
        return found

    def close(self) -> None:
        self.outbox.close()
        self.fleet.close()


@pytest.fixture
def post(valkey: Valkey, settings: Settings, tmp_path: Path) -> Iterator[Post]:
    post = Post(valkey, settings, tmp_path)
    yield post
    client = valkey.client()
    forever = [key for key in client.scan_iter("gm:webhook*") if client.pttl(key) == -1]
    post.close()
    assert not forever, "every key expires"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


# ---- what is told


def test_every_end_of_a_job_is_told_once_and_openai_and_standardwebhooks_verify_it(
    post: Post, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    with receiving(authority.server("localhost")) as receiver:
        done = post.job(receiver.url("/hook?a=1"), custom_id="row-1", metadata={"for": "you"})
        attempt = Attempt.begin(post.state, done)
        attempt.write("secret text")
        result = attempt.result().model_copy(update={"custom_id": "row-1", "metadata": {"for": "you"}})
        body = result.to_json().encode()
        keeper = post.fleet.keeper()
        post.fleet.store.put_new(keys.result_object(done.id), body)
        cancelled = post.job(receiver.url())
        post.state.cancel(done.id)  # it ends as its result says
        post.state.cancel(cancelled.id)
        expired = post.job(receiver.url(), expires_at=time.time() + 5)
        post.clock.advance(6)
        keeper.round()
        failed = post.job(receiver.url())
        post.state.finish(failed.id, End(state=JobState.FAILED))
        post.state.finish(failed.id, End(state=JobState.FAILED))

        courier = post.courier(webhook_ca_file=authority.ca_file)
        assert courier.drain() == 4
        assert courier.drain() == 0
        told = {}
        for got in receiver.got:
            event = OpenAI(api_key="-", webhook_secret=SECRET).webhooks.unwrap(got.body, got.headers)
            assert Webhook(SECRET).verify(got.body, got.headers)["id"] == event.id == got.id
            told[event.data.id] = event.type
            assert b"secret text" not in got.body
        jobs = {"completed": done, "cancelled": cancelled, "expired": expired, "failed": failed}
        assert told == {job.id: f"job.{kind}" for kind, job in jobs.items()}
        first = next(got for got in receiver.got if got.path == "/hook?a=1")
        assert first.headers["content-type"] == "application/json"
        data = json.loads(first.body)["data"]
        assert data["usage"] == {
            "prompt_tokens": 1,
            "completion_tokens": 1,
            "cached_tokens": 0,
            "total_tokens": 2,
        }
        assert {n: data[n] for n in ("status", "custom_id", "metadata", "result")} == {
            "status": "succeeded",
            "custom_id": "row-1",
            "metadata": {"for": "you"},
            "result": keys.result_object(done.id),
        }
        assert post.delivery(done).state is DeliveryState.DELIVERED


def test_a_job_without_a_webhook_leaves_nothing_in_the_outbox(post: Post, valkey: Valkey) -> None:
    job = make_job()
    post.state.submit(job)
    Attempt.begin(post.state, job).finish()
    assert not [*valkey.client().scan_iter("gm:webhook*")]


def test_a_job_whose_state_was_lost_is_told_of_by_its_message_and_with_the_same_id(
    post: Post, receiver: Receiver, valkey: Valkey
) -> None:
    job = post.ended(receiver.url())
    courier = post.courier()
    courier.drain()
    valkey.client().flushall()
    claim = post.state.claim(job.id, "w1", job.expires_at, job.webhook, job.submitted_at)
    assert Attempt(post.state, job, claim).finish()  # type: ignore[arg-type]
    courier.drain()
    assert receiver.ids == [event_of(job)] * 2


def test_a_job_that_comes_again_after_its_time_is_told_of_again(
    post: Post, receiver: Receiver, valkey: Valkey
) -> None:
    """An idempotency key was used again a day later, and nobody heard of the second run."""
    job = post.ended(receiver.url())
    courier = post.courier()
    courier.drain()
    valkey.client().delete(keys.state(job.id), keys.log(job.id))
    again = job.model_copy(update={"submitted_at": job.submitted_at + 86_400})
    assert post.state.submit(again)
    assert Attempt.begin(post.state, again).finish()
    courier.drain()
    assert receiver.ids == [event_of(job), event_of(again)]
    assert receiver.ids[0] != receiver.ids[1]


# ---- what goes wrong


def test_a_record_that_cannot_be_read_is_put_aside_and_delays_no_other(
    post: Post, receiver: Receiver, valkey: Valkey
) -> None:
    """Its neighbours were taken with it, and came only when their leases were over. One without a URL broke
    the scripts in their middle: it was in no index, and what stood behind it was not sent again."""
    good = [post.ended(receiver.url())]
    bad = {"evt_url": "{}", "evt_half": '{"half', "evt_list": "[1]", "evt_step": "{}"}
    for name, data in bad.items():
        assert post.outbox.put(name, EventType.TEST, receiver.url(), data)
    valkey.client().hset(keys.webhook("evt_step"), mapping={"step": "?", "since": "?"})
    valkey.client().hdel(keys.webhook("evt_url"), "url")
    good.append(post.ended(receiver.url()))
    post.courier().drain()
    assert sorted(receiver.ids) == sorted(map(event_of, good))
    shown = {each.id: each for each in post.outbox.list()}
    assert shown.keys() == {*bad, *receiver.ids}
    for name in bad:
        assert (shown[name].state, shown[name].why) == (DeliveryState.FAILED, "unreadable"), name
        assert [each.code for each in shown[name].log] == ["unreadable"], name
    assert post.outbox.replay([*bad]) == [*bad]
    assert post.outbox.counts().pending == len(bad)
    post.courier().drain()
    assert post.outbox.counts().pending == 0


def test_a_receiver_that_is_down_for_thirty_hours_gets_each_event(post: Post, receiver: Receiver) -> None:
    """Nobody helps: each event waits for its own next try."""
    down = post.clock.now + 30 * HOUR_S
    refused = 0

    def answer(_: Got) -> tuple[int, dict[str, str]]:
        nonlocal refused
        if post.clock.now < down:
            refused += 1
            return 503, {}
        return 200, {}

    receiver.answer = answer
    courier = post.courier()
    jobs = [post.ended(receiver.url())]
    hours = 0.0
    while post.clock.now < down + 12 * HOUR_S and any(
        post.delivery(job).state is DeliveryState.PENDING for job in jobs
    ):
        if hours in (1, 10, 20, 29):
            jobs += [post.ended(receiver.url()) for _ in range(3)]
        courier.drain()
        post.clock.advance(HOUR_S / 4)
        hours += 0.25
    told = [got.id for got in receiver.got[refused:]]
    assert sorted(told) == sorted(event_of(job) for job in jobs), "each once"
    assert refused < 120, "a receiver that is down is asked ever more rarely"
    assert post.outbox.endpoints() == []


def test_whoever_says_that_a_receiver_is_back_has_what_waits_for_it_sent_at_once(
    post: Post, receiver: Receiver
) -> None:
    receiver.answer = lambda _: (500, {})
    jobs, courier = [post.ended(receiver.url()) for _ in range(12)], post.courier()
    courier.drain()
    receiver.answer = lambda _: (200, {})
    assert courier.drain() == 0
    assert post.outbox.enable(receiver.url()) == (True, 8)
    assert courier.drain() == 12
    assert {post.delivery(job).state for job in jobs} == {DeliveryState.DELIVERED}
    assert post.outbox.enable(receiver.url()) == (False, 0)


def test_after_three_days_an_event_is_given_up_and_can_be_sent_again(post: Post, receiver: Receiver) -> None:
    receiver.answer = lambda _: (500, {})
    job, courier = post.ended(receiver.url()), post.courier()
    for pause_s in SCHEDULE_S:
        post.clock.advance(pause_s + 1)
        assert courier.drain() <= 1
        post.clock.advance(11 * 60)  # the endpoint is held for ten minutes at most
        courier.drain()
    found = post.delivery(job)
    assert (found.state, found.tries, found.why) == (DeliveryState.FAILED, len(SCHEDULE_S), "status")
    assert [each.status for each in found.log] == [500] * len(SCHEDULE_S)
    assert found.next_at is None

    receiver.answer = lambda _: (200, {})
    assert post.outbox.replay([found.id, "evt_unknown"]) == [found.id]
    assert courier.drain() == 1
    assert post.delivery(job).state is DeliveryState.DELIVERED
    assert len(set(receiver.ids)) == 1


def test_what_nobody_could_try_in_five_days_is_given_up(post: Post, receiver: Receiver) -> None:
    job = post.ended(receiver.url())
    post.clock.advance(GIVE_UP_S + 1)
    assert post.courier().drain() == 0
    assert (post.delivery(job).state, post.delivery(job).why) == (DeliveryState.FAILED, "gave_up")


def test_a_redirect_is_a_failure_and_is_not_followed_and_any_2xx_is_good(
    post: Post, receiver: Receiver
) -> None:
    statuses = (200, 201, 204, 299, 301, 302, 307, 308)
    with receiving() as elsewhere:
        receiver.answer = lambda got: (int(got.path[1:]), {"Location": elsewhere.url()})
        jobs = {status: post.ended(receiver.url(f"/{status}")) for status in statuses}
        post.courier().drain()
        assert elsewhere.got == []
    for status, job in jobs.items():
        (tried,) = post.delivery(job).log
        assert (tried.code, tried.status) == (None if status < 300 else "redirect", status)


def test_410_switches_that_url_off_in_every_spelling_until_somebody_switches_it_on(
    post: Post, receiver: Receiver
) -> None:
    receiver.answer = lambda got: (410 if got.path == "/hook?of=me" else 200, {})
    spelled = receiver.url("/hook?of=me", host="LOCALhost")
    jobs = [post.ended(url) for url in (receiver.url("/hook?of=me"), spelled, spelled)]
    courier = post.courier(webhook_per_host=1)
    courier.drain()
    assert len(receiver.got) == 1, "the others are not even tried"
    other = post.ended(receiver.url("/hook?of=somebody"))
    courier.drain()
    assert [post.delivery(job).state for job in jobs] == [DeliveryState.FAILED] * 3
    assert sorted(post.delivery(job).why for job in jobs) == ["endpoint_disabled"] * 2 + ["status"]
    assert post.delivery(other).state is DeliveryState.DELIVERED, "whose hook it is, its query may say"
    (endpoint,) = post.outbox.endpoints()
    assert (endpoint.url, endpoint.failures) == (receiver.url("/hook"), 0), "410 is no sign of trouble"
    assert endpoint.disabled_at is not None

    receiver.answer = lambda _: (200, {})
    assert post.outbox.enable(receiver.url("/hook")) == (True, 0)
    post.outbox.replay([post.delivery(job).id for job in jobs])
    assert courier.drain() == 3
    assert [post.delivery(job).state for job in jobs] == [DeliveryState.DELIVERED] * 3


def test_a_host_has_so_many_deliveries_at_once_however_many_urls_it_has(post: Post) -> None:
    """Nothing but the path told a server's endpoints apart, and each had eight threads of its own."""
    urls = [f"https://one.example{port}/{n}?{n}" for port in ("", ":8443") for n in range(4)]
    for n, url in enumerate([*urls, "https://ONE.example./5", "https://two.example/"]):
        post.outbox.put(f"evt_{n}", EventType.JOB_COMPLETED, url, "{}")
    limits = Limits(100, 3, 50, {"//one.example": 1})
    taken, _ = post.outbox.claim(limits, LEASE_S, GIVE_UP_S)
    assert sorted(each.host for each in taken) == ["//one.example"] * 2 + ["//two.example"]
    post.clock.advance(1)
    again, _ = post.outbox.claim(limits, LEASE_S, GIVE_UP_S)
    assert len({each.event.id for each in (*taken, *again)}) == 5, "as others end"


def test_endpoints_of_a_host_take_turns_however_much_waits_for_one(post: Post) -> None:
    for n in range(50):
        post.outbox.put(f"evt_{n}", EventType.JOB_COMPLETED, "https://one.example/busy", "{}")
    post.outbox.put("evt_other", EventType.JOB_COMPLETED, "https://one.example/quiet", "{}")
    came: list[str] = []
    while "evt_other" not in came:
        for each in post.outbox.claim(Limits(100, 2, 50, {}), LEASE_S, GIVE_UP_S)[0]:
            came.append(each.event.id)
            post.outbox.settle(each, Outcome("delivered", WebhookTry(n=1, at=0.0, status=200)))
        post.clock.advance(0.02)
    assert len(came) <= 6, came


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("HTTPS://Example.COM", "https://example.com/"),
        ("https://example.com:443/Hook?Q=1", "https://example.com/Hook"),
        ("https://example.com.:0443?x", "https://example.com/"),
        ("http://example.com:443/", "http://example.com:443/"),
        ("http://example.com.:8080/", "http://example.com:8080/"),
        ("http://10.0.0.1:80/a", "http://10.0.0.1/a"),
        ("https://[2606:2800::443]:443/", "https://[2606:2800::443]/"),
    ],
)
def test_an_endpoint_is_the_same_in_every_spelling_for_redis_and_for_us(
    post: Post, url: str, normal: str
) -> None:
    assert endpoint_of(url) == normal
    post.outbox.put("evt_1", EventType.JOB_COMPLETED, url, "{}")
    (sending,) = post.outbox.claim(Limits(1, 1, 1, {}), LEASE_S, GIVE_UP_S)[0]
    post.outbox.settle(sending, Outcome("retry", WebhookTry(n=1, at=0.0, code="status"), again_s=9.0))
    assert [each.url for each in post.outbox.endpoints()] == [normal]
    assert post.outbox.enable(normal.upper().replace("HOOK", "Hook").replace("/A", "/a")) == (True, 1)


def test_retry_after_is_kept_by_the_event_and_its_endpoint(post: Post, receiver: Receiver) -> None:
    receiver.answer = lambda _: (429, {"Retry-After": "100"})
    courier = post.courier()
    first = post.ended(receiver.url())
    courier.drain()
    second = post.ended(receiver.url())
    receiver.answer = lambda _: (200, {})
    post.clock.advance(99)
    assert courier.drain() == 0
    post.clock.advance(1.1)
    assert courier.drain() == 2
    assert {post.delivery(job).state for job in (first, second)} == {DeliveryState.DELIVERED}

    receiver.answer = lambda _: (503, {"Retry-After": "9" * 12})
    third = post.ended(receiver.url())
    courier.drain()
    next_at = post.delivery(third).next_at
    assert next_at is not None
    assert next_at - post.clock.now == pytest.approx(RETRY_AFTER_MAX_S, abs=1)


def test_an_endpoint_that_fails_is_asked_with_one_event_at_a_time(post: Post, receiver: Receiver) -> None:
    receiver.answer = lambda _: (500, {})
    courier = post.courier(webhook_per_host=5)
    jobs = [post.ended(receiver.url()) for _ in range(20)]
    assert courier.drain() == 5
    (trouble,) = post.outbox.endpoints()
    assert (trouble.url, trouble.failures, trouble.why) == (receiver.url(), 5, "status")
    assert trouble.held_until is not None
    post.clock.advance(trouble.held_until - post.clock.now + 0.01)
    assert courier.drain() == 1
    receiver.answer = lambda _: (200, {})
    post.clock.advance(11 * 60)
    assert courier.drain() == 20
    assert {post.delivery(job).state for job in jobs} == {DeliveryState.DELIVERED}
    assert post.outbox.endpoints() == []


def test_receivers_that_hang_delay_nobody_else(post: Post, receiver: Receiver) -> None:
    silent = threading.Event()
    post.outbox._clock = None  # time goes on

    def hang(_: Got) -> tuple[int, dict[str, str]]:
        silent.wait(60)
        return 200, {}

    with receiving() as slow:
        slow.answer = hang
        elsewhere = f"http://127.0.0.1:{slow.port}"
        hanging = [post.ended(f"{elsewhere}/{n}") for n in range(3) for _ in range(10)]
        jobs = [post.ended(receiver.url()) for _ in range(20)]
        courier = post.courier(webhook_threads=8, webhook_per_host=2, webhook_timeout_s=60.0)
        courier.start(lambda: True)
        try:
            wait_until(lambda: len(receiver.got) == len(jobs), 20, "the others have theirs")
            assert len(slow.got) == 2, "its host has no more at once"
        finally:
            silent.set()
        wait_until(lambda: len(slow.got) == len(hanging), 20, "and those in the end, too")
        courier.stop()


def test_a_receiver_that_drips_is_cut_off_in_time(post: Post) -> None:
    """A byte now and then keeps a socket's own time limit from ever ending."""
    cut_off = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection, suppress(OSError):
                while not cut_off.wait(0.05):
                    connection.sendall(b"H")

        threading.Thread(target=drip, daemon=True).start()
        job = post.ended(f"http://127.0.0.1:{server.getsockname()[1]}/")
        began = time.monotonic()
        post.courier(webhook_timeout_s=0.5).drain()
        assert time.monotonic() - began < 30
        cut_off.set()
    (tried,) = post.delivery(job).log
    assert tried.code == "timeout"


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (b"SSH-2.0-nobody\r\n\r\n", "bad_answer"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, "bad_answer"),
        (b"", "connection"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 x\r\n\r\nHTTP/1.1 204 No\r\n\r\n", None),
    ],
)
def test_odd_answers_are_read_as_what_they_are(post: Post, said: bytes, code: str | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(said)
                with suppress(OSError):  # it may have heard enough
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(65_536):
                        pass

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        job = post.ended(f"http://127.0.0.1:{server.getsockname()[1]}/")
        post.courier().drain()
    (tried,) = post.delivery(job).log
    assert tried.code == code


def test_a_certificate_for_another_name_or_from_nobody_we_trust_is_refused(
    post: Post, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    with receiving(authority.server("somebody.example")) as receiver:
        wrong = post.ended(receiver.url("/wrong"))
        post.courier(webhook_ca_file=authority.ca_file).drain()
    with receiving(authority.server("localhost")) as unknown:
        unknown_job = post.ended(unknown.url("/unknown"))
        post.courier().drain()
        assert unknown.got == []
    assert receiver.got == []
    for job in (wrong, unknown_job):
        (tried,) = post.delivery(job).log
        assert (tried.code, "certificate" in tried.reason.lower()) == ("tls", True)


def test_without_a_secret_nothing_is_sent_and_the_event_waits_for_one(post: Post, receiver: Receiver) -> None:
    job = post.ended(receiver.url())
    post.courier(webhook_secret=None).drain()
    assert receiver.got == []
    assert (post.delivery(job).state, post.delivery(job).why) == (DeliveryState.PENDING, "no_secret")
    post.clock.advance(6)
    post.courier().drain()
    assert post.delivery(job).state is DeliveryState.DELIVERED


# ---- hostile addresses


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_loopback_is_not_called_unless_it_is_listed(post: Post, receiver: Receiver, host: str) -> None:
    job = post.ended(receiver.url(host=host))
    post.courier(webhook_allow="").drain()
    assert receiver.got == []
    assert post.delivery(job).why == "refused"
    final = post.delivery(job).state is DeliveryState.FAILED
    assert final is (host != "localhost"), "a number stays what it is"


def test_a_name_that_changes_its_address_after_the_check_gains_nothing(
    post: Post, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: the first look-up says a public address, all later ones say loopback."""
    looked_up: list[str] = []

    def rebinding(host: str, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        looked_up.append(host)
        address = "192.88.100.1" if looked_up.count(host) == 1 and host == "evil.example" else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    asked: list[tuple[str, int]] = []

    def connects(address: tuple[str, int], timeout: float) -> socket.socket:
        asked.append(address)
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr(http.socket, "create_connection", connects)
    job = post.ended(f"https://evil.example:{receiver.port}/")
    courier = post.courier(webhook_allow="", guard=Guard(look_up=resolve))
    courier.drain()
    assert asked == [("192.88.100.1", receiver.port)], "the address that was checked, and no other"
    assert looked_up == ["evil.example"]
    post.clock.advance(6)
    courier.drain()
    assert [each.code for each in post.delivery(job).log] == ["connection", "refused"]
    assert receiver.got == []


def test_no_proxy_of_the_environment_is_used(
    post: Post, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as proxy:
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url(""))
            monkeypatch.setenv(name.upper(), proxy.url(""))
        job = post.ended(receiver.url())
        post.courier().drain()
        assert (len(receiver.got), proxy.got) == (1, [])
    assert post.delivery(job).state is DeliveryState.DELIVERED


# ---- deaths


def test_a_keeper_killed_in_the_middle_of_a_delivery_sends_it_again_with_the_same_id(
    post: Post, receiver: Receiver, valkey: Valkey, tmp_path: Path
) -> None:
    came, silent = threading.Event(), threading.Event()

    def hang(_: Got) -> tuple[int, dict[str, str]]:
        came.set()
        silent.wait(60)
        return 200, {}

    receiver.answer = hang
    job = post.ended(receiver.url())
    environment = os.environ | {
        "GRISTMILL_WEBHOOK_SECRET": SECRET,
        "GRISTMILL_WEBHOOK_ALLOW": "127.0.0.1/32,::1",
        "GRISTMILL_HOME": str(tmp_path),
    }
    command = [sys.executable, "-P", "-m", "gristmill.keeper", "--broker", valkey.url]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as keeper:
        try:
            assert came.wait(60), "the keeper delivers by itself"
        finally:
            keeper.send_signal(signal.SIGKILL)
    silent.set()
    receiver.answer = lambda _: (200, {})
    courier = post.courier()
    assert courier.drain() == 0, "its lease stands"
    post.clock.now = time.time() + LEASE_S + 1  # it began by the server's own clock
    assert courier.drain() == 1
    assert receiver.ids == [event_of(job)] * 2
    found = post.delivery(job)
    assert (found.state, found.tries, [each.n for each in found.log]) == (DeliveryState.DELIVERED, 2, [2])


@dataclass(frozen=True)
class Course:
    """What a receiver answers to an event, time after time, and where that leaves it."""

    answers: tuple[int, ...]
    events: int
    end: DeliveryState


COURSES = {
    "delivered at once": Course((200,), 2, DeliveryState.DELIVERED),
    "delivered at the second try": Course((500, 200), 2, DeliveryState.DELIVERED),
    "gone": Course((410,), 1, DeliveryState.FAILED),
}


@contextmanager
def doomed(post: Post, life: list[int]) -> Iterator[Courier]:
    """A courier that dies before a call: of the outbox, the resolver or a socket. Its threads are one with
    it: they run where they start."""
    opened: list[socket.socket] = []
    start, connect_to = threading.Thread.start, Dying(http, 0, life)._connect

    def run_at_once(thread: threading.Thread) -> None:
        (thread.run if thread.name == "webhook" else lambda: start(thread))()

    def connects(*args: Any) -> Any:
        opened.append(connect_to(*args))
        return Dying(opened[-1], 0, life)

    allow = load_keeper_settings(webhook_allow="127.0.0.0/8,::1").webhook_allow
    courier = post.courier(guard=Guard(allow, look_up=Dying(guard, 0, life).resolve))
    courier._outbox = cast("Outbox", Dying(post.outbox, 0, life))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", run_at_once)
        patch.setattr(http, "_connect", connects)
        yield courier
    for each in opened:  # as the system does for the dead
        each.close()


@pytest.mark.parametrize("course", COURSES.values(), ids=COURSES)
def test_a_courier_may_die_before_any_call_and_each_event_still_arrives_and_ends(
    post: Post, receiver: Receiver, course: Course, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls = http.tls_context()  # slow to make, and unused: once for all couriers
    monkeypatch.setattr(couriers, "tls_context", lambda _: tls)
    receiver.answer = lambda got: (
        course.answers[min(receiver.ids.count(got.id), len(course.answers)) - 1],
        {},
    )
    repeated = 0
    for calls in range(1, 200):
        jobs = [post.ended(receiver.url(f"/{calls}")) for _ in range(course.events)]
        life = [calls]
        with doomed(post, life) as courier, suppress(Died):
            for _ in course.answers:
                courier.drain()
                post.clock.advance(SCHEDULE_S[1] + 1)
        for _ in range(len(course.answers) + 1):
            post.clock.advance(LEASE_S + 1)
            post.courier().drain()

        for job in jobs:
            wanted = event_of(job)
            came = [got for got in receiver.got if got.id == wanted]
            assert len(came) >= len(course.answers), f"dead before call {calls}: it is lost"
            assert len({got.body for got in came}) == 1
            for got in came:
                assert Webhook(SECRET).verify(got.body, got.headers)["data"]["id"] == job.id
            assert post.delivery(job).state is course.end, f"dead before call {calls}"
            repeated += len(came) - len(course.answers)
            assert life[0] <= 0 or len(came) == len(course.answers), "undisturbed, it comes once"
        assert {got.id for got in receiver.got if got.path == f"/{calls}"} == {event_of(job) for job in jobs}
        counts = post.outbox.counts()
        assert (counts.pending, counts.delivered + counts.failed) == (0, calls * course.events)
        if life[0] > 0:
            assert repeated, "who dies after the answer came has not told of it"
            return
    raise AssertionError("it never came to an end")


def test_a_system_without_threads_to_spare_delays_events_and_loses_none(
    post: Post, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        post.ended(receiver.url())
    courier = post.courier(webhook_threads=4, webhook_per_host=4)

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert courier.step()[0] == 3
    post.clock.advance(LEASE_S + 1)
    assert courier.drain() == 3
    assert len(set(receiver.ids)) == 3


def test_a_late_failure_of_a_try_whose_lease_ran_out_changes_nothing(post: Post, receiver: Receiver) -> None:
    job = post.ended(receiver.url())
    slow, quick = post.courier(), post.courier()
    proceed, asked = threading.Event(), threading.Event()

    def answer(_: Got) -> tuple[int, dict[str, str]]:
        if len(receiver.got) == 1:
            asked.set()
            proceed.wait(60)
            return 500, {}
        return 200, {}

    receiver.answer = answer
    slow._settings = slow._settings.model_copy(update={"webhook_timeout_s": 60.0})
    slow.step()
    assert asked.wait(30)
    post.clock.advance(LEASE_S + 1)
    assert quick.drain() == 1
    proceed.set()
    slow._wait_idle(30)
    found = post.delivery(job)
    assert (found.state, [each.status for each in found.log]) == (DeliveryState.DELIVERED, [500, 200])


def test_a_valkey_that_goes_away_costs_no_event(post: Post, receiver: Receiver, valkey: Valkey) -> None:
    post.outbox._clock = None  # time goes on
    courier = post.courier()
    courier.start(lambda: True)
    before = post.ended(receiver.url())
    wait_until(lambda: len(receiver.got) == 1, 10, "it delivers")
    valkey.client().config_set("appendfsync", "always")
    after = post.job(receiver.url())
    valkey.kill()
    valkey.start()
    Attempt.begin(post.state, after).finish()
    wait_until(lambda: len(set(receiver.ids)) == 2, 20, "and again once the server is back")
    courier.stop()
    assert post.delivery(before).state is DeliveryState.DELIVERED


# ---- for people


def test_the_list_has_the_newest_first_and_counts_tell_how_much_there_is(
    post: Post, receiver: Receiver
) -> None:
    receiver.answer = lambda got: (200, {}) if got.path == "/good" else (400, {})
    post.ended(receiver.url("/good"))
    post.clock.advance(1)
    post.ended(receiver.url("/bad?token=hush"))
    courier = post.courier()
    courier.drain()
    post.clock.advance(1)
    post.ended(receiver.url("/next"))
    listed = [*post.outbox.list()]
    assert [each.endpoint.rpartition("/")[2] for each in listed] == ["next", "bad", "good"]
    assert "hush" not in "".join(each.to_json() for each in listed)
    assert [each.state for each in post.outbox.list([DeliveryState.DELIVERED])] == [DeliveryState.DELIVERED]
    counts = post.outbox.counts()
    assert (counts.pending, counts.delivered, counts.failed, counts.troubled) == (2, 1, 0, 1)
    assert courier.totals == {"delivered": 1, "status": 1}


def test_a_million_events_of_one_endpoint_hide_no_other(post: Post, receiver: Receiver) -> None:
    """A thousand stand for them; what counts is that endpoints take turns."""
    receiver.answer = lambda got: (200, {}) if got.path == "/good" else (500, {})
    for _ in range(1000):
        post.outbox.put(new_secret(), EventType.JOB_FAILED, receiver.url("/bad"), "{}")
    good = post.ended(receiver.url("/good"))
    courier = post.courier(webhook_threads=4, webhook_per_host=2)
    courier.drain()
    post.clock.advance(1)
    courier.drain()
    assert post.delivery(good).state is DeliveryState.DELIVERED
    assert len(receiver.got) < 20


def test_a_target_without_time_left_is_a_timeout() -> None:
    target = Guard(load_keeper_settings(webhook_allow="127.0.0.1").webhook_allow).check("http://127.0.0.1:9/")
    with pytest.raises(WebhookFailed) as failed:
        http.post(target, {}, b"", tls=http.tls_context(), deadline=time.monotonic() - 1)
    assert failed.value.why == "timeout"


def test_prometheus_is_told_of_deliveries_and_of_what_waits(post: Post, receiver: Receiver) -> None:
    receiver.answer = lambda got: (200, {}) if got.path == "/good" else (400, {})
    post.ended(receiver.url("/good"))
    post.ended(receiver.url("/bad"))
    keeper, courier = post.fleet.keeper(), post.courier()
    keeper.courier = courier
    courier.start(lambda: True)
    wait_until(lambda: courier.totals.total() == 2, 10, "both are tried")
    courier.stop()
    courier.counts = post.outbox.counts()
    lines = metrics(keeper, 0.0).splitlines()
    for line in (
        'gristmill_webhook_deliveries_total{result="delivered"} 1',
        'gristmill_webhook_deliveries_total{result="status"} 1',
        "gristmill_webhooks_pending 1",
        "gristmill_webhooks_endpoints_in_trouble 1",
    ):
        assert line in lines
