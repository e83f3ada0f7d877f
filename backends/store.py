"""Result stores: named objects that are written once. A new object is the commit point of a job.

``file:///dir`` is a directory; ``s3://bucket/prefix`` any S3 that honours ``If-None-Match: *``.
"""

from __future__ import annotations

import os
import random
import re
import secrets
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from ..schemas.errors import InvalidRequest, Misconfigured, StoreUnavailable
from ..schemas.settings import Settings
from .aws_errors import botocore_errors, code_and_status
from .s3 import s3_client

# Each part starts with a letter or a digit: no "..", no hidden file, no absolute path, no empty part.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
MAX_NAME_CHARS = 512

CONFLICT_TRIES = 5
_PROBE = "gristmill-check"


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

    def exists(self, name: str) -> bool:
        """Whether there is such an object."""
        ...

    def remove(self, name: str) -> None:
        """Take an object away; never a result. It may be gone already."""
        ...

    def list(self, prefix: str = "") -> Iterator[str]:
        """Names that start with ``prefix``, in no promised order."""
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
            aside = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}"
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

    def exists(self, name: str) -> bool:
        """See ResultStore."""
        path = self._path(name)
        with _file_errors(self.root):
            if path.is_file():
                return True
            self._require_root()
            return False

    def remove(self, name: str) -> None:
        """See ResultStore. Not made durable: who finds the object again takes it away again."""
        path = self._path(name)
        with _file_errors(self.root):
            path.unlink(missing_ok=True)

    def list(self, prefix: str = "") -> Iterator[str]:
        """See ResultStore."""
        with _file_errors(self.root):
            self._require_root()
            for folder, folders, files in os.walk(self.root):
                at = Path(folder).relative_to(self.root)
                for file in files:
                    name = (at / file).as_posix()
                    if not file.startswith(".") and name.startswith(prefix):
                        yield name
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


def _link(aside: Path, path: Path) -> bool:
    """Give ``aside`` the name ``path``, durably. False: the name is taken."""
    try:
        os.link(aside, path)
    except FileExistsError:
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

    def exists(self, name: str) -> bool:
        """See ResultStore."""
        key = self._key(name)
        with self._errors():
            try:
                self._client.head_object(Bucket=self.bucket, Key=key)
            except self._client.exceptions.ClientError as exc:
                if code_and_status(exc)[1] != 404:
                    raise
            else:
                return True
        self.check()  # HEAD has no body: 404 may also mean that there is no such bucket
        return False

    def remove(self, name: str) -> None:
        """See ResultStore."""
        with self._errors():
            self._client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def list(self, prefix: str = "") -> Iterator[str]:
        """See ResultStore."""
        start = f"{self.prefix}/" if self.prefix else ""
        with self._errors():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=start + prefix):
                yield from (item["Key"][len(start) :] for item in page.get("Contents", ()))

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
