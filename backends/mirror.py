"""Copies of models for safe keeping, and back again: in a directory or a bucket, from wherever they come."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..schemas.errors import InvalidRequest, ModelInvalid
from ..schemas.settings import Settings
from . import bundled, hub, models
from .bucket import is_s3, open_bucket
from .bundled import BUNDLED
from .copying import Copied, copy, manifest_of, whole_copy
from .fetched import materialise
from .node_lock import locked
from .places import Folder, Place
from .progress import Progress, Reporter


@dataclass(frozen=True, slots=True)
class Mirrored:
    """``target``: where the copy lies. ``copied`` of its ``files`` were copied now, the others were there."""

    target: str
    files: int
    size_bytes: int
    copied: int
    copied_bytes: int


def mirror(source: str, target: str, revision: str | None, report: Reporter, settings: Settings) -> Mirrored:
    """Make ``target`` a copy of the model ``source``; files that are there with the same checksum stay.

    A target that is the model's own name puts it back into this machine's cache, where that name finds it.
    Raises what ``models.pull`` does.
    """
    place, about = _source(source, revision, report, settings)
    if is_s3(target):
        there: Place = open_bucket(target, settings)
    else:
        own = _own_place(target, {**(_origin(place)), **about}, settings)
        if own is not None:
            _refuse_same(place.where, str(own), source, target)
            return _put_back(place, own, target, report, settings)
        there = Folder(Path(target).expanduser().absolute())
    _refuse_same(place.where, there.where, source, target)
    with _alone(there.where, report, settings):
        done = copy(place, there, report, about=about)
    return _summary(there.where, done)


def _refuse_same(place: str, there: str, source: str, target: str) -> None:
    if place == there:
        raise InvalidRequest(f"{source} and {target} are the same place; name another one to copy to")


def _source(
    name: str, revision: str | None, report: Reporter, settings: Settings
) -> tuple[Place, dict[str, Any]]:
    """Where it lies, and what to record of where it came from."""
    if is_s3(name):
        return open_bucket(name, settings), {}
    path = models.ensure(name, revision, report, settings)
    place = Folder(path)
    if name in BUNDLED or not hub.is_hub_id(name) or not hub.COMMIT.fullmatch(path.name):
        return place, {}
    origin = {"hub": name, "revision": revision or hub.DEFAULT_REVISION, "commit": path.name}
    return place, {"source": origin}


def _origin(place: Place) -> dict[str, Any]:
    manifest = manifest_of(place)
    return manifest.about if manifest else {}


def _own_place(target: str, about: dict[str, Any], settings: Settings) -> Path | None:
    """Where the cache keeps a model that is called ``target`` and is from there; None: just a directory."""
    origin = _fields(about.get("source"))
    if target in BUNDLED:
        model = BUNDLED[target]
        if origin.get("sha256") != model.sha256:
            raise ModelInvalid(
                f"{target} is the name of a bundled model and this is no copy of it; to make a directory of "
                f"that name, write ./{target}"
            )
        return models.models_dir(settings.home) / target
    commit: Any = origin.get("commit")
    if origin.get("hub") != target or not hub.is_hub_id(target) or not isinstance(commit, str):
        return None
    return hub.snapshot(target, commit, settings.hub_cache)


def _fields(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _put_back(place: Place, path: Path, name: str, report: Reporter, settings: Settings) -> Mirrored:
    with _alone(str(path), report, settings):
        before = whole_copy(path)
        materialise(place, path, report)
        done = whole_copy(path)
        assert done is not None, "materialise has made it whole"
        if name in BUNDLED:
            bundled.check(path)
        else:
            hub.point_to(path, str(done.about["source"]["revision"]))
    size = sum(each.size for each in done.files.values())
    new = 0 if before == done else len(done.files)
    return Mirrored(str(path), len(done.files), size, new, size if new else 0)


def _alone(where: str, report: Reporter, settings: Settings) -> Any:
    """Two copies to one place at once would write the same files."""
    name = hashlib.sha256(where.encode()).hexdigest()[:16]
    lock = models.models_dir(settings.home) / f".mirror-{name}.lock"
    return locked(lock, lambda: report(Progress("waiting for another copy to the same place")))


def _summary(where: str, done: Copied) -> Mirrored:
    files = done.manifest.files
    size = sum(each.size for each in files.values())
    return Mirrored(where, len(files), size, done.copied, done.copied_bytes)
