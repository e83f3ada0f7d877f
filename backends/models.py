"""The model cache: from a name to a directory that the engine can load.

A name is a bundled model (``smollm2-135m``), a Hub id (``owner/name``), a bucket's prefix (``s3://…``) or a
local directory. ``pull`` and ``ensure`` may use the network; ``resolve`` never does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..schemas.errors import InvalidRequest, ModelInvalid, ModelNotFound
from ..schemas.settings import Settings, load_settings
from . import bundled, fetched, gguf_model, hub, model_files
from .bucket import is_s3
from .bundled import BUNDLED
from .copying import manifest_of
from .manifest import check_recorded
from .node_lock import locked
from .places import Folder
from .progress import Progress, Reporter, silent

__all__ = [
    "CachedModel",
    "Progress",
    "Reporter",
    "ensure",
    "list_models",
    "locate",
    "models_dir",
    "pull",
    "resolve",
    "verify",
]

MAX_NAME_CHARS = 4096


@dataclass(frozen=True, slots=True)
class CachedModel:
    """One model on this machine. ``problem`` says why it cannot be loaded; None means that it can."""

    name: str
    revision: str | None
    path: Path
    size_bytes: int
    problem: str | None


def models_dir(home: Path | None = None) -> Path:
    """Where bundled models and those of buckets live: ``models`` under ``home`` (default: ``GRISTMILL_HOME``,
    else the XDG data home)."""
    return (home or load_settings().home).expanduser().absolute() / "models"


def pull(
    name: str,
    revision: str | None = None,
    progress: Reporter | None = None,
    *,
    home: Path | None = None,
    settings: Settings | None = None,
) -> Path:
    """Make the model available on this machine, as it is now where it comes from; its verified directory.

    Of several processes at once one fetches, and the others wait. Raises InvalidRequest (no such name can
    be), ModelNotFound, ModelGated, ModelInvalid, DownloadFailed, Misconfigured (a missing package, no room),
    WaitTimeout (another pull of it never ended).
    """
    return _fetch(name, revision, progress or silent, _settings(home, settings), refresh=True)


def ensure(name: str, revision: str | None, progress: Reporter, settings: Settings) -> Path:
    """The model's directory; fetched only if it is not here, or not whole. Raises what ``pull`` does."""
    try:
        return resolve(name, revision, settings=settings)
    except (ModelNotFound, ModelInvalid):
        return _fetch(name, revision, progress, settings, refresh=False)


def resolve(
    name: str, revision: str | None = None, *, home: Path | None = None, settings: Settings | None = None
) -> Path:
    """The directory of a model that is already here, checked for completeness. No network.

    Raises ModelNotFound with the command that fetches it, ModelInvalid naming the bad file, InvalidRequest.
    """
    settings = _settings(home, settings)
    path = locate(name, revision, settings)
    if is_s3(name) and fetched.cached(name, models_dir(settings.home)) is None:
        raise ModelNotFound(f"{name} is not whole on this machine; run: gristmill models pull {name}")
    if name in BUNDLED:
        bundled.check(path)
    verify(path)
    return path


def list_models(*, home: Path | None = None, settings: Settings | None = None) -> list[CachedModel]:
    """Every model of the cache, broken ones included: bundled ones, those of buckets, then the Hub's."""
    settings = _settings(home, settings)
    root = models_dir(settings.home)
    found = [(name, None, root / name) for name in sorted(BUNDLED) if (root / name).is_dir()]
    buckets = [(url, None, path) for url, path in fetched.fetched(root)]
    return [_described(*each) for each in (*found, *buckets, *hub.snapshots(settings.hub_cache))]


def verify(path: Path, *, deep: bool = False) -> None:
    """Return if the directory can be loaded: every file there and of its full size.

    ``deep`` also compares contents with the hashes of its manifest, if it has one. Raises ModelNotFound,
    ModelInvalid.
    """
    manifest = manifest_of(Folder(path))
    if manifest is not None:
        check_recorded(path, manifest, bundled.advice(path), deep=deep)
    model_files.check(path)


def locate(name: str, revision: str | None, settings: Settings) -> Path:
    """Where a model lies on this machine, whole or not. Raises ModelNotFound, InvalidRequest."""
    option = f" --revision {revision}" if revision else ""
    fetch = f"run: gristmill models pull {name}{option}"
    if not is_s3(name) and (local := _local(name, models_dir(settings.home))) is not None:
        return local
    if is_s3(name) or name in BUNDLED:
        _refuse_revision(name, revision)
        root = models_dir(settings.home)
        path = fetched.directory(name, root) if is_s3(name) else root / name
        if not path.is_dir():
            raise ModelNotFound(f"{name} is not on this machine; {fetch}")
        return path
    _check_hub_id(name, revision)
    path = hub.cached(name, revision, settings.hub_cache)
    if path is None and name.endswith(".gguf"):
        raise ModelNotFound(f"{name}: no such file")
    if path is None:
        raise ModelNotFound(f"{name} is neither a directory nor in the Hub cache; {fetch}")
    return path


def _fetch(name: str, revision: str | None, report: Reporter, settings: Settings, *, refresh: bool) -> Path:
    """``refresh``: look for a newer one even if it is here."""
    root = models_dir(settings.home)
    if settings.offline and not (name in BUNDLED and bundled.is_installed(BUNDLED[name])):
        return _offline(name, revision, settings)
    if is_s3(name):
        _refuse_revision(name, revision)
        path = fetched.pull(name, root, settings, report, refresh=refresh)
    elif (local := _local(name, root)) is not None:
        path = local
    elif name in BUNDLED:
        _refuse_revision(name, revision)
        path = bundled.pull(BUNDLED[name], root, report)
    else:
        _check_hub_id(name, revision)
        path = _from_hub(name, revision, report, settings, refresh=refresh)
    verify(path)
    return path


def _from_hub(
    name: str, revision: str | None, report: Reporter, settings: Settings, *, refresh: bool
) -> Path:
    lock = models_dir(settings.home) / f".hub--{name.replace('/', '--')}.lock"
    with locked(lock, lambda: report(Progress("waiting for another process that fetches it"))):
        if not refresh:  # the other one may have fetched it
            try:
                return resolve(name, revision, settings=settings)
            except (ModelNotFound, ModelInvalid):
                pass
        return hub.download(name, revision, report, settings.hub_cache)


def _offline(name: str, revision: str | None, settings: Settings) -> Path:
    """Raises ModelNotFound with what to do on which machine."""
    try:
        return resolve(name, revision, settings=settings)
    except (ModelNotFound, ModelInvalid) as exc:
        if _is_path(name) or not (is_s3(name) or name in BUNDLED or hub.is_hub_id(name)):
            raise  # nothing that could be fetched elsewhere
        option = f" --revision {revision}" if revision else ""
        raise ModelNotFound(
            f"{name} is not on this machine, or not whole, and GRISTMILL_OFFLINE (or HF_HUB_OFFLINE) is set. "
            f"Where there is a network run: gristmill models mirror {name} DIR{option}; bring DIR here and "
            f"start with --model DIR. Or unset the variable and run: gristmill models pull {name}{option}"
        ) from exc


def _settings(home: Path | None, settings: Settings | None) -> Settings:
    return settings or load_settings(home=home)


def _is_path(name: str) -> bool:
    return Path(name).expanduser().is_absolute() or name.split("/", 1)[0] in (".", "..")


def _local(name: str, root: Path) -> Path | None:
    """The directory that ``name`` means, None if it means a bundled model or a Hub id.

    Whatever looks like a path is one; a bare or ``owner/name`` name is one if such a directory is there. A
    GGUF file, and a directory that holds nothing else, means the one that is made of it below ``root``.
    """
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise InvalidRequest(f"{name[:80]!r} is not the name of a model", param="model")
    path = Path(name).expanduser()
    if name not in BUNDLED and (file := gguf_model.gguf_in(path)) is not None:
        return gguf_model.directory_of(file, root)
    if _is_path(name):
        if not path.is_dir():
            raise ModelNotFound(f"{path}: no such directory, and no GGUF file")
        return path.absolute()
    return path.absolute() if name not in BUNDLED and path.is_dir() else None


def _check_hub_id(name: str, revision: str | None) -> None:
    if not hub.is_hub_id(name):
        raise ModelNotFound(
            f"no model {name!r}: use {', '.join(sorted(BUNDLED))}, a Hub id (owner/name), s3://bucket/prefix "
            "or the path of a directory or a GGUF file"
        )
    if revision is not None:
        hub.check_revision(revision)


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise InvalidRequest(f"{name} has one revision only; leave --revision out", param="revision")


def _described(name: str, revision: str | None, path: Path) -> CachedModel:
    try:
        if name in BUNDLED:
            bundled.check(path)
        verify(path)
        problem = None
    except (ModelInvalid, ModelNotFound) as exc:
        problem = exc.message
    size = sum(each.stat().st_size for each in path.iterdir() if each.is_file())
    return CachedModel(name, revision, path, size, problem)
