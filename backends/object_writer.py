"""One new object, made of many pieces: a file, or a multipart upload. It appears whole or not at all."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, Protocol, Self

from ..schemas.errors import GristmillError, StoreUnavailable
from .aws_errors import code_and_status

MIN_PART_BYTES = 5 * 1024 * 1024
"""Of every part but the last; S3's rule."""
MAX_PARTS = 10_000
"""Of one object; S3's rule."""
MAX_COPY_BYTES = 5 * 1024**3
"""That one part may copy; S3's rule."""
IN_MEMORY_BYTES = 32 * 1024 * 1024
"""Of one part; a larger one waits on the disk."""
PARTS_AHEAD = 4
"""On their way at once."""


class ObjectWriter(Protocol):
    """A context manager: left without ``commit``, nothing stays. Raises as ResultStore does."""

    copy_bytes: int | None
    """An object of the same store that is at least so large need not be sent again. None: it has to be."""

    def append(self, data: bytes) -> None:
        """Add these bytes."""
        ...

    def append_object(self, name: str, body: bytes) -> None:
        """Add the object ``name``, which holds ``body``: by a copy within the store where that can be."""
        ...

    def commit(self) -> bool:
        """Make it durable. False: the name was taken meanwhile, and that object stays as it is."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


class FileWriter:
    """``aside`` becomes ``path`` in one step: ``link`` gives it the name, durably (False: it is taken)."""

    copy_bytes: int | None = None

    def __init__(
        self,
        aside: Path,
        path: Path,
        link: Callable[[Path, Path], bool],
        errors: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._aside, self._path, self._link, self._errors = aside, path, link, errors
        with errors():
            self._file = aside.open("xb")

    def append(self, data: bytes) -> None:
        """See ObjectWriter."""
        with self._errors():
            self._file.write(data)

    def append_object(self, name: str, body: bytes) -> None:  # noqa: ARG002 - what S3 copies by
        """See ObjectWriter."""
        self.append(body)

    def commit(self) -> bool:
        """See ObjectWriter."""
        with self._errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            return self._link(self._aside, self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._errors():
            with suppress(OSError):  # a full disk, told of before
                self._file.close()
            self._aside.unlink(missing_ok=True)


class PartsWriter:
    """A multipart upload that begins with its first whole part: what is smaller is one PUT.

    ``total_bytes``, known before, says how large parts must be for MAX_PARTS to suffice. Memory: PARTS_AHEAD
    parts, each of which is on the disk from IN_MEMORY_BYTES on.
    """

    def __init__(
        self,
        client: Any,
        bucket: str,
        key: str,
        total_bytes: int,
        *,
        source: Callable[[str], str],
        put: Callable[[bytes], bool],
        errors: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._client, self._errors, self._source, self._put = client, errors, source, put
        self._at: dict[str, Any] = {"Bucket": bucket, "Key": key}
        self.copy_bytes: int | None = part_bytes(total_bytes)
        self._part_bytes = part_bytes(total_bytes)
        self._threads = ThreadPoolExecutor(PARTS_AHEAD, thread_name_prefix="parts")
        self._under_way: deque[Future[dict[str, Any]]] = deque()
        self._parts: list[dict[str, Any]] = []
        self._numbered = 0
        self._buffer, self._buffered = _buffer(), 0

    def append(self, data: bytes) -> None:
        """See ObjectWriter."""
        self._buffer.write(data)
        self._buffered += len(data)
        if self._buffered >= self._part_bytes:
            self._flush()

    def append_object(self, name: str, body: bytes) -> None:
        """See ObjectWriter. Behind what is too small for a part it is sent, as part of that."""
        if self._buffered or not self._part_bytes <= len(body) <= MAX_COPY_BYTES:
            self.append(body)
            return
        source = {"Bucket": self._at["Bucket"], "Key": self._source(name)}

        def copy(number: int) -> dict[str, Any]:
            answer = self._client.upload_part_copy(**self._at, PartNumber=number, CopySource=source)
            return {"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]}

        self._submit(copy)

    def commit(self) -> bool:
        """See ObjectWriter."""
        if not self._numbered:
            self._buffer.seek(0)
            return self._put(self._buffer.read())
        if self._buffered:
            self._flush()
        while self._under_way:
            self._parts.append(self._under_way.popleft().result())
        return self._complete()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._buffer.close()
        if "UploadId" in self._at:  # whatever does not answer now is swept up later: see ``left_overs``
            with suppress(GristmillError), self._errors():
                self._client.abort_multipart_upload(**self._at)

    def _flush(self) -> None:
        body = self._buffer
        self._buffer, self._buffered = _buffer(), 0

        def send(number: int) -> dict[str, Any]:
            with body:
                body.seek(0)
                answer = self._client.upload_part(**self._at, PartNumber=number, Body=body)
            return {"PartNumber": number, "ETag": answer["ETag"]}

        self._submit(send)

    def _submit(self, send: Callable[[int], dict[str, Any]]) -> None:
        if not self._numbered:
            with self._errors():
                made = self._client.create_multipart_upload(**self._at)
            self._at["UploadId"] = made["UploadId"]
        if len(self._under_way) >= PARTS_AHEAD:
            self._parts.append(self._under_way.popleft().result())
        self._numbered += 1
        assert self._numbered <= MAX_PARTS, f"{self._at['Key']}: more bytes than were announced"
        self._under_way.append(self._threads.submit(self._asking, send, self._numbered))

    def _asking(self, send: Callable[[int], dict[str, Any]], number: int) -> dict[str, Any]:
        with self._errors():
            try:
                return send(number)
            except self._client.exceptions.ClientError as exc:
                if code_and_status(exc)[0] == "NoSuchUpload":
                    raise self._ended() from exc
                raise

    def _complete(self) -> bool:
        with self._errors():
            try:
                self._client.complete_multipart_upload(
                    **self._at, MultipartUpload={"Parts": self._parts}, IfNoneMatch="*"
                )
            except self._client.exceptions.ClientError as exc:
                code, status = code_and_status(exc)
                if status == 412:
                    return False
                if code == "NoSuchUpload" or status == 409:
                    raise self._ended() from exc
                raise
        del self._at["UploadId"]
        return True

    def _ended(self) -> StoreUnavailable:
        return StoreUnavailable(
            f"s3://{self._at['Bucket']}/{self._at['Key']}: its upload was ended by somebody else, who may "
            "have written it; look again"
        )


def part_bytes(total_bytes: int) -> int:
    """The least size of a part with which an object of ``total_bytes`` has no more parts than it may."""
    return max(MIN_PART_BYTES, -(-total_bytes // (MAX_PARTS - 1)))


def _buffer() -> SpooledTemporaryFile[bytes]:
    return SpooledTemporaryFile(IN_MEMORY_BYTES)
