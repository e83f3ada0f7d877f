"""Models from a hub and from buckets: fetched once for a machine, whole or not at all, and without a network
when they are here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends import aws_errors, bucket, copying, fetched, models
from gristmill.backends import places as places_module
from gristmill.backends.copying import copy
from gristmill.backends.manifest import MANIFEST
from gristmill.backends.places import Folder
from gristmill.backends.progress import Progress
from gristmill.engine.models.tiny import write_tiny
from gristmill.schemas.errors import (
    DownloadFailed,
    InvalidRequest,
    Misconfigured,
    ModelInvalid,
    ModelNotFound,
)
from gristmill.schemas.settings import Settings

from ..support.hub import COMMIT, HubServer, hub_server
from ..support.s3 import Proxy, S3Server
from ..support.waiting import wait_until

__all__ = ["hub_server"]

ENSURE = """
import json, sys
from gristmill.backends import models
from gristmill.schemas.errors import GristmillError
from gristmill.schemas.settings import load_settings
told = lambda event, args: event == "socket.connect" and print("socket", args[1], flush=True)
sys.addaudithook(told)
try:
    say = lambda progress: print(progress.stage, flush=True)
    print("path", models.ensure(sys.argv[1], None, say, load_settings()), flush=True)
except GristmillError as exc:
    print(exc.code, exc.message, flush=True)
"""
"""In a process of its own: the Hub's library reads its environment when it is imported."""


def ensuring(name: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-c", ENSURE, name],
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> list[str]:
    return process.communicate(timeout=120)[0].splitlines()


@pytest.fixture
def places(tmp_path: Path, hub_server: HubServer) -> dict[str, str]:
    """Environment of processes on one machine."""
    return {
        "GRISTMILL_HOME": str(tmp_path / "home"),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": hub_server.endpoint,
    }


# ---- the Hub


def test_after_a_kill_the_next_of_two_goes_on_and_the_other_waits(
    hub_server: HubServer, places: dict[str, str], tmp_path: Path
) -> None:
    shards = [name for name in hub_server.names if name.endswith(".safetensors")]
    hub_server.stalled = {shards[1]}
    killed = ensuring("someone/something", **places)
    blobs = tmp_path / "hf" / "hub" / "models--someone--something" / "blobs"
    whole = {hub_server.entry(name)["oid"] for name in hub_server.names if name != shards[1]}
    wait_until(
        lambda: hub_server.half_sent.is_set() and whole <= {each.name for each in blobs.iterdir()},
        60,
        "all files but half of one",
    )
    killed.kill()
    killed.communicate()
    assert list(blobs.glob("*.incomplete"))
    with pytest.raises(ModelInvalid, match=shards[1]):
        models.resolve("someone/something", settings=Settings(hub_cache=tmp_path / "hf" / "hub"))

    first, second = (ensuring("someone/something", **places) for _ in range(2))
    assert first.stdout is not None
    assert second.stdout is not None
    words = [next(each.stdout) for each in (first, second)]  # the one that waits says so, and nothing else
    hub_server.stalled = set()
    told = [[word.strip(), *said(each)] for word, each in zip(words, (first, second), strict=True)]
    assert sum("waiting for another process that fetches it" in each for each in told) == 1
    assert sum("downloading" in each for each in told) == 1
    path = tmp_path / "hf" / "hub" / "models--someone--something" / "snapshots" / COMMIT
    assert [each[-1] for each in told] == [f"path {path}"] * 2
    assert {name: hub_server.sent[name] for name in shards} == {shards[0]: 1, shards[1]: 2, shards[2]: 1}
    assert not list(blobs.glob("*.incomplete"))


def test_a_model_that_is_here_starts_without_a_single_connection(
    hub_server: HubServer, places: dict[str, str], tmp_path: Path
) -> None:
    assert said(ensuring("someone/something", **places))[-1].startswith("path ")
    asked = hub_server.sent.total()
    for offline in ({}, {"HF_HUB_OFFLINE": "1"}):
        lines = said(ensuring("someone/something", **places, **offline))
        assert [line.split(" ")[0] for line in lines] == ["path"]
    assert hub_server.sent.total() == asked


@pytest.mark.parametrize("name", ["someone/else", "s3://nowhere/model"])
def test_offline_a_missing_model_says_what_to_run_and_asks_nobody(name: str, places: dict[str, str]) -> None:
    [line] = said(
        ensuring(name, **places, GRISTMILL_OFFLINE="1", GRISTMILL_S3_ENDPOINT_URL="http://127.0.0.1:9")
    )
    assert line.startswith("model_not_found")
    assert f"gristmill models mirror {name} DIR" in line
    assert f"gristmill models pull {name}" in line


# ---- buckets


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny", shards=3, tokenizer=True)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model is fetched in as many pieces as a large one."""
    monkeypatch.setattr(places_module, "PIECE_BYTES", 16_384)
    monkeypatch.setattr(aws_errors, "FIRST_PAUSE_S", 0.001)


def upload(s3: S3Server, model: Path, prefix: str = "models/tiny") -> str:
    for file in model.iterdir():
        s3.client.upload_file(str(file), s3.bucket, f"{prefix}/{file.name}")
    s3.client.put_object(Bucket=s3.bucket, Key=f"{prefix}/")  # as a console's "create folder" makes it
    return f"s3://{s3.bucket}/{prefix}"


def contents(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir() if each.name != MANIFEST}


@pytest.mark.usefixtures("small_pieces")
def test_a_model_of_a_bucket_is_fetched_in_pieces_once(
    s3: S3Server, s3_proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    url = upload(s3, model)
    s3.client.put_object(Bucket=s3.bucket, Key="models/tiny/pytorch_model.bin", Body=b"pickle")
    s3.client.put_object(Bucket=s3.bucket, Key="models/tiny/onnx/model.json", Body=b"{}")
    settings = s3.settings(s3_proxy.endpoint, home=tmp_path / "home")
    with pytest.raises(ModelNotFound, match=f"run: gristmill models pull {url}"):
        models.resolve(url, settings=settings)
    seen: list[Progress] = []
    path = models.ensure(url, None, seen.append, settings)
    assert contents(path) == contents(model)
    total = sum(len(each) for each in contents(model).values())
    assert (seen[-1].stage, seen[-1].done, seen[-1].total) == ("copying", total, total)
    asked = s3_proxy.requests
    assert asked > total / 16_384
    assert models.ensure(url, None, seen.append, settings) == path
    assert s3_proxy.requests == asked
    assert [(each.name, each.problem) for each in models.list_models(settings=settings)] == [(url, None)]


@pytest.mark.usefixtures("small_pieces")
def test_a_download_that_broke_off_leaves_no_model_and_goes_on_where_it_was(
    s3: S3Server, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "FILES_AT_ONCE", 1)
    url, settings = upload(s3, model), s3.settings(home=tmp_path / "home")
    fetch, left, fetched_bytes = bucket.Bucket._range, 12, 0

    def cut(self: bucket.Bucket, *what: Any) -> bytes:
        nonlocal left, fetched_bytes
        if not left:
            raise DownloadFailed("the network is gone")
        left -= 1
        data = fetch(self, *what)
        fetched_bytes += len(data)
        return data

    monkeypatch.setattr(bucket.Bucket, "_range", cut)
    monkeypatch.setattr(bucket, "PIECES_AHEAD", 1)
    with pytest.raises(DownloadFailed):
        models.ensure(url, None, lambda _: None, settings)
    with pytest.raises(ModelNotFound):
        models.resolve(url, settings=settings)
    assert fetched_bytes > 0
    left = 1000
    assert contents(models.ensure(url, None, lambda _: None, settings)) == contents(model)
    assert fetched_bytes == sum(len(each) for each in contents(model).values())  # nothing came twice
    assert [each.name for each in (tmp_path / "home" / "models" / "s3").iterdir() if each.is_dir()] == [
        fetched.directory(url, tmp_path).name
    ]


@pytest.mark.usefixtures("small_pieces")
def test_lost_answers_and_busy_servers_cost_a_download_nothing_but_time(
    s3: S3Server, s3_proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    url = upload(s3, model)
    settings = s3.settings(s3_proxy.endpoint, home=tmp_path / "home")
    s3_proxy.faults.extend(["drop", (503, "SlowDown"), "lose reply", (500, "InternalError"), "drop"])
    assert contents(models.ensure(url, None, lambda _: None, settings)) == contents(model)


def test_pull_fetches_what_has_changed_in_the_bucket_and_nothing_else(
    s3: S3Server, s3_proxy: Proxy, model: Path, tmp_path: Path
) -> None:
    url = upload(s3, model)
    settings = s3.settings(s3_proxy.endpoint, home=tmp_path / "home")
    path = models.pull(url, settings=settings)
    weights = (path / "model-00001-of-00003.safetensors").stat().st_ino
    (model / "generation_config.json").write_text('{"temperature": 0.5}')
    upload(s3, model)
    assert models.ensure(url, None, lambda _: None, settings) == path
    assert not (path / "generation_config.json").exists()
    before = s3_proxy.requests
    models.pull(url, settings=settings)
    assert contents(path) == contents(model)
    assert (path / "model-00001-of-00003.safetensors").stat().st_ino == weights
    assert s3_proxy.requests - before < 10


def test_what_is_not_as_recorded_is_not_loaded(s3: S3Server, model: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "recorded"
    copy(Folder(model), Folder(recorded), lambda _: None)
    url, settings = upload(s3, recorded), s3.settings(home=tmp_path / "home")
    damaged = bytearray((recorded / "config.json").read_bytes())
    damaged[-3] ^= 1
    s3.client.put_object(Bucket=s3.bucket, Key="models/tiny/config.json", Body=bytes(damaged))
    with pytest.raises(ModelInvalid, match=r"config.json: .* recorded are .*copy the model there again"):
        models.ensure(url, None, lambda _: None, settings)
    s3.client.delete_object(Bucket=s3.bucket, Key="models/tiny/config.json")
    with pytest.raises(ModelInvalid, match=r"config.json is missing"):
        models.ensure(url, None, lambda _: None, settings)
    assert models.list_models(settings=settings) == []


@pytest.mark.parametrize("url", ["s3://", "s3:///model", "s3://b/x", "s3://bucket/../x", "s3://bucket/a?b"])
def test_a_url_that_names_no_place_of_a_model_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="write s3://bucket/prefix"):
        models.resolve(url, settings=Settings(home=tmp_path))


def test_a_bucket_that_is_not_there_or_empty_is_named(s3: S3Server, tmp_path: Path) -> None:
    settings = s3.settings(home=tmp_path)
    with pytest.raises(Misconfigured, match="bucket 'no-such-bucket' does not exist"):
        models.pull("s3://no-such-bucket/model", settings=settings)
    with pytest.raises(ModelNotFound, match="there is no model; check the name"):
        models.pull(f"s3://{s3.bucket}/model", settings=settings)
