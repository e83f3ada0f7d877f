"""Models of the Hugging Face Hub, kept in the Hub's own cache (``HF_HOME``), so that nothing is stored twice.

Only safetensors, JSON and chat templates are fetched: no pickles, no Python. ``HF_TOKEN``,
``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and the library's other variables mean what they always mean.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from ..schemas.errors import (
    DownloadFailed,
    GristmillError,
    InvalidRequest,
    Misconfigured,
    ModelGated,
    ModelNotFound,
)

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


def download(name: str, revision: str | None) -> Path:
    """Fetch what is missing; the snapshot's directory. Raises what ``translated`` returns."""
    try:
        from huggingface_hub import (
            errors,
            snapshot_download,  # pyright: ignore[reportUnknownVariableType]  # its user_agent is untyped
        )
    except ModuleNotFoundError as exc:
        raise Misconfigured(f"Hub models need {exc.name}; run: pip install 'gristmill[worker]'") from exc
    # The base class of its HTTP client's errors, whichever client the installed version has.
    http_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    try:
        path = snapshot_download(
            name, revision=revision, allow_patterns=list(FETCHED), ignore_patterns=list(SKIPPED)
        )
    except (http_error, errors.HFValidationError, errors.EntryNotFoundError, OSError) as exc:
        raise translated(exc, name, revision) from exc
    return Path(path)


def cached(name: str, revision: str | None) -> Path | None:
    """The snapshot's directory in the cache, or None. Reads the cache's documented layout itself: the
    library takes 0.4 s to import and a worker starts without the network."""
    cache = _cache()
    if cache is None:
        return None
    repo = cache / f"models--{name.replace('/', '--')}"
    revision = revision or DEFAULT_REVISION
    if COMMIT.fullmatch(revision):
        commit = revision
    else:
        ref = repo / "refs" / revision
        commit = ref.read_text().strip() if ref.is_file() else ""
    snapshot = repo / "snapshots" / commit
    return snapshot if COMMIT.fullmatch(commit) and snapshot.is_dir() else None


def snapshots() -> Iterator[tuple[str, str, Path]]:
    """(name, revision, directory) of each model snapshot in the cache that has a branch or tag pointing at
    it."""
    cache = _cache()
    for repo in sorted(cache.glob("models--*--*")) if cache else ():
        name = repo.name.removeprefix("models--").replace("--", "/", 1)
        for ref in sorted(each for each in (repo / "refs").rglob("*") if each.is_file()):
            revision = ref.relative_to(repo / "refs").as_posix()
            path = cached(name, revision) if is_hub_id(name) else None
            if path is not None:
                yield name, revision, path


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
