"""Webhooks without a server: which URLs and addresses may be called, signatures, secrets, pauses."""

from __future__ import annotations

import json
import math
import time
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from gristmill.keeper.courier import SCHEDULE_S
from gristmill.keeper.guard import Guard, public
from gristmill.keeper.post import Reply, _parse
from gristmill.keeper.settings import KeeperSettings, load_keeper_settings
from gristmill.schemas.errors import InvalidRequest, Misconfigured, WebhookFailed, WebhookRefused
from gristmill.schemas.job import Job
from gristmill.schemas.webhook import (
    DATA_BYTES,
    WebhookEvent,
    check_url,
    event_data,
    new_secret,
    secret_key,
    signature,
    signed_headers,
    verify,
)
from gristmill.worker.app import WorkerApp
from gristmill.worker.settings import WorkerSettings
from openai import OpenAI
from standardwebhooks import Webhook

from ..support.journal import make_job

HOOK = "https://example.com/hook"
NOT_URLS = [
    "",
    "example.com/hook",
    "ftp://example.com/",
    "file:///etc/passwd",
    "https://",
    "https:///hook",
    "https://user:secret@example.com/",
    "https://example.com@10.0.0.1/",
    "https://@10.0.0.1/",
    "https://example.com/#part",
    "https://example.com\\@10.0.0.1/",
    "https://exa mple.com/",
    "https://example.com/a\r\nX-Injected: 1",
    "https://example.com/\x00",
    "https://exämple.com/",
    "https://127.0.0.1\u3002example/",
    "https://１２７.0.0.1/",
    "https://example.com:99999/",
    "https://example.com:0/",
    "https://example.com:/",
    "https://[::1",
    "https://[fe80::1%25eth0]/",
    "https://-/",
    "https://" + "a" * 64 + ".com/",
    HOOK + "?" + "x" * 2048,
]
ODD_NUMBERS = [
    "2130706433",
    "0x7f000001",
    "017700000001",
    "127.1",
    "127.0.1",
    "0x7f.1",
    "0177.0.0.1",
    "127.0.0.0x1",
    "127.0.0.1.",
    "0",
    "0x",
    "1.2.3.4.5",
    "256.1.1.1",
    "134744072",
]
NOT_PUBLIC = [
    "0.0.0.0",
    "10.1.2.3",
    "100.64.0.1",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "192.0.0.8",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::127.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:a9fe:a9fe",
    "64:ff9b::127.0.0.1",
    "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::8.8.8.8",
    "100::1",
    "2001::1",
    "2001:0:7f00:1::",
    "2001:20::1",
    "2001:db8::1",
    "2002:7f00:1::1",
    "2002:a00:1::",
    "2002:808:808::",
    "3fff::1",
    "5f00::1",
    "4000::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fec0::1",
    "ff02::1",
]
PUBLIC = [
    "8.8.8.8",
    "93.184.215.14",
    "2606:2800:21f:cb07:6820:80da:af6b:8b2c",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
]


@pytest.mark.parametrize("url", NOT_URLS)
def test_a_job_with_such_a_url_is_refused_by_the_fields_name(url: str) -> None:
    with pytest.raises(InvalidRequest, match="webhook") as refused:
        Job.from_python(make_job().model_dump() | {"webhook": url})
    assert refused.value.param == "webhook"


@pytest.mark.parametrize("host", ODD_NUMBERS)
def test_numbers_that_a_resolver_would_take_for_an_address_are_no_host(host: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        check_url(f"https://{host}/")
    with pytest.raises(WebhookRefused):
        Guard(look_up=lambda *_: ["8.8.8.8"]).check(f"https://{host}/")


@pytest.mark.parametrize(
    "host",
    [
        "::127.0.0.1",
        "::7f00:1",
        "::ffff:10.0.0.1",
        "::FFFF:A00:1",
        "0:0:0:0:0:ffff:169.254.169.254",
        "::ffff:0:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b::10.0.0.1",
        "64:ff9b:1::10.0.0.1",
        "2001:0:808:808:0:0:f5ff:fffe",
        "2002:a00:1::1",
    ],
)
def test_an_ipv4_address_in_ipv6_dress_is_no_host_even_where_its_network_is_listed(host: str) -> None:
    with pytest.raises(ValueError, match="hides an IPv4 address"):
        check_url(f"https://[{host}]/")
    with pytest.raises(WebhookRefused) as refused:
        Guard([ip_network("::/0"), ip_network("0.0.0.0/0")], look_up=lambda *_: [host]).check(
            f"http://[{host}]/"
        )
    assert refused.value.final


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_address_that_is_not_public_is_refused_by_name_and_by_number(address: str) -> None:
    guard = Guard(look_up=lambda host, _: [address] if host == "evil.example" else [host])
    literal = f"[{address}]" if ":" in address else address
    for url, final in ((f"https://{literal}/", True), ("https://evil.example/", False)):
        with pytest.raises(WebhookRefused) as refused:
            guard.check(url)
        assert refused.value.final is final, "a name may lead elsewhere tomorrow"


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_called_and_only_with_tls(address: str) -> None:
    guard = Guard(look_up=lambda *_: [address])
    assert guard.check(HOOK).addresses == (address,)
    with pytest.raises(WebhookRefused, match="use https"):
        guard.check("http://example.com/hook")


def test_one_bad_address_among_good_ones_is_enough() -> None:
    with pytest.raises(WebhookRefused, match=r"10\.0\.0\.1"):
        Guard(look_up=lambda *_: ["8.8.8.8", "10.0.0.1"]).check(HOOK)


def test_listed_networks_may_be_called_without_tls_and_nothing_beside_them() -> None:
    settings = load_keeper_settings(webhook_allow="10.0.0.0/8, fd00::/8")
    guard = Guard(settings.webhook_allow, look_up=lambda host, _: [host])
    assert guard.check("http://10.1.2.3:8000/hook?a=1").path == "/hook?a=1"
    mapped = Guard(settings.webhook_allow, look_up=lambda *_: ["::ffff:10.0.0.1"])
    assert guard.check("http://[fd00::1]/")
    assert mapped.check("http://mapped.example/")
    for url in ("http://11.0.0.1/", "http://127.0.0.1/", "http://[fe80::1]/"):
        with pytest.raises(WebhookRefused):
            guard.check(url)


def test_a_host_without_an_address_may_have_one_later() -> None:
    def fails(*_: object) -> list[str]:
        raise OSError("no such host")

    for look_up in (fails, lambda *_: []):
        with pytest.raises(WebhookFailed) as failed:
            Guard(look_up=look_up).check(HOOK)
        assert failed.value.why == "dns"


def test_every_kind_of_address_has_been_judged_once() -> None:
    assert not [each for each in NOT_PUBLIC if public(ip_address(each))]
    assert all(public(ip_address(each)) for each in PUBLIC)


# ---- signatures


def event(kind: str = "batch.completed") -> WebhookEvent:
    return WebhookEvent(id="evt_1", type=kind, created_at=1_700_000_000, data={"id": "batch_1", "note": "ö"})


def test_an_unmodified_openai_client_and_standardwebhooks_verify_what_we_sign() -> None:
    secret, body, now = new_secret(), event().body(), int(time.time())
    headers = signed_headers([secret_key(secret)], "evt_1", now, body)
    unwrapped = OpenAI(api_key="-", webhook_secret=secret).webhooks.unwrap(body, headers)
    assert (unwrapped.type, unwrapped.id, unwrapped.data.id) == ("batch.completed", "evt_1", "batch_1")
    assert Webhook(secret).verify(body, headers)["timestamp"] == "2023-11-14T22:13:20Z"


def test_a_network_that_is_none_is_named_and_keeps_a_worker_from_starting(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRISTMILL_WEBHOOK_ALLOW", "10.0.0.0/8,banana")
    with pytest.raises(Misconfigured, match=r"WEBHOOK_ALLOW.*'banana' does not appear.*write networks"):
        load_keeper_settings()
    settings = WorkerSettings(model="m", home=tmp_path)
    with pytest.raises(Misconfigured, match="banana"):
        WorkerApp(settings).run()


def test_while_a_secret_is_replaced_both_verify_and_no_third() -> None:
    old, new, other = new_secret(), new_secret(), new_secret()
    settings = KeeperSettings(webhook_secret=f"{new} {old}")  # type: ignore[arg-type]
    body, now = event().body(), int(time.time())
    headers = signed_headers(settings.webhook_keys(HOOK), "evt_1", now, body)
    for secret in (old, new):
        assert OpenAI(api_key="-", webhook_secret=secret).webhooks.unwrap(body, headers)
        assert Webhook(secret).verify(body, headers)
        assert verify([secret_key(secret)], headers, body, now)
    assert not verify([secret_key(other)], headers, body, now)


def test_our_own_check_takes_what_standardwebhooks_signs_and_nothing_else() -> None:
    import datetime

    secret, body, now = new_secret(), event().body(), int(time.time())
    key = secret_key(secret)
    signed = Webhook(secret).sign("evt_1", datetime.datetime.fromtimestamp(now, datetime.UTC), body.decode())
    headers = {"webhook-id": "evt_1", "webhook-timestamp": str(now), "webhook-signature": signed}
    assert verify([key], headers, body, now)
    assert verify([key], headers | {"webhook-signature": f"v1a,xyz {signed}"}, body, now)
    for wrong in (
        {"webhook-id": "evt_2"},
        {"webhook-timestamp": str(now + 1)},
        {"webhook-timestamp": ""},
        {"webhook-signature": ""},
        {"webhook-signature": "v1,ö"},
        {"webhook-signature": signature([secret_key(new_secret())], "evt_1", now, body)},
    ):
        assert not verify([key], headers | wrong, body, now)
    assert not verify([key], headers, body + b" ", now)
    assert not verify([key], headers, body, now + 301)


@pytest.mark.parametrize("secret", ["hush", "whsec_", "whsec_aGk=", "whsec_" + "A" * 100, "whsec_!"])
def test_a_secret_that_is_none_is_refused_and_not_quoted(secret: str) -> None:
    for given in ({"webhook_secret": secret}, {"webhook_secrets": json.dumps({HOOK: secret})}):
        with pytest.raises(Misconfigured, match="webhooks secret") as refused:
            load_keeper_settings(**given)
        assert secret.removeprefix("whsec_") == "" or secret not in refused.value.message


def test_the_longest_beginning_of_a_url_decides_which_secret_signs() -> None:
    default, site, path = (new_secret() for _ in range(3))
    secrets = {"https://A.example.:443/": site, "https://a.example/b/": path}
    settings = load_keeper_settings(webhook_secret=default, webhook_secrets=json.dumps(secrets))
    for url, secret in {
        "https://a.example": site,
        "https://a.example/bb": site,
        "HTTPS://a.EXAMPLE:443?x": site,
        "https://a.example/b": path,
        "https://a.example/b?x": path,
        "https://a.example/B": site,
        "https://a.example/b/c": path,
        "https://a.example.org/": default,
        "https://a.example:444/": default,
        "http://a.example/": default,
    }.items():
        assert settings.webhook_keys(url) == [secret_key(secret)], url
    for wrong in ({"a.example": site}, {"https://a.example": site, "https://a.example:443/": path}):
        with pytest.raises(Misconfigured, match=r"GRISTMILL_WEBHOOK_SECRETS: .*a\.example"):
            load_keeper_settings(webhook_secrets=json.dumps(wrong))
    assert KeeperSettings().webhook_keys(HOOK) == []
    assert default not in repr(settings)
    assert site not in repr(settings)


# ---- events


def test_data_stays_small_whatever_the_caller_attached() -> None:
    metadata = {str(n): "x" * 5000 for n in range(16)}
    data = json.loads(event_data({"id": "job_1", "none": None}, {"metadata": metadata, "custom_id": "c"}))
    assert data == {"id": "job_1", "custom_id": "c"}
    assert len(event_data({}, {"a": "ö" * (DATA_BYTES // 4)})) > 1000


def test_the_schedule_takes_three_days() -> None:
    assert len(SCHEDULE_S) == 10
    assert 3 * 86_400 < sum(SCHEDULE_S) < 4 * 86_400


# ---- answers


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("120", 120.0),
        (" 7 ", 7.0),
        ("soon", None),
        ("-5", None),
        ("1e9", None),
        ("9" * 10, 9_999_999_999.0),
        ("9" * 400, math.inf),
    ],
)
def test_retry_after_in_seconds(value: str, seconds: float | None) -> None:
    head = f"HTTP/1.1 503 No\r\nRetry-After: {value}\r\n\r\n".encode()
    assert _parse(head) == Reply(503, seconds)


def test_retry_after_as_a_date() -> None:
    from email.utils import formatdate

    for ahead_s, expected in ((600, 600.0), (-600, 0.0)):
        date = formatdate(time.time() + ahead_s, usegmt=True)
        reply = _parse(f"HTTP/1.1 429 Slow down\r\nretry-after: {date}\r\n\r\n".encode())
        assert reply.retry_after_s == pytest.approx(expected, abs=30)


@pytest.mark.parametrize("head", [b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 99 x\r\n\r\n", b"HTTP/2 200\r\n\r\n"])
def test_what_is_not_http_is_no_answer(head: bytes) -> None:
    with pytest.raises(WebhookFailed) as failed:
        _parse(head)
    assert failed.value.why == "bad_answer"
