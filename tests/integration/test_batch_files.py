"""Inputs and outputs that are objects of a bucket: streamed in pieces, whole or not at all."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from gristmill.backends import aws_errors, object_stream
from gristmill.producer.batch import output
from gristmill.producer.batch.sources import FileName, open_input, refuse_same_files
from gristmill.schemas.errors import BadInput, InvalidRequest, Misconfigured

from ..support.s3 import Proxy, S3Server


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aws_errors, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(object_stream, "PIECE_BYTES", 5 * 1024 * 1024)  # S3 takes no smaller parts


def read(name: str, s3: S3Server, endpoint: str | None = None) -> bytes:
    with open_input(FileName.of(name), s3.settings(endpoint)) as file:
        return file.read()


def test_an_object_is_written_in_parts_and_read_in_pieces(s3: S3Server) -> None:
    lines = [bytes([n]) * 1_000_000 for n in range(12)]
    name = f"s3://{s3.bucket}/out/a b.jsonl"
    assert output.write(name, lines, s3.settings()) == 12
    assert read(name, s3) == b"".join(lines)
    assert output.write(name, [b"small"], s3.settings()) == 1
    assert read(name, s3) == b"small"


def test_a_write_that_fails_leaves_the_object_as_it_was(s3: S3Server, tmp_path: Path) -> None:
    def broken() -> object:
        yield bytes(6_000_000)
        raise BadInput("no more")

    for name in (f"s3://{s3.bucket}/out.jsonl", str(tmp_path / "out.jsonl")):
        output.write(name, [b"before"], s3.settings())
        with pytest.raises(BadInput):
            output.write(name, broken(), s3.settings())  # type: ignore[arg-type]
        assert read(name, s3) == b"before"
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=s3.bucket)


def test_a_read_outlives_what_a_network_does(s3: S3Server, s3_proxy: Proxy) -> None:
    body = random.Random(1).randbytes(30_000)
    s3.client.put_object(Bucket=s3.bucket, Key="in.jsonl", Body=body)
    s3_proxy.faults.extend(["drop", *[(503, "SlowDown")] * 4])
    assert read(f"s3://{s3.bucket}/in.jsonl", s3, s3_proxy.endpoint) == body


def test_what_cannot_be_read_or_written_is_said_before_anything_runs(s3: S3Server, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such object"):
        read(f"s3://{s3.bucket}/nothing.jsonl", s3)
    with pytest.raises(InvalidRequest, match="s3://bucket/path"):
        read(f"s3://{s3.bucket}", s3)
    with pytest.raises(Misconfigured, match="no such bucket"):
        output.check_target("s3://nobodys-bucket/out.jsonl", "--output", s3.settings())
    with pytest.raises(Misconfigured, match="no directory"):
        output.check_target(str(tmp_path / "none" / "out"), "--output", s3.settings())
    with pytest.raises(Misconfigured, match="same file"):
        refuse_same_files({"input": str(tmp_path / "a"), "--output": f"{tmp_path}/../{tmp_path.name}/a"})
