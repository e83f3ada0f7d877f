"""Result stores: written once, whole or not at all, and clear about what is missing."""

from __future__ import annotations

import inspect
import resource
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import botocore.exceptions as bx
import pytest
from gristmill.backends.s3 import ATTEMPTS
from gristmill.backends.store import CONFLICT_TRIES, FileStore, ResultStore, S3Store, open_store
from gristmill.schemas import keys
from gristmill.schemas.errors import GristmillError, InvalidRequest, Misconfigured, StoreUnavailable
from gristmill.schemas.settings import Settings

from ..support.s3 import Proxy, S3Server

NAME = keys.result_object("job_1")


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ResultStore:
    """Each kind in turn: they promise the same."""
    if request.param == "file":
        return open_store(tmp_path.as_uri(), Settings(results_url=tmp_path.as_uri()))
    s3: S3Server = request.getfixturevalue("s3")
    return open_store(s3.url, s3.settings())


# ---- what both promise


def test_a_new_object_is_written_and_read_back(store: ResultStore) -> None:
    body = "naïve ✓".encode() * 1000
    assert store.get(NAME) is None
    assert not store.exists(NAME)
    assert store.put_new(NAME, body)
    assert store.exists(NAME)
    assert store.get(NAME) == body


def test_an_object_is_never_overwritten(store: ResultStore) -> None:
    assert store.put_new(NAME, b"first")
    assert not store.put_new(NAME, b"second")
    assert store.get(NAME) == b"first"


def test_of_eight_writers_at_once_exactly_one_wins(store: ResultStore) -> None:
    for round_number in range(5):
        name, gate = f"race/{round_number}.json", threading.Barrier(8)

        def write(number: int, name: str = name, gate: threading.Barrier = gate) -> bool:
            gate.wait()
            return store.put_new(name, b"%d" % number * 1000)

        with ThreadPoolExecutor(8) as pool:
            won = [*pool.map(write, range(8))]
        assert won.count(True) == 1
        assert store.get(name) == b"%d" % won.index(True) * 1000


def test_names_are_listed_by_prefix(store: ResultStore) -> None:
    names = {"results/job_1.json", "results/b1/1.json", "results/b1/2.json", "results/b10/1.json"}
    for name in names:
        store.put_new(name, b"x")
    assert set(store.list()) == names
    assert set(store.list("results/b1/")) == {"results/b1/1.json", "results/b1/2.json"}
    assert set(store.list("results/b1")) == names - {"results/job_1.json"}
    assert set(store.list("nothing")) == set()


UNSAFE = [
    "",
    "/etc/passwd",
    "../x",
    "a/../../x",
    "a//b",
    "a/",
    ".hidden",
    "a/.b",
    "a\\b",
    "a\nb",
    "ä",
    "x" * 600,
]


def test_unsafe_names_are_refused(store: ResultStore) -> None:
    for name in UNSAFE:
        for call in (store.get, store.exists, lambda name: store.put_new(name, b"")):
            with pytest.raises(InvalidRequest):
                call(name)


def test_a_good_store_passes_its_check_again_and_again(store: ResultStore) -> None:
    store.check()
    store.check()
    store.check(write=False)


# ---- directories


def test_a_file_result_leaves_nothing_beside_it(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put_new(NAME, b"x")
    store.put_new(NAME, b"y")
    store.check()
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] == [NAME]


def test_what_a_killed_writer_left_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / ".job_1.json.0123").write_bytes(b"half")
    store = FileStore(tmp_path)
    assert [*store.list()] == []
    assert store.put_new(NAME, b"whole")
    assert store.get(NAME) == b"whole"


def test_a_missing_directory_is_named_with_the_next_step(tmp_path: Path) -> None:
    store = open_store((tmp_path / "gone").as_uri(), Settings(results_url="file:///x"))
    for call in (
        store.check,
        lambda: store.put_new(NAME, b""),
        lambda: store.get(NAME),
        lambda: [*store.list()],
    ):
        with pytest.raises(Misconfigured, match=r"mkdir -p .*/gone"):
            call()


def test_our_own_default_directory_is_created(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    open_store(settings.results, settings).check()
    assert (tmp_path / "home" / "results").is_dir()


def test_a_directory_we_may_not_write_to_is_named() -> None:
    with pytest.raises(Misconfigured, match=r"/sys.*right to write"):
        FileStore(Path("/sys")).check()  # nobody may, root included


def test_a_file_in_the_place_of_the_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    with pytest.raises(Misconfigured, match="f"):
        FileStore(tmp_path / "f").put_new(NAME, b"")


def test_a_full_disk_is_worth_another_attempt(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    with full_disk(), pytest.raises(StoreUnavailable, match="large"):
        store.put_new(NAME, b"x" * 100_000)
    assert not store.exists(NAME)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 10 kB: the nearest to a full disk that needs no privileges.

    It holds for the whole process, so for the call alone: pytest's own report may be going to a file.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "url", ["file://relative/dir", "file:relative", "ftp://x", "s3://", "s3:///p", "plain", ""]
)
def test_a_url_that_names_no_store_is_refused(url: str) -> None:
    with pytest.raises(Misconfigured, match="GRISTMILL_RESULTS_URL"):
        open_store(url, Settings(results_url="file:///x"))


def test_a_path_with_spaces_and_accents_is_taken_from_its_url(tmp_path: Path) -> None:
    folder = tmp_path / "my résults"
    folder.mkdir()
    store = open_store(folder.as_uri(), Settings(results_url=folder.as_uri()))
    assert store.put_new(NAME, b"x")
    assert (folder / NAME).read_bytes() == b"x"


# ---- S3


def test_objects_lie_under_the_prefix(s3: S3Server) -> None:
    open_store(s3.url, s3.settings()).put_new(NAME, b"x")
    listed = s3.client.list_objects_v2(Bucket=s3.bucket)["Contents"]
    assert [item["Key"] for item in listed] == [f"runs/one/{NAME}"]


def test_a_missing_bucket_is_named_with_the_next_step(s3: S3Server) -> None:
    store = open_store("s3://no-such-bucket-here/p", s3.settings())
    calls = (
        store.check,
        lambda: store.put_new(NAME, b""),
        lambda: store.get(NAME),
        lambda: store.exists(NAME),
        lambda: [*store.list()],
    )
    for call in calls:
        with pytest.raises(Misconfigured, match=r"'no-such-bucket-here' does not exist.*create it"):
            call()


def test_a_short_outage_is_survived_and_a_long_one_is_unavailable(s3: S3Server, s3_proxy: Proxy) -> None:
    store = open_store(s3.url, s3.settings(s3_proxy.endpoint))
    s3_proxy.faults.append((503, "SlowDown"))
    assert store.put_new("a", b"x")
    s3_proxy.faults.extend([(503, "ServiceUnavailable")] * ATTEMPTS)
    before = s3_proxy.requests
    with pytest.raises(StoreUnavailable, match="503"):
        store.put_new("b", b"x")
    assert s3_proxy.requests - before == ATTEMPTS
    assert store.put_new("b", b"x")


def test_dropped_connections_are_unavailable_after_bounded_retries(s3: S3Server, s3_proxy: Proxy) -> None:
    store = open_store(s3.url, s3.settings(s3_proxy.endpoint))
    s3_proxy.faults.extend(["drop"] * ATTEMPTS)
    with pytest.raises(StoreUnavailable):
        store.get("a")
    assert store.get("a") is None


def test_a_lost_answer_to_a_put_finds_its_own_object(s3: S3Server, s3_proxy: Proxy) -> None:
    store = open_store(s3.url, s3.settings(s3_proxy.endpoint))
    s3_proxy.faults.append("lose reply")
    assert not store.put_new(NAME, b"mine")
    assert store.get(NAME) == b"mine"


def test_a_conflict_of_two_writers_is_settled(s3: S3Server, s3_proxy: Proxy) -> None:
    """AWS answers 409 while another conditional write of the same name is under way."""
    store = open_store(s3.url, s3.settings(s3_proxy.endpoint))
    conflict = (409, "ConditionalRequestConflict")
    s3_proxy.faults.extend([conflict, conflict])
    assert store.put_new("a", b"x")
    s3_proxy.faults.append(conflict)
    assert not store.put_new("a", b"y")
    s3_proxy.faults.extend([conflict] * CONFLICT_TRIES)
    with pytest.raises(StoreUnavailable, match="another writer"):
        store.put_new("b", b"x")


def test_a_refusal_of_rights_is_a_matter_of_settings(s3: S3Server, s3_proxy: Proxy) -> None:
    store = open_store(s3.url, s3.settings(s3_proxy.endpoint))
    s3_proxy.faults.append((403, "AccessDenied"))
    with pytest.raises(Misconfigured, match=r"AccessDenied.*credentials"):
        store.put_new("a", b"x")


def test_an_s3_that_would_overwrite_is_found_out(s3: S3Server, s3_proxy: Proxy) -> None:
    store = open_store(s3.url, s3.settings(s3_proxy.endpoint))
    store.check()
    s3_proxy.faults.extend(["forget condition"] * 3)
    with pytest.raises(Misconfigured, match="If-None-Match"):
        store.check()


def test_nobody_at_the_endpoint_is_unavailable_soon(s3_proxy: Proxy, s3: S3Server) -> None:
    s3_proxy.close()
    store = open_store(s3.url, s3.settings(s3_proxy.endpoint))
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.check()
    assert time.monotonic() - began < 20


def test_missing_credentials_say_what_to_set(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    store = open_store(s3.url, s3.settings(s3_access_key=None, s3_secret_key=None))
    with pytest.raises(Misconfigured, match="GRISTMILL_S3_ACCESS_KEY"):
        store.check()


def test_an_endpoint_that_is_no_url_is_refused(s3: S3Server) -> None:
    with pytest.raises(Misconfigured, match="endpoint"):
        open_store(s3.url, s3.settings("not a url"))


@pytest.fixture(scope="module")
def an_s3_store(moto_client: Any) -> S3Store:
    """Only its translation of exceptions is used."""
    return S3Store("any", "", S3Server(moto_client).settings())


BOTO_CLASSES = [
    cls
    for _, cls in inspect.getmembers(bx, inspect.isclass)
    if issubclass(cls, bx.BotoCoreError | bx.ClientError)
]


@pytest.mark.parametrize("cls", BOTO_CLASSES, ids=lambda cls: cls.__name__)
def test_every_exception_of_botocore_is_translated(cls: type[Exception], an_s3_store: S3Store) -> None:
    exc = cls.__new__(cls)
    if isinstance(exc, bx.ClientError):
        exc.response = {}
    with pytest.raises(GristmillError), an_s3_store._errors():
        raise exc


@pytest.mark.parametrize(
    "exc",
    [
        bx.EndpointConnectionError(endpoint_url="x"),
        bx.ConnectTimeoutError(endpoint_url="x"),
        bx.ReadTimeoutError(endpoint_url="x"),
        bx.ConnectionClosedError(endpoint_url="x"),
        bx.ProxyConnectionError(proxy_url="x"),
        bx.SSLError(endpoint_url="x", error="y"),
        bx.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        bx.ResponseStreamingError(error="x"),
        bx.CredentialRetrievalError(provider="x", error_msg="y"),
    ],
    ids=lambda exc: type(exc).__name__,
)
def test_what_the_network_does_is_worth_another_attempt(exc: Exception, an_s3_store: S3Store) -> None:
    with pytest.raises(StoreUnavailable), an_s3_store._errors():
        raise exc
