"""Models in a bucket: read in ranges and written in parts, side by side."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from ..schemas.errors import DownloadFailed, InvalidRequest, Misconfigured, ModelInvalid
from ..schemas.settings import Settings
from .aws_errors import botocore_errors, code_and_status, patiently
from .places import Found, Writer, is_kept, piece_bytes, refuse_large
from .s3 import CONNECTIONS, s3_client

T = TypeVar("T")

S3_SCHEME = "s3://"
PIECES_AHEAD = 12
"""Of one file, in memory and on their way."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")


class Bucket:
    """Objects directly below a prefix. Requests run side by side, in threads of its own."""

    def __init__(self, bucket: str, prefix: str, settings: Settings) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.where = f"{S3_SCHEME}{bucket}/{prefix}".rstrip("/")
        self._endpoint = settings.s3_endpoint_url or "AWS"
        with self.errors():
            self._client = s3_client(settings)
        self._pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="s3")

    def files(self) -> dict[str, Found]:
        """See Place."""
        return self.patiently(self._list)

    def _list(self) -> dict[str, Found]:
        start = self._key("")
        found: dict[str, Found] = {}
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=start, Delimiter="/"):
            for item in page.get("Contents", ()):
                if is_kept(name := item["Key"][len(start) :]):
                    found[name] = Found(int(item["Size"]), item["ETag"].strip('"'))
        return found

    def whole(self, name: str) -> bytes | None:
        """See Place."""

        def ask() -> bytes | None:
            try:
                answer = self._client.get_object(Bucket=self.bucket, Key=self._key(name))
            except self._client.exceptions.NoSuchKey:
                return None
            refuse_large(f"{self.where}/{name}", answer["ContentLength"])
            return answer["Body"].read()

        return self.patiently(ask)

    def span(self, name: str, start: int, count: int) -> bytes:
        """See Place."""
        return self._range(name, None, start, start + count)

    def pieces(self, name: str, found: Found, start: int = 0) -> Iterator[bytes]:
        """See Place. The next ones are under way while one is used."""
        step = piece_bytes(found.size)
        asked = (
            self._pool.submit(self._range, name, found.tag, at, min(at + step, found.size))
            for at in range(start, found.size, step)
        )
        under_way = deque(islice(asked, PIECES_AHEAD))
        try:
            while under_way:
                data = under_way.popleft().result()
                under_way.extend(islice(asked, 1))
                yield data
        finally:
            for each in under_way:
                each.cancel()

    def checksum(self, name: str) -> str | None:  # noqa: ARG002 - what a directory reads
        """See Place: S3's own sums are of parts."""
        return None

    def put(self, name: str, body: bytes) -> None:
        """See Place."""
        self.patiently(lambda: self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=body))

    def remove(self, name: str) -> None:
        """See Place."""
        self.patiently(lambda: self._client.delete_object(Bucket=self.bucket, Key=self._key(name)))

    def begun(self, name: str, found: Found) -> int:  # noqa: ARG002 - what a directory knows
        """See Place: an upload that broke off begins again."""
        return 0

    def writer(self, name: str, found: Found) -> Writer:
        """See Place."""
        if found.size <= piece_bytes(found.size):
            return _ObjectWriter(self, name)
        return _PartsWriter(self, self._key(name), self._client, self._pool)

    def _range(self, name: str, tag: str | None, start: int, end: int) -> bytes:
        """Bytes of one version of an object."""
        options = {"IfMatch": f'"{tag}"'} if tag else {}

        def ask() -> bytes:
            try:
                answer = self._client.get_object(
                    Bucket=self.bucket, Key=self._key(name), Range=f"bytes={start}-{end - 1}", **options
                )
            except self._client.exceptions.ClientError as exc:
                if code_and_status(exc)[1] == 412:
                    raise ModelInvalid(
                        f"{self.where}/{name} was changed while it was read; run it again"
                    ) from exc
                if code_and_status(exc)[1] == 416:
                    return b""
                raise
            body = answer["Body"].read()
            if len(body) < answer["ContentLength"]:
                raise OSError(f"{name}: {len(body):,} of {answer['ContentLength']:,} bytes came")
            return body

        return self.patiently(ask)

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def patiently(self, ask: Callable[[], T]) -> T:
        """Ask again, after a while, what a network may have swallowed."""
        return patiently(ask, self.errors, DownloadFailed)

    @contextmanager
    def errors(self) -> Generator[None]:
        """botocore's exceptions as ours."""
        with botocore_errors(
            f"{self.where} at {self._endpoint}",
            away=DownloadFailed,
            missing=lambda code: (
                Misconfigured(f"bucket {self.bucket!r} does not exist at {self._endpoint}; check the name")
                if code == "NoSuchBucket"
                else None
            ),
            rights="check the credentials and the bucket's policy",
            settings="set GRISTMILL_S3_ACCESS_KEY, GRISTMILL_S3_SECRET_KEY and GRISTMILL_S3_REGION, or what "
            "AWS tools read",
            endpoint="GRISTMILL_S3_ENDPOINT_URL",
        ):
            yield


class _ObjectWriter:
    """A file of one piece."""

    def __init__(self, bucket: Bucket, name: str) -> None:
        self._bucket, self._name, self._body = bucket, name, b""

    def kept(self) -> Iterator[bytes]:
        """See Writer."""
        return iter(())

    def append(self, data: bytes) -> None:
        """See Writer."""
        self._body += data

    def finish(self) -> None:
        """See Writer."""
        self._bucket.put(self._name, self._body)

    def abandon(self) -> None:
        """See Writer."""

    discard = abandon


class _PartsWriter:
    """A multipart upload, some parts at a time. What a killed one leaves is for the bucket's life cycle."""

    def __init__(self, bucket: Bucket, key: str, client: Any, pool: ThreadPoolExecutor) -> None:
        self._bucket, self._client, self._pool = bucket, client, pool
        self._at = {"Bucket": bucket.bucket, "Key": key}
        made = bucket.patiently(lambda: client.create_multipart_upload(**self._at))
        self._at["UploadId"] = made["UploadId"]
        self._count = 0
        self._under_way: deque[Future[dict[str, Any]]] = deque()
        self._parts: list[dict[str, Any]] = []

    def kept(self) -> Iterator[bytes]:
        """See Writer."""
        return iter(())

    def append(self, data: bytes) -> None:
        """See Writer."""
        self._count += 1
        self._under_way.append(self._pool.submit(self._send, self._count, data))
        if len(self._under_way) >= PIECES_AHEAD:
            self._parts.append(self._under_way.popleft().result())

    def _send(self, number: int, data: bytes) -> dict[str, Any]:
        def ask() -> dict[str, Any]:
            answer = self._client.upload_part(**self._at, PartNumber=number, Body=data)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        return self._bucket.patiently(ask)

    def finish(self) -> None:
        """See Writer."""
        self._parts += [each.result() for each in self._under_way]
        self._under_way.clear()
        self._bucket.patiently(
            lambda: self._client.complete_multipart_upload(**self._at, MultipartUpload={"Parts": self._parts})
        )

    def abandon(self) -> None:
        """See Writer."""
        for each in self._under_way:
            each.cancel()
        with suppress(DownloadFailed, Misconfigured), self._bucket.errors():
            self._client.abort_multipart_upload(**self._at)

    discard = abandon


def is_s3(name: str) -> bool:
    """Whether a model's name is the URL of a bucket."""
    return name.startswith(S3_SCHEME)


def bucket_and_prefix(url: str) -> tuple[str, str]:
    """Of ``s3://bucket/prefix``. Raises InvalidRequest."""
    parts = urlsplit(url)
    prefix = unquote(parts.path).strip("/")
    bad = any(part in ("", ".", "..") for part in prefix.split("/")) if prefix else False
    if not _BUCKET.fullmatch(parts.netloc) or bad or parts.query or parts.fragment:
        raise InvalidRequest(f"{url[:200]!r} is no place of a model; write s3://bucket/prefix", param="model")
    return parts.netloc, prefix


def open_bucket(url: str, settings: Settings) -> Bucket:
    """Sends nothing yet. Raises InvalidRequest, Misconfigured."""
    return Bucket(*bucket_and_prefix(url), settings)
