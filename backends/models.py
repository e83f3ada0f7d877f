"""The model cache: from a name to a directory that the engine can load.

A name is a bundled model (``smollm2-135m``), a Hub id (``owner/name``) or a local directory. ``pull`` may
use the network; ``resolve`` never does.
"""

from dataclasses import dataclass
from pathlib import Path

from ..schemas.errors import InvalidRequest, ModelInvalid, ModelNotFound
from ..schemas.settings import load_settings
from . import bundled, hub, model_files
from .bundled import BUNDLED, Progress, Reporter

__all__ = ["CachedModel", "Progress", "Reporter", "list_models", "models_dir", "pull", "resolve", "verify"]

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
    """Where bundled models live: ``models`` under ``home`` (default: ``GRISTMILL_HOME``, else the XDG data
    home)."""
    return (home or load_settings().home).expanduser().absolute() / "models"


def pull(
    name: str, revision: str | None = None, progress: Reporter | None = None, *, home: Path | None = None
) -> Path:
    """Make the model available on this machine and return its verified directory. A second call is cheap.

    Raises InvalidRequest (no such name can be), ModelNotFound, ModelGated, ModelInvalid, DownloadFailed,
    Misconfigured (a missing package), WaitTimeout (another pull of it never ended).
    """
    report = progress or _silent
    local = _local(name)
    if local is not None:
        path = local
    elif name in BUNDLED:
        _refuse_revision(name, revision)
        path = bundled.pull(BUNDLED[name], models_dir(home), report)
    else:
        _check_hub_id(name, revision)
        report(Progress("downloading"))
        path = hub.download(name, revision)
    verify(path)
    return path


def resolve(name: str, revision: str | None = None, *, home: Path | None = None) -> Path:
    """The directory of a model that is already here, checked for completeness. No network.

    Raises ModelNotFound with the command that fetches it, ModelInvalid naming the bad file, InvalidRequest.
    """
    local = _local(name)
    if local is not None:
        path = local
    elif name in BUNDLED:
        _refuse_revision(name, revision)
        path = models_dir(home) / name
        if not path.is_dir():
            raise ModelNotFound(f"{name} is not on this machine; run: gristmill models pull {name}")
        bundled.check(path)
    else:
        _check_hub_id(name, revision)
        found = hub.cached(name, revision)
        if found is None:
            option = f" --revision {revision}" if revision else ""
            raise ModelNotFound(
                f"{name} is neither a directory nor in the Hub cache; "
                f"run: gristmill models pull {name}{option}"
            )
        path = found
    verify(path)
    return path


def list_models(*, home: Path | None = None) -> list[CachedModel]:
    """Every model of the cache, broken ones included: bundled ones first, then the Hub's, by name."""
    root = models_dir(home)
    found = [(name, None, root / name) for name in sorted(BUNDLED) if (root / name).is_dir()]
    return [_described(*each) for each in (*found, *hub.snapshots())]


def verify(path: Path, *, deep: bool = False) -> None:
    """Return if the directory can be loaded: every file there and of its full size.

    ``deep`` also compares contents with the hashes taken when a bundled model was written. Raises
    ModelNotFound, ModelInvalid.
    """
    if (path / bundled.MANIFEST).is_file():
        (bundled.check_hashes if deep else bundled.check)(path)
    model_files.check(path)


def _local(name: str) -> Path | None:
    """The directory that ``name`` means, None if it means a bundled model or a Hub id.

    Whatever looks like a path is one; a bare or ``owner/name`` name is one if such a directory is there.
    """
    if not name or len(name) > MAX_NAME_CHARS or not name.isprintable():
        raise InvalidRequest(f"{name[:80]!r} is not the name of a model", param="model")
    path = Path(name).expanduser()
    if path.is_absolute() or name.split("/", 1)[0] in (".", ".."):
        if not path.is_dir():
            raise ModelNotFound(f"{path}: no such directory")
        return path.absolute()
    return path.absolute() if name not in BUNDLED and path.is_dir() else None


def _check_hub_id(name: str, revision: str | None) -> None:
    if not hub.is_hub_id(name):
        raise ModelNotFound(
            f"no model {name!r}: use {', '.join(sorted(BUNDLED))}, a Hub id (owner/name) or "
            "the path of a directory"
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


def _silent(_: Progress) -> None:
    pass
