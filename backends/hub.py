"""Models of the Hugging Face Hub, kept in the Hub's own cache (``HF_HOME``), so that nothing is stored twice.

Only safetensors, JSON and chat templates are fetched: no pickles, no Python. ``HF_TOKEN``,
``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and the library's other variables mean what they always mean.
"""

from __future__ import annotations

import fcntl
import os
import re
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from ..schemas.errors import (
    DownloadFailed,
    GristmillError,
    InvalidRequest,
    Misconfigured,
    ModelGated,
    ModelNotFound,
)
from .progress import Progress, Reporter

WATCH_EVERY_S = 0.5
DEFAULT_REVISION = "main"
FETCHED = ("*.safetensors", "*.json", "*.jinja")
SKIPPED = (
    "*/*",
    "consolidated*",
)  # sub-folders hold other formats, "consolidated" the same weights once more
PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
HUB_ID = re.compile(rf"{PART}/{PART}")
REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(name: str) -> bool:
    """``owner/name``, of characters that the Hub allows and no path is made of."""
    return HUB_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def check_revision(revision: str) -> None:
    """Raises InvalidRequest unless it could be a branch, a tag or a commit."""
    if REVISION.fullmatch(revision) is None or ".." in revision or "//" in revision:
        raise InvalidRequest(f"revision {revision!r} is not a branch, tag or commit name", param="revision")


def download(name: str, revision: str | None, report: Reporter, cache: Path | None = None) -> Path:
    """Fetch what is missing; the snapshot's directory. Whole files of a call that was killed are kept.

    ``cache``: other than the library's. The caller holds a lock. Raises what ``translated`` returns.
    """
    try:
        from huggingface_hub import (
            errors,
            snapshot_download,  # pyright: ignore[reportUnknownVariableType]  # its user_agent is untyped
        )
    except ModuleNotFoundError as exc:
        raise Misconfigured(f"Hub models need {exc.name}; run: pip install 'gristmill[worker]'") from exc
    # The base class of its HTTP client's errors, whichever client the installed version has.
    http_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    fetch = partial(
        snapshot_download,
        name,
        revision=revision,
        allow_patterns=list(FETCHED),
        ignore_patterns=list(SKIPPED),
        cache_dir=cache,
        tqdm_class=_silent_bars(),
    )
    report(Progress("looking at the Hub"))
    try:
        try:
            sizes = [each.file_size or 0 for each in fetch(dry_run=True) if each.will_download]
        except errors.DryRunError:  # does not say why, as the real one will
            sizes = []
        folder = _folder(name, cache)
        assert folder is not None, "the library is here"
        _remove_leftovers(folder)
        with _watched(folder / "blobs", sum(sizes), report):
            return Path(fetch())
    except (http_error, errors.HFValidationError, errors.EntryNotFoundError, OSError) as exc:
        raise translated(exc, name, revision) from exc


def _silent_bars() -> Any:
    """Our own progress is enough."""
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):  # pyright: ignore[reportUntypedBaseClass, reportMissingTypeArgument]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # pyright: ignore[reportUnknownMemberType]

    return Silent


@contextmanager
def _watched(blobs: Path, total: int, report: Reporter) -> Generator[None]:
    """Report what arrives on the disk. The library's own bars differ from one version to the next."""
    before = _held(blobs)
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(WATCH_EVERY_S):
            report(Progress("downloading", min(total, max(0, _held(blobs) - before)), total, "B"))

    report(Progress("downloading", 0, total, "B"))
    thread = threading.Thread(target=watch, name="hub-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    report(Progress("downloading", total, total, "B"))


def _held(blobs: Path) -> int:
    """Bytes on the disk; files may be written with holes."""
    total = 0
    with suppress(OSError):
        for each in os.scandir(blobs):
            with suppress(OSError):
                stat = each.stat()
                total += min(stat.st_size, stat.st_blocks * 512)
    return total


def _remove_leftovers(folder: Path) -> None:
    """What killed downloads of this model have left: nobody goes on with it, names are drawn by each process.

    The library's own lock on a file tells whether somebody, not us, downloads it just now.
    """
    for part in (folder / "blobs").glob("*.incomplete"):
        lock = folder.parent / ".locks" / folder.name / f"{part.name.split('.')[0]}.lock"
        with suppress(OSError), lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def cached(name: str, revision: str | None, cache: Path | None = None) -> Path | None:
    """The snapshot's directory in the cache, or None. Reads the cache's documented layout itself: the
    library takes 0.4 s to import and a worker starts without the network."""
    repo = _folder(name, cache)
    if repo is None:
        return None
    revision = revision or DEFAULT_REVISION
    if COMMIT.fullmatch(revision):
        commit = revision
    else:
        ref = repo / "refs" / revision
        commit = ref.read_text().strip() if ref.is_file() else ""
    snapshot = repo / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def snapshots(cache: Path | None = None) -> Iterator[tuple[str, str, Path]]:
    """(name, revision, directory) of each model snapshot in the cache that has a branch or tag pointing at
    it."""
    cache = cache or _cache()
    for repo in sorted(cache.glob("models--*--*")) if cache else ():
        name = repo.name.removeprefix("models--").replace("--", "/", 1)
        for ref in sorted(each for each in (repo / "refs").rglob("[!.]*") if each.is_file()):
            revision = ref.relative_to(repo / "refs").as_posix()
            path = cached(name, revision, cache) if is_hub_id(name) else None
            if path is not None:
                yield name, revision, path


def snapshot(name: str, commit: str, cache: Path | None = None) -> Path | None:
    """Where a commit of a model is kept, or would be. None: nobody knows where the cache is."""
    repo = _folder(name, cache)
    return repo / "snapshots" / commit if repo is not None and COMMIT.fullmatch(commit) else None


def point_to(path: Path, revision: str) -> None:
    """Let a branch or tag mean the commit whose snapshot lies at ``path``. Raises InvalidRequest."""
    check_revision(revision)
    ref = path.parents[1] / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    aside = ref.with_name(f".{ref.name}.{os.getpid()}")
    aside.write_text(path.name)
    aside.rename(ref)


def _folder(name: str, cache: Path | None) -> Path | None:
    """The model's directory in the cache; None: without the library nobody knows where that is."""
    cache = cache or _cache()
    return cache / f"models--{name.replace('/', '--')}" if cache else None


def _cache() -> Path | None:
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError:  # a client-only installation
        return None
    return Path(constants.HF_HUB_CACHE)


def translated(exc: Exception, name: str, revision: str | None) -> GristmillError:
    """Our error for one that ``snapshot_download`` raises, most special first."""
    from huggingface_hub import constants, errors

    at = f"{name} at {revision}" if revision else name
    match exc:
        case errors.GatedRepoError():
            return ModelGated(
                f"{name} is gated: accept its terms on its page, then set HF_TOKEN and pull again"
            )
        case errors.RevisionNotFoundError():
            return ModelNotFound(
                f"{name} has no revision {revision!r}; leave --revision out for its main branch"
            )
        case errors.RepositoryNotFoundError():
            return ModelNotFound(f"{name} is not on the Hub, or private: check the name, or set HF_TOKEN")
        case errors.DisabledRepoError():
            return ModelNotFound(f"{name} was disabled on the Hub; use another model")
        case errors.HFValidationError():
            return InvalidRequest(f"{name!r} is not a Hub id: {exc}", param="model")
        case errors.OfflineModeIsEnabled() | errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return ModelNotFound(
                f"{at} is not in the cache and HF_HUB_OFFLINE is set; unset it and pull once online"
            )
        case errors.LocalEntryNotFoundError():
            return DownloadFailed(
                f"the Hub cannot be reached and {at} is not in the cache; check the network, pull again"
            )
        case errors.HfHubHTTPError():
            return DownloadFailed(f"the Hub answered {exc.response.status_code} for {at}; pull again later")
        case _:
            return DownloadFailed(
                f"fetching {at} failed ({type(exc).__name__}: {exc}); pull again to go on from there"
            )
