"""`gristmill models mirror` and `verify`: copies with checksums, and what is wrong with them, by file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends import bucket, copying, hub, models
from gristmill.backends import places as places_module
from gristmill.backends.manifest import MANIFEST, sha256_of
from gristmill.backends.mirror import Mirrored, mirror
from gristmill.backends.places import Folder
from gristmill.backends.progress import silent
from gristmill.backends.verification import examine
from gristmill.engine.models.tiny import write_tiny
from gristmill.producer.cli import cli
from gristmill.producer.console import run_guarded
from gristmill.schemas.errors import DownloadFailed, InvalidRequest, Misconfigured, ModelInvalid
from gristmill.schemas.settings import Settings

from ..support.s3 import S3Server

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny", shards=3, tokenizer=True)


@pytest.fixture
def settings(s3: S3Server, tmp_path: Path) -> Settings:
    return s3.settings(home=tmp_path / "home", hub_cache=tmp_path / "hub")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards go up in two parts, the first of the least size that S3 takes."""
    monkeypatch.setattr(places_module, "PIECE_BYTES", 5 * 1024 * 1024)


def contents(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir() if each.name != MANIFEST}


def copied(source: object, target: object, settings: Settings) -> Mirrored:
    return mirror(str(source), str(target), None, silent, settings)


@pytest.mark.usefixtures("small_pieces")
def test_a_model_goes_to_a_bucket_and_back_and_a_second_copy_transfers_nothing(
    s3: S3Server, settings: Settings, tmp_path: Path
) -> None:
    model = write_tiny(tmp_path / "wide", hidden_size=480, intermediate_size=960, tokenizer=True)
    assert (model / "model.safetensors").stat().st_size > 5 * 1024 * 1024
    url, back = f"s3://{s3.bucket}/backup", tmp_path / "back"
    files = len(contents(model))
    for target in (url, back):
        source = model if target is url else url
        assert copied(source, target, settings).copied == files
        assert copied(source, target, settings).copied == 0
    assert contents(back) == contents(model)
    models.verify(back, deep=True)
    assert contents(models.ensure(url, None, silent, settings)) == contents(model)


def test_a_copy_that_stopped_is_no_model_and_goes_on(
    s3: S3Server, model: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{s3.bucket}/backup"
    put = bucket.Bucket.put

    def full(self: bucket.Bucket, name: str, body: bytes) -> None:
        if name == "tokenizer.json":
            raise DownloadFailed("the network is gone")
        put(self, name, body)

    with monkeypatch.context() as broken:
        broken.setattr(bucket.Bucket, "put", full)
        broken.setattr(copying, "FILES_AT_ONCE", 1)
        with pytest.raises(DownloadFailed):
            copied(model, url, settings)
    with pytest.raises(ModelInvalid, match="not finished; run the same gristmill models mirror"):
        models.ensure(url, None, silent, settings)
    again = copied(model, url, settings)
    assert 0 < again.copied < again.files
    (model / "config.json").write_text((model / "config.json").read_text() + " ")
    assert copied(model, url, settings).copied == 1
    assert contents(models.ensure(url, None, silent, settings)) == contents(model)


def test_a_damaged_copy_is_mended_file_by_file(model: Path, settings: Settings, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    copied(model, target, settings)
    damaged = bytearray((target / SHARD).read_bytes())
    damaged[-1] ^= 1
    (target / SHARD).write_bytes(bytes(damaged))
    assert copied(model, target, settings).copied == 1
    assert contents(target) == contents(model)


def test_a_name_of_its_own_puts_a_model_back_into_the_cache(
    model: Path, settings: Settings, tmp_path: Path
) -> None:
    snapshot = hub.snapshot("someone/something", COMMIT, tmp_path / "hub")
    assert snapshot is not None
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    hub.point_to(snapshot, "main")
    copied("someone/something", tmp_path / "copy", settings)
    with pytest.raises(InvalidRequest, match="the same place"):
        copied("someone/something", "someone/something", settings)
    elsewhere = settings.model_copy(update={"hub_cache": tmp_path / "another-hub", "offline": True})
    copied(tmp_path / "copy", "someone/something", elsewhere)
    path = models.resolve("someone/something", settings=elsewhere)
    assert path.is_relative_to(tmp_path / "another-hub")
    assert contents(path) == contents(snapshot)
    with pytest.raises(ModelInvalid, match="smollm2-135m is the name of a bundled model and this is no copy"):
        copied(tmp_path / "copy", "smollm2-135m", elsewhere)


def test_a_file_that_rotted_in_the_hubs_cache_is_not_copied_as_good(model: Path, tmp_path: Path) -> None:
    snapshot = hub.snapshot("someone/something", COMMIT, tmp_path / "hub")
    assert snapshot is not None
    snapshot.parent.mkdir(parents=True)
    model.rename(snapshot)
    hub.point_to(snapshot, "main")
    blob = tmp_path / "hub" / sha256_of(snapshot / SHARD)
    (snapshot / SHARD).rename(blob)
    (snapshot / SHARD).symlink_to(blob)
    flip(blob)
    settings = Settings(home=tmp_path / "home", hub_cache=tmp_path / "hub", offline=True)
    with pytest.raises(ModelInvalid, match=f"{SHARD}: .* bytes with SHA-256"):
        copied("someone/something", tmp_path / "copy", settings)
    with pytest.raises(ModelInvalid, match="not finished"):
        models.verify(tmp_path / "copy")


def test_a_copy_needs_room_and_two_places(
    model: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidRequest, match="the same place"):
        copied(model, model, settings)
    monkeypatch.setattr(copying, "ROOM_BYTES", 10**18)
    with pytest.raises(Misconfigured, match=r"are needed and .* are free; make room, or set GRISTMILL_HOME"):
        copied(model, tmp_path / "copy", settings)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def misplace(path: Path) -> None:
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = SHARD
    index["weight_map"]["model.embed_tokens.weight"] = SHARD
    path.write_text(json.dumps(index))


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str, str]] = {
    "gone": (SHARD, Path.unlink, "missing", "missing"),
    "cut": (SHARD, cut, "truncated", "truncated"),
    "flipped": (SHARD, flip, "different", ""),
    "emptied": ("config.json", lambda path: path.write_bytes(b""), "truncated", "damaged"),
    "misplaced": ("model.safetensors.index.json", misplace, "different", "different"),
}
"""File, what happens to it, what that is called with recorded checksums and without."""


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("recorded", [True, False])
def test_what_is_wrong_is_named_by_file(
    damage: str, recorded: bool, model: Path, settings: Settings, tmp_path: Path
) -> None:
    name, harm, *kinds = DAMAGES[damage]
    target = tmp_path / "copy"
    copied(model, target, settings)
    if not recorded:
        (target / MANIFEST).unlink()
    assert not examine(Folder(target), silent).problems
    harm(target / name)
    found = [(each.file, each.kind) for each in examine(Folder(target), silent).problems]
    kind = kinds[0] if recorded else kinds[1]
    assert found == ([(name, kind)] if kind else [])


def test_the_commands_say_it_and_exit_with_2(
    s3: S3Server,
    model: Path,
    settings: Settings,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("s3_endpoint_url", "s3_region"):
        monkeypatch.setenv(f"GRISTMILL_{name.upper()}", str(getattr(settings, name)))
    monkeypatch.setenv("GRISTMILL_S3_ACCESS_KEY", "test")
    monkeypatch.setenv("GRISTMILL_S3_SECRET_KEY", "test")
    monkeypatch.setenv("GRISTMILL_HOME", str(settings.home))
    url = f"s3://{s3.bucket}/backup"
    assert run_guarded(cli, ["models", "mirror", str(model), url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["copied"] == 7
    assert run_guarded(cli, ["models", "verify", url, str(model)]) == 0
    out = capsys.readouterr().out
    assert f"{url}: ok (7 files" in out
    assert "7 compared with checksums" in out
    s3.client.put_object(Bucket=s3.bucket, Key=f"backup/{SHARD}", Body=b"x")
    s3.client.delete_object(Bucket=s3.bucket, Key="backup/config.json")
    assert run_guarded(cli, ["models", "verify", url]) == 2
    out, err = capsys.readouterr()
    assert f"{SHARD}: truncated: 1 bytes instead of" in out
    assert "config.json: missing" in out
    assert f"next: delete what is different, then gristmill models mirror SOURCE {url}" in err
    assert run_guarded(cli, ["models", "verify", url, "--json"]) == 2
    assert [each["kind"] for each in json.loads(capsys.readouterr().out)["files"]] == ["missing", "truncated"]
