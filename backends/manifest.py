"""``gristmill-model.json``: which files make up a model, their sizes and SHA-256. Written last: without it a
copy is not whole.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..schemas.errors import ModelInvalid

MANIFEST = "gristmill-model.json"
UNFINISHED = "gristmill-model.partial.json"
"""The same for a copy that is being made: what is there already."""
HASH = 64


@dataclass(frozen=True, slots=True)
class Recorded:
    """A file as it was copied. ``tag``: what its source called this version of it (an ETag), if anything."""

    size: int
    sha256: str
    tag: str | None = None


@dataclass(frozen=True, slots=True)
class Manifest:
    """``about``: what the file holds besides its list, such as where the model is from."""

    files: dict[str, Recorded]
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    def dump(self) -> bytes:
        """As it lies beside the model."""
        files = {
            name: {"size": each.size, "sha256": each.sha256} | ({"tag": each.tag} if each.tag else {})
            for name, each in sorted(self.files.items())
        }
        return json.dumps({**self.about, "files": files}, indent=1, ensure_ascii=False).encode()


def parse(body: bytes, where: str) -> Manifest:
    """Raises ModelInvalid, naming ``where``, for what is no manifest or names files outside its directory."""
    try:
        content: Any = json.loads(body)
        files = {
            name: Recorded(int(each["size"]), str(each["sha256"]), each.get("tag"))
            for name, each in content.pop("files").items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as exc:
        raise ModelInvalid(f"{where}: not a list of a model's files; copy the model again") from exc
    for name, each in files.items():
        if not is_plain(name) or each.size < 0 or len(each.sha256) != HASH:
            raise ModelInvalid(f"{where}: {name[:80]!r} is no file of a model; copy the model again")
    return Manifest(files, cast("dict[str, Any]", content))


def is_plain(name: str) -> bool:
    """A name that stays in its directory, and is not hidden."""
    return name != "" and name.isprintable() and Path(name).name == name and not name.startswith(".")


def sha256_of(path: Path) -> str:
    """Of a whole file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_recorded(path: Path, manifest: Manifest, advice: str, *, deep: bool = False) -> None:
    """Raise ModelInvalid, with ``advice``, unless every file has its size; ``deep``: and its contents."""
    for name, recorded in manifest.files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size is None:
            raise ModelInvalid(f"{file}: missing; {advice}")
        if size != recorded.size:
            raise ModelInvalid(f"{file}: {size:,} bytes instead of {recorded.size:,}; {advice}")
    for name, recorded in manifest.files.items() if deep else ():
        if sha256_of(path / name) != recorded.sha256:
            raise ModelInvalid(f"{path / name}: changed since it was written; delete {path}, then {advice}")
