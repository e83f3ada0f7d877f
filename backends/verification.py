"""What is wrong with a model, file by file, wherever it lies: sizes, checksums, headers, the index."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, cast

from ..schemas.errors import ModelInvalid
from . import model_files
from .copying import FILES_AT_ONCE, manifest_of
from .gguf_model import FILE as GGUF
from .manifest import MANIFEST, Manifest, Recorded, is_plain
from .model_files import INDEX
from .places import Folder, Found, Place
from .progress import Meter, Reporter

Kind = Literal["missing", "truncated", "different", "damaged"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One file that cannot be trusted."""

    file: str
    kind: Kind
    detail: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """``compared``: files whose contents were compared with a recorded checksum."""

    files: int
    size_bytes: int
    compared: int
    problems: list[Problem]


def examine(place: Place, report: Reporter, *, needs_manifest: bool = False) -> Verdict:
    """Read everything that has a checksum, and the headers of the rest.

    ``needs_manifest``: without one it is not whole. Raises DownloadFailed, Misconfigured; what is wrong with
    the model is in the verdict.
    """
    problems: list[Problem] = []
    there = place.files()
    there.pop(MANIFEST, None)
    try:
        manifest = manifest_of(place)
    except ModelInvalid as exc:
        manifest, problems = None, [Problem(MANIFEST, "damaged", exc.message)]
    if manifest is None and needs_manifest and not problems:
        problems = [Problem(MANIFEST, "missing", "it is written last: the model is not whole")]
    recorded = manifest.files if manifest else _hub_checksums(place, there)
    if manifest:
        problems += _sizes(manifest, there)
    whole = {name: each for name, each in recorded.items() if name in there and there[name].size == each.size}
    problems += _contents(place, whole, there, report)
    bad = {problem.file for problem in problems}
    problems += _structure(place, {name: found for name, found in there.items() if name not in bad}, bad)
    size = sum(found.size for found in there.values())
    return Verdict(len(there), size, len(whole), sorted(problems, key=lambda each: each.file))


def _hub_checksums(place: Place, there: Mapping[str, Found]) -> dict[str, Recorded]:
    """The Hub's cache names large files by their contents."""
    if not isinstance(place, Folder):
        return {}
    sums = {name: place.named_checksum(name) for name in there}
    return {name: Recorded(there[name].size, each) for name, each in sums.items() if each is not None}


def _sizes(manifest: Manifest, there: Mapping[str, Found]) -> list[Problem]:
    problems: list[Problem] = []
    for name, recorded in manifest.files.items():
        if name not in there:
            problems.append(Problem(name, "missing", f"{recorded.size:,} bytes are recorded"))
        elif (size := there[name].size) != recorded.size:
            kind: Kind = "truncated" if size < recorded.size else "different"
            problems.append(Problem(name, kind, f"{size:,} bytes instead of {recorded.size:,}"))
    return problems


def _contents(
    place: Place, recorded: Mapping[str, Recorded], there: Mapping[str, Found], report: Reporter
) -> list[Problem]:
    """Compare checksums, several files at a time."""
    meter = Meter("checking", sum(each.size for each in recorded.values()), report)

    def digest(name: str) -> str:
        summed = hashlib.sha256()
        for data in place.pieces(name, there[name]):
            summed.update(data)
            meter.add(len(data))
        return summed.hexdigest()

    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="verify") as pool:
        found = dict(zip(recorded, pool.map(digest, recorded), strict=True))
    return [
        Problem(name, "different", f"SHA-256 {found[name][:16]}… instead of {each.sha256[:16]}…")
        for name, each in recorded.items()
        if found[name] != each.sha256
    ]


def _structure(place: Place, there: Mapping[str, Found], bad: set[str]) -> list[Problem]:
    """What any model directory must hold, whether or not anybody has recorded checksums of it."""
    problems: list[Problem] = []
    if any(name.endswith(".gguf") for name in there) and "config.json" not in there:
        return problems  # one file is all of the model
    needed = [
        _json_object(place, name, there) for name in ("config.json", "tokenizer.json") if name not in bad
    ]
    problems += [problem for problem in needed if problem]
    tensors: dict[str, set[str]] = {}
    for name in sorted(each for each in there if each.endswith(".safetensors")):
        try:
            header = model_files.header(
                name, there[name].size, lambda start, count, at=name: place.span(at, start, count)
            )
        except ModelInvalid as exc:
            kind: Kind = "truncated" if "promises" in exc.message else "damaged"
            problems.append(Problem(name, kind, exc.message))
        else:
            tensors[name] = set(header) - {"__metadata__"}
    if INDEX in there:
        problems += _index(place, there, tensors, bad | {problem.file for problem in problems})
    elif not {"model.safetensors", GGUF, INDEX} & (there.keys() | bad):
        problems.append(Problem("model.safetensors", "missing", f"there is no {INDEX} either"))
    return problems


def _json_object(place: Place, name: str, there: Mapping[str, Found]) -> Problem | None:
    body = place.whole(name) if name in there else None
    if body is None:
        return Problem(name, "missing", "no model is loaded without it")
    try:
        content: Any = json.loads(body)
    except (ValueError, RecursionError) as exc:
        return Problem(name, "damaged", f"not JSON: {exc}")
    if not isinstance(content, dict):
        return Problem(name, "damaged", "not a JSON object")
    return None


def _index(
    place: Place, there: Mapping[str, Found], tensors: Mapping[str, set[str]], bad: set[str]
) -> list[Problem]:
    """Every tensor that the index names lies in the file that it names."""
    try:
        content: Any = json.loads(place.whole(INDEX) or b"")
        places = cast("dict[str, Any]", content["weight_map"])
        files = sorted({str(file) for file in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        return [Problem(INDEX, "damaged", f"has no weight_map: {exc!r}")]
    problems: list[Problem] = []
    for file in files:
        named = {tensor for tensor, where in places.items() if where == file}
        if not is_plain(file):
            problems.append(Problem(INDEX, "damaged", f"{file[:80]!r} is not a plain file name"))
        elif file not in there and file not in bad:
            problems.append(Problem(file, "missing", f"the index places {len(named):,} tensors there"))
        elif file in tensors and (lost := sorted(named - tensors[file])):
            detail = f"{file} lacks {len(lost):,} tensors that are placed there, {lost[0]!r} among them"
            problems.append(Problem(INDEX, "different", detail))
    return problems
