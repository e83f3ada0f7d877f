"""Result stores: named objects that are written once. A new object is the commit point of a job.

``file:///dir`` is a directory; ``s3://bucket/prefix`` any S3 that honours ``If-None-Match: *``.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from ..schemas.errors import InvalidRequest, Misconfigured, StoreUnavailable
from ..schemas.settings import Settings
from .aws_errors import botocore_errors, code_and_status
from .object_writer import FileWriter, ObjectWriter, PartsWriter
from .s3 import s3_client

# Each part starts with a letter or a digit: no "..", no hidden file, no absolute path, no empty part.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
MAX_NAME_CHARS = 512

CONFLICT_TRIES = 5
_PROBE = "gristmill-check"
_ASIDE = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}")
_ASIDE_NAME_CHARS = 100


@dataclass(frozen=True, slots=True)
class Stored:
    """An object: how large it is, and since when it is there, in unix seconds by the store's clock."""

    name: str
    size: int
    modified_at: float


@dataclass(frozen=True, slots=True)
class LeftOver:
    """What an unfinished write of an object takes up. Its writer died, or is still at it."""

    name: str
    """The object's; in a directory no more than its first hundred characters."""
    size: int
    begun_at: float
    """Unix seconds by the store's clock."""
    mark: str
    """Which of several."""


class ResultStore(Protocol):
    """Objects by name; ``url`` says where.

    Every method raises StoreUnavailable while the store does not answer, Misconfigured where only a change of
    settings or rights helps, InvalidRequest for an unsafe name. Who has a result to keep waits in both of the
    first two cases: neither is the job's fault.
    """

    url: str

    def put_new(self, name: str, body: bytes) -> bool:
        """Make the object durable. False: there was one already, durable too, and it stays as it is.

        Of concurrent calls exactly one returns True, or none if that one's answer was lost on the way.
        """
        ...

    def get(self, name: str) -> bytes | None:
        """The object's body; None: there is none."""
        ...

    def read(self, name: str, start: int, count: int) -> bytes | None:
        """``count`` bytes of an object from ``start`` on, fewer at its end; None: there is none."""
        ...

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of an object; None: there is none."""
        ...

    def writer(self, name: str, total_bytes: int) -> ObjectWriter:
        """Make a new object of pieces, ``total_bytes`` in all. Other unfinished writes of that name end."""
        ...

    def remove(self, name: str) -> None:
        """Take an object away; never a result. It may be gone already."""
        ...

    def remove_many(self, names: Sequence[str]) -> None:
        """Take objects away, up to a thousand at once. They may be gone already."""
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Names that start with ``prefix``, in no promised order; its folders are checked as names are."""
        ...

    def stored(self, prefix: str = "") -> Iterator[Stored]:
        """As ``list``, with what is known of each."""
        ...

    def left_overs(self, prefix: str = "") -> Iterator[LeftOver]:
        """Unfinished writes of objects whose names start with ``prefix``."""
        ...

    def sweep(self, left_over: LeftOver) -> None:
        """End an unfinished write. It may be over already."""
        ...

    def check(self, *, write: bool = True) -> None:
        """Raise unless the store can be used: with ``write``, unless it takes objects, and each only once."""
        ...


def open_store(url: str, settings: Settings) -> ResultStore:
    """Sends nothing yet: ``check`` does. Raises Misconfigured for a URL that names no store."""
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc or not parts.path.startswith("/"):
            raise Misconfigured(
                f"results {url}: write file:///absolute/path, with three slashes (GRISTMILL_RESULTS_URL)"
            )
        root = Path(unquote(parts.path))
        if not settings.results_url and url == settings.results:  # our own default, which nobody created
            with _file_errors(root):
                root.mkdir(parents=True, exist_ok=True)
        return FileStore(root)
    if parts.scheme == "s3":
        prefix = unquote(parts.path).strip("/")
        if not parts.netloc:
            raise Misconfigured(f"results {url}: name the bucket, s3://bucket/prefix (GRISTMILL_RESULTS_URL)")
        if prefix:
            checked_name(prefix)
        return S3Store(parts.netloc, prefix, settings)
    raise Misconfigured(f"results {url}: use file:///dir or s3://bucket/prefix (GRISTMILL_RESULTS_URL)")


def checked_name(name: str) -> str:
    """Raises InvalidRequest unless ``name`` is safe as a file name and as an S3 key."""
    if len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"not a name of a result object: {name[:80]!r}; use A-Z a-z 0-9 . _ - in parts separated by /, "
            f"{MAX_NAME_CHARS} characters at most"
        )
    return name


# ---- a directory


class FileStore:
    """Objects are files under ``root``, which appear whole or not at all: written aside, then hard-linked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = root.as_uri()

    def put_new(self, name: str, body: bytes) -> bool:
        """See ResultStore. Durable means fsync of the file and of its directory."""
        path = self._path(name)
        with _file_errors(self.root):
            self._make_parents(path.parent)
            aside = _aside(path)
            try:
                with aside.open("xb") as file:
                    file.write(body)
                    file.flush()
                    os.fsync(file.fileno())
                return _link(aside, path)
            finally:
                aside.unlink(missing_ok=True)

    def get(self, name: str) -> bytes | None:
        """See ResultStore."""
        path = self._path(name)
        with _file_errors(self.root):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                self._require_root()
                return None

    def read(self, name: str, start: int, count: int) -> bytes | None:
        """See ResultStore."""
        path = self._path(name)
        with _file_errors(self.root):
            try:
                with path.open("rb") as file:
                    return os.pread(file.fileno(), count, start)
            except FileNotFoundError:
                self._require_root()
                return None

    def exists(self, name: str) -> bool:
        """See ResultStore."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """See ResultStore."""
        path = self._path(name)
        with _file_errors(self.root):
            if path.is_file():
                return path.stat().st_size
            self._require_root()
            return None

    def writer(self, name: str, total_bytes: int) -> ObjectWriter:  # noqa: ARG002 - what S3 has limits for
        """See ResultStore. Durable as ``put_new`` makes it."""
        path = self._path(name)
        with _file_errors(self.root):
            self._make_parents(path.parent)
        for left_over in self.left_overs(name):
            if left_over.name == name:
                self.sweep(left_over)
        return FileWriter(_aside(path), path, _link, lambda: _file_errors(self.root))

    def remove(self, name: str) -> None:
        """See ResultStore. Not made durable: who finds the object again takes it away again."""
        path = self._path(name)
        with _file_errors(self.root):
            path.unlink(missing_ok=True)

    def remove_many(self, names: Sequence[str]) -> None:
        """See ResultStore. Folders that are empty then go as well."""
        for name in names:
            self.remove(name)
        for folder in {self._path(name).parent for name in names}:
            while folder != self.root:
                try:
                    folder.rmdir()
                except OSError:  # something is in it, or it is gone
                    break
                folder = folder.parent

    def list(self, prefix: str = "") -> Iterator[str]:
        """See ResultStore."""
        for at, file in self._walk(prefix):
            name = (at / file).as_posix()
            if not file.startswith(".") and name.startswith(prefix):
                yield name

    def stored(self, prefix: str = "") -> Iterator[Stored]:
        """See ResultStore."""
        for name in self.list(prefix):
            with _file_errors(self.root), suppress(FileNotFoundError):  # gone meanwhile
                found = (self.root / name).stat()
                yield Stored(name, found.st_size, found.st_mtime)

    def left_overs(self, prefix: str = "") -> Iterator[LeftOver]:
        """See ResultStore."""
        for at, file in self._walk(prefix):
            aside = _ASIDE.fullmatch(file)
            name = (at / aside["name"]).as_posix() if aside else ""
            if aside and name.startswith(prefix):
                with _file_errors(self.root), suppress(FileNotFoundError):
                    found = (self.root / at / file).stat()
                    yield LeftOver(name, found.st_size, found.st_mtime, (at / file).as_posix())

    def sweep(self, left_over: LeftOver) -> None:
        """See ResultStore."""
        with _file_errors(self.root):
            (self.root / left_over.mark).unlink(missing_ok=True)

    def _walk(self, prefix: str) -> Iterator[tuple[Path, str]]:
        """Folder and name of each file that may be wanted."""
        start = prefix.rpartition("/")[0]
        top = self._path(start) if start else self.root
        with _file_errors(self.root):
            self._require_root()
            for folder, folders, files in os.walk(top):
                at = Path(folder).relative_to(self.root)
                yield from ((at, file) for file in files)
                folders[:] = [f for f in folders if _may_hold(prefix, (at / f).as_posix() + "/")]

    def check(self, *, write: bool = True) -> None:
        """See ResultStore."""
        with _file_errors(self.root):
            self._require_root()
            if write:
                name = f"{_PROBE}-{secrets.token_hex(8)}"
                self.put_new(name, b"")
                self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self.root / checked_name(name)

    def _require_root(self) -> None:
        if not self.root.is_dir():
            raise Misconfigured(
                f"results directory {self.root} does not exist; create it: mkdir -p {self.root} "
                "(GRISTMILL_RESULTS_URL)"
            )

    def _make_parents(self, folder: Path) -> None:
        """Create what lies between root and ``folder``, durably. Not root: it may be a disk not mounted."""
        if folder.is_dir():
            return
        self._require_root()
        self._make_parents(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _aside(path: Path) -> Path:
    """Where the file is written that will be ``path``."""
    return path.parent / f".{path.name[:_ASIDE_NAME_CHARS]}.{secrets.token_hex(8)}"


def _link(aside: Path, path: Path) -> bool:
    """Give ``aside`` the name ``path``, durably. False: the name is taken."""
    try:
        os.link(aside, path)
    except FileExistsError:
        created = False
    except FileNotFoundError:
        if not path.exists():
            raise StoreUnavailable(
                f"{path}: another writer began it after this one; it is tried again"
            ) from None
        created = False
    else:
        created = True
    _sync_folder(path.parent)  # also for the other's file: False, too, means that one is durable
    return created


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _may_hold(prefix: str, folder: str) -> bool:
    return folder.startswith(prefix) or prefix.startswith(folder)


@contextmanager
def _file_errors(root: Path) -> Generator[None]:
    try:
        yield
    except (PermissionError, NotADirectoryError, IsADirectoryError) as exc:
        raise Misconfigured(
            f"results directory {root}: {exc.strerror}: {exc.filename}; give this user the right to write "
            "there, or choose another (GRISTMILL_RESULTS_URL)"
        ) from exc
    except OSError as exc:
        # A full or a read-only disk, a stale mount: results wait until somebody has mended it.
        raise StoreUnavailable(f"results directory {root}: {exc.strerror or exc}") from exc


# ---- S3


class S3Store:
    """Objects in a bucket, under a prefix. One client for all threads."""

    def __init__(self, bucket: str, prefix: str, settings: Settings) -> None:
        self.bucket, self.prefix = bucket, prefix
        self.url = f"s3://{bucket}" + (f"/{prefix}" if prefix else "")
        self._endpoint = settings.s3_endpoint_url or "AWS"
        with self._errors():
            self._client = s3_client(settings)

    def put_new(self, name: str, body: bytes) -> bool:
        """See ResultStore. A retry after a lost answer finds its own object and returns False."""
        key = self._key(name)
        for attempt in range(CONFLICT_TRIES):
            with self._errors():
                try:
                    self._client.put_object(Bucket=self.bucket, Key=key, Body=body, IfNoneMatch="*")
                    return True
                except self._client.exceptions.ClientError as exc:
                    code, status = code_and_status(exc)
                    if status == 412:
                        return False
                    if status != 409 or code != "ConditionalRequestConflict":
                        raise
            time.sleep(random.uniform(0.05, 0.1) * 2**attempt)  # somebody else writes the same name just now
        raise StoreUnavailable(f"{self.url}: another writer holds {name}; tried {CONFLICT_TRIES} times")

    def get(self, name: str) -> bytes | None:
        """See ResultStore."""
        key = self._key(name)
        with self._errors():
            try:
                return self._client.get_object(Bucket=self.bucket, Key=key)["Body"].read()
            except self._client.exceptions.NoSuchKey:
                return None

    def read(self, name: str, start: int, count: int) -> bytes | None:
        """See ResultStore."""
        key, span = self._key(name), f"bytes={start}-{start + count - 1}"
        with self._errors():
            try:
                return self._client.get_object(Bucket=self.bucket, Key=key, Range=span)["Body"].read()
            except self._client.exceptions.NoSuchKey:
                return None
            except self._client.exceptions.ClientError as exc:
                if code_and_status(exc)[1] != 416:  # nothing stands there: at the end, or of an empty object
                    raise
                return b""

    def exists(self, name: str) -> bool:
        """See ResultStore."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """See ResultStore."""
        key = self._key(name)
        with self._errors():
            try:
                return int(self._client.head_object(Bucket=self.bucket, Key=key)["ContentLength"])
            except self._client.exceptions.ClientError as exc:
                if code_and_status(exc)[1] != 404:
                    raise
        self.check(write=False)  # HEAD has no body: 404 may also mean that there is no such bucket
        return None

    def writer(self, name: str, total_bytes: int) -> ObjectWriter:
        """See ResultStore: a multipart upload."""
        for left_over in self.left_overs(name):
            if left_over.name == name:
                self.sweep(left_over)
        return PartsWriter(
            self._client,
            self.bucket,
            self._key(name),
            total_bytes,
            source=self._key,
            put=lambda body: self.put_new(name, body),
            errors=self._errors,
        )

    def remove(self, name: str) -> None:
        """See ResultStore."""
        with self._errors():
            self._client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def remove_many(self, names: Sequence[str]) -> None:
        """See ResultStore."""
        if not names:
            return
        objects = [{"Key": self._key(name)} for name in names]
        with self._errors():
            answer = self._client.delete_objects(
                Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True}
            )
        if failed := answer.get("Errors"):
            raise StoreUnavailable(
                f"{self.url}: {len(failed):,} of {len(names):,} objects stay: {failed[0].get('Code')}"
            )

    def list(self, prefix: str = "") -> Iterator[str]:
        """See ResultStore."""
        return (found.name for found in self.stored(prefix))

    def stored(self, prefix: str = "") -> Iterator[Stored]:
        """See ResultStore."""
        for item in self._items("list_objects_v2", "Contents", prefix):
            yield Stored(item["Key"], int(item["Size"]), item["LastModified"].timestamp())

    def left_overs(self, prefix: str = "") -> Iterator[LeftOver]:
        """See ResultStore. What their parts take up is not known."""
        for item in self._items("list_multipart_uploads", "Uploads", prefix):
            yield LeftOver(item["Key"], 0, item["Initiated"].timestamp(), item["UploadId"])

    def sweep(self, left_over: LeftOver) -> None:
        """See ResultStore."""
        key = self._key(left_over.name)
        with self._errors():
            try:
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=left_over.mark)
            except self._client.exceptions.ClientError as exc:
                if code_and_status(exc)[0] != "NoSuchUpload":
                    raise

    def _items(self, operation: str, kind: str, prefix: str) -> Iterator[dict[str, Any]]:
        """Of all pages, with their keys as names."""
        start = f"{self.prefix}/" if self.prefix else ""
        with self._errors():
            for page in self._client.get_paginator(operation).paginate(
                Bucket=self.bucket, Prefix=start + prefix
            ):
                for item in page.get(kind, ()):
                    yield {**item, "Key": item["Key"][len(start) :]}

    def check(self, *, write: bool = True) -> None:
        """See ResultStore. The probe object stays: a worker need not be allowed to delete."""
        with self._errors():
            try:
                self._client.head_bucket(Bucket=self.bucket)
            except self._client.exceptions.ClientError as exc:
                if code_and_status(exc)[1] == 404:
                    raise self._no_bucket() from exc
                raise
        if write:
            self.put_new(_PROBE, b"")
            if self.put_new(_PROBE, b""):
                raise Misconfigured(
                    f"{self.url}: {self._endpoint} ignores If-None-Match and would overwrite results; "
                    "use an S3 with conditional writes (GRISTMILL_S3_ENDPOINT_URL)"
                )

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{checked_name(name)}" if self.prefix else checked_name(name)

    def _no_bucket(self) -> Misconfigured:
        return Misconfigured(
            f"bucket {self.bucket!r} does not exist at {self._endpoint}; create it "
            f"(aws s3 mb s3://{self.bucket}) or name another (GRISTMILL_RESULTS_URL)"
        )

    @contextmanager
    def _errors(self) -> Generator[None]:
        """botocore's exceptions as ours. What network or server may mend unasked is StoreUnavailable."""
        with botocore_errors(
            f"{self.url} at {self._endpoint}",
            away=StoreUnavailable,
            missing=lambda code: self._no_bucket() if code == "NoSuchBucket" else None,
            rights="check the credentials and the bucket's policy",
            settings="set GRISTMILL_S3_ACCESS_KEY, GRISTMILL_S3_SECRET_KEY and GRISTMILL_S3_REGION, or what "
            "AWS tools read",
            endpoint="GRISTMILL_S3_ENDPOINT_URL",
        ):
            yield
