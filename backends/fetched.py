"""Models of buckets, on this machine: fetched once, whole or not at all, under ``s3`` among the models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote, unquote

from ..schemas.errors import InvalidRequest
from ..schemas.settings import Settings
from . import model_files
from .bucket import S3_SCHEME, bucket_and_prefix, open_bucket
from .copying import copy, same_files, wanted_of, whole_copy
from .manifest import MANIFEST
from .node_lock import locked
from .places import Folder, Place
from .progress import Progress, Reporter

FOLDER = "s3"
MAX_NAME_BYTES = 240


def cached(url: str, models_dir: Path) -> Path | None:
    """The directory of a model that was fetched, if all of it is there. No network."""
    path = directory(url, models_dir)
    return path if whole_copy(path) is not None else None


def pull(url: str, models_dir: Path, settings: Settings, report: Reporter, *, refresh: bool = True) -> Path:
    """The directory of the model, fetched if it is not here; ``refresh``: also if the bucket's has changed.

    Of several callers at once one fetches and the others wait for it. Raises InvalidRequest, ModelNotFound,
    ModelInvalid, DownloadFailed, Misconfigured, WaitTimeout.
    """
    path = directory(url, models_dir)
    lock = path.with_name(f".{path.name}.lock")
    with locked(lock, lambda: report(Progress("waiting for another process that fetches it"))):
        have = whole_copy(path)
        if have is not None and not refresh:
            return path
        bucket = open_bucket(url, settings)
        if have is None or not same_files(have, wanted_of(bucket)[0]):
            materialise(bucket, path, report)
    return path


def materialise(source: Place, target: Path, report: Reporter) -> None:
    """Put a copy of the source's model at ``target``, by a rename once it is whole and checked.

    What a killed call has fetched, the next one keeps; so are files of an older copy that have not changed.
    The caller holds a lock. Raises what ``copy`` does.
    """
    scratch = target.with_name(f".{target.name}.part")
    made, old = scratch / "model", scratch / "old"
    if old.exists():  # the last call was killed between its two renames, or after them
        if not target.exists():
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    if not made.is_dir():
        made.mkdir(parents=True)
        for file in target.iterdir() if whole_copy(target) else ():
            with suppress(OSError):
                os.link(file, made / file.name)
    manifest = copy(source, Folder(made), report, trust=True).manifest
    for file in made.iterdir():
        if file.name not in manifest.files and file.name != MANIFEST:
            file.unlink()
    model_files.check(made)
    if target.exists():
        target.rename(old)
    made.rename(target)
    shutil.rmtree(scratch, ignore_errors=True)


def directory(url: str, models_dir: Path) -> Path:
    """Where the model of a URL is kept. Raises InvalidRequest."""
    name = quote("/".join(bucket_and_prefix(url)).rstrip("/"), safe="")
    if len(name) > MAX_NAME_BYTES:
        raise InvalidRequest(f"{url[:200]}…: too long a name for a directory of its own", param="model")
    return models_dir / FOLDER / name


def fetched(models_dir: Path) -> Iterator[tuple[str, Path]]:
    """(URL, directory) of each model that was fetched."""
    folder = models_dir / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir() and not path.name.startswith("."):
            yield S3_SCHEME + unquote(path.name), path
