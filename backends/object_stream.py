"""One object of a bucket as a stream: read from its beginning to its end, or written in parts.

For the files that users name as ``s3://bucket/key``; what Gristmill itself keeps is in ``store.py``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from ..schemas.errors import BadInput, InvalidRequest, Misconfigured, StoreUnavailable
from ..schemas.settings import Settings
from .aws_errors import botocore_errors, code_and_status, patiently
from .s3 import s3_client

T = TypeVar("T")

SCHEME = "s3://"
PIECE_BYTES = 8 * 1024 * 1024
BUFFER_BYTES = 1 << 17
GROWTH_PARTS = 500
"""After each so many parts of an upload the next ones are larger: S3 takes 10,000 parts of any object."""
RANGE_OF_NOTHING, CHANGED = 416, 412
"""HTTP's words for them."""

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")


def is_object(name: str) -> bool:
    """Whether a file's name is that of an object in a bucket."""
    return name.startswith(SCHEME)


class Object:
    """``s3://bucket/key``. Raises InvalidRequest for a URL that is none; sends nothing yet.

    Every other method raises StoreUnavailable while S3 does not answer, after six tries, and Misconfigured.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        parts = urlsplit(url)
        self.url, self.key = url, unquote(parts.path).removeprefix("/")
        if not _BUCKET.fullmatch(parts.netloc) or not self.key or self.key.endswith("/") or parts.query:
            raise InvalidRequest(f"{url[:200]!r} names no file in a bucket; write s3://bucket/path/file")
        self.at = {"Bucket": parts.netloc, "Key": self.key}
        self._endpoint = settings.s3_endpoint_url or "AWS"
        with self._errors():
            self.client: Any = s3_client(settings)

    def patiently(self, ask: Callable[[], T]) -> T:
        """Ask again, after a while, what a network may have swallowed."""
        return patiently(ask, self._errors, StoreUnavailable)

    def check(self) -> None:
        """Raises unless the bucket is there."""
        self.patiently(lambda: self.client.head_bucket(Bucket=self.at["Bucket"]))

    def open(self) -> io.BufferedReader:
        """Its content. Raises BadInput if there is none, or if it changes while it is read."""

        return io.BufferedReader(_Reader(self), BUFFER_BYTES)

    def create(self) -> ObjectWriter:
        """What writes it anew; it appears when that is finished."""
        return ObjectWriter(self)

    @contextmanager
    def _errors(self) -> Generator[None]:
        with botocore_errors(
            f"{self.url} at {self._endpoint}",
            away=StoreUnavailable,
            missing=lambda code: (
                Misconfigured(f"{self.url}: there is no such bucket at {self._endpoint}; check the name")
                if code in ("NoSuchBucket", "404")
                else None
            ),
            rights="check the credentials and the bucket's policy",
            settings="set GRISTMILL_S3_ACCESS_KEY, GRISTMILL_S3_SECRET_KEY and GRISTMILL_S3_REGION, or what "
            "AWS tools read",
            endpoint="GRISTMILL_S3_ENDPOINT_URL",
        ):
            yield


class _Reader(io.RawIOBase):
    """Ranges of one version of an object, one after the other. Fetches the first at once."""

    def __init__(self, source: Object) -> None:
        self._source, self._at = source, 0
        self._size, self._tag = 0, ""
        self._piece = memoryview(b"")
        self._fetch()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        if not self._piece and self._at < self._size:  # a whole piece, however little is asked for
            self._fetch()
        count = min(len(buffer), len(self._piece))
        buffer[:count], self._piece = self._piece[:count], self._piece[count:]
        return count

    def _fetch(self) -> None:
        self._piece = memoryview(self._source.patiently(self._range))
        self._at += len(self._piece)

    def _range(self) -> bytes:
        same = {"IfMatch": self._tag} if self._tag else {}
        span = f"bytes={self._at}-{self._at + PIECE_BYTES - 1}"
        try:
            answer = self._source.client.get_object(**self._source.at, Range=span, **same)
        except self._source.client.exceptions.ClientError as exc:
            code, status = code_and_status(exc)
            if status == RANGE_OF_NOTHING:
                return b""
            if code == "NoSuchKey" and not self._tag:
                raise BadInput(f"cannot read {self._source.url}: there is no such object") from exc
            if status == CHANGED or code == "NoSuchKey":
                raise BadInput(f"{self._source.url} was changed while it was read; run it again") from exc
            raise
        body: bytes = answer["Body"].read()
        if len(body) < answer["ContentLength"]:
            raise OSError(f"{len(body):,} of {answer['ContentLength']:,} bytes came")
        self._tag, self._size = answer["ETag"], int(answer["ContentRange"].rpartition("/")[2])
        return body


class ObjectWriter:
    """An upload in parts. What a killed one leaves is for the bucket's life cycle."""

    def __init__(self, target: Object) -> None:
        self._target, self._rest = target, bytearray()
        self._upload: dict[str, Any] | None = None
        self._parts: list[dict[str, Any]] = []

    def write(self, data: bytes) -> None:
        """Any number of bytes; memory holds one part."""
        self._rest += data
        while len(self._rest) >= (size := PIECE_BYTES * (1 + len(self._parts) // GROWTH_PARTS)):
            self._send(bytes(self._rest[:size]))
            del self._rest[:size]

    def finish(self) -> None:
        """Durable on return, over an older one."""
        body, client = bytes(self._rest), self._target.client
        if self._upload is None:
            self._target.patiently(lambda: client.put_object(**self._target.at, Body=body))
            return
        if body:
            self._send(body)
        upload, parts = self._upload, {"Parts": self._parts}
        self._target.patiently(lambda: client.complete_multipart_upload(**upload, MultipartUpload=parts))

    def abandon(self) -> None:
        """Give up; an older object stays."""
        upload, client = self._upload, self._target.client
        if upload is not None:
            with suppress(StoreUnavailable, Misconfigured):
                self._target.patiently(lambda: client.abort_multipart_upload(**upload))

    def _send(self, body: bytes) -> None:
        client, number = self._target.client, len(self._parts) + 1
        if self._upload is None:
            made = self._target.patiently(lambda: client.create_multipart_upload(**self._target.at))
            self._upload = self._target.at | {"UploadId": made["UploadId"]}
        upload = self._upload
        answer = self._target.patiently(lambda: client.upload_part(**upload, PartNumber=number, Body=body))
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})
