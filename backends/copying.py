"""A model from one place to another: in parallel, with checksums, and again from where it stopped."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..schemas.errors import DownloadFailed, Misconfigured, ModelInvalid, ModelNotFound
from .manifest import MANIFEST, UNFINISHED, Manifest, Recorded, parse
from .places import Folder, Found, Place
from .progress import Meter, Progress, Reporter, size

FILES_AT_ONCE = 4
ROOM_BYTES = 64 * 1024 * 1024
"""What stays free on a disk beside a model."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to copy. ``sha256``: as the source's manifest, or the Hub's cache, says; None: nobody does."""

    name: str
    found: Found
    sha256: str | None

    @property
    def version(self) -> Found:
        """As the target is told of it: what an unfinished copy is recognised by."""
        return Found(self.found.size, self.sha256 or self.found.tag)


@dataclass(frozen=True, slots=True)
class Copied:
    """What is there now. ``copied`` of its files were fetched, the others were there."""

    manifest: Manifest
    copied: int
    copied_bytes: int


def manifest_of(place: Place) -> Manifest | None:
    """What the place says of its files; None: nothing. Raises ModelInvalid for a copy not finished."""
    body = place.whole(MANIFEST)
    if body is not None:
        return parse(body, f"{place.where}/{MANIFEST}")
    if place.whole(UNFINISHED) is not None:
        raise ModelInvalid(
            f"{place.where}: a copy that was not finished; run the same gristmill models mirror again"
        )
    return None


def wanted_of(place: Place) -> tuple[list[Wanted], Manifest | None]:
    """The files of a model, weights first. Raises ModelNotFound, ModelInvalid for one that is not whole."""
    manifest, there = manifest_of(place), place.files()
    there.pop(MANIFEST, None)
    if not there:
        raise ModelNotFound(f"{place.where}: there is no model; check the name")
    if manifest is None:
        named = place.named_checksum if isinstance(place, Folder) else None
        wanted = [Wanted(name, found, named(name) if named else None) for name, found in there.items()]
    else:
        for name, recorded in manifest.files.items():
            held = there[name].size if name in there else None
            if held != recorded.size:
                has = "is missing" if held is None else f"has {held:,} bytes"
                raise ModelInvalid(
                    f"{place.where}/{name} {has}, {recorded.size:,} are recorded; copy the model there again"
                )
        wanted = [Wanted(name, there[name], each.sha256) for name, each in manifest.files.items()]
    # What makes a directory a model comes last: a copy that stops half-way is not taken for one.
    return sorted(wanted, key=lambda each: (not each.name.endswith(".safetensors"), each.name)), manifest


def copy(
    source: Place,
    target: Place,
    report: Reporter,
    *,
    about: dict[str, Any] | None = None,
    trust: bool = False,
) -> Copied:
    """Make ``target`` hold the source's files, then the manifest that says so.

    What is there with the same checksum stays; ``trust``: as recorded there, without reading it again.
    Raises ModelNotFound, ModelInvalid (a source that is not whole, or changed on the way), DownloadFailed,
    Misconfigured (no room, no rights).
    """
    wanted, manifest = wanted_of(source)
    recorded = _recorded(target)
    with ThreadPoolExecutor(FILES_AT_ONCE, thread_name_prefix="copy") as pool:
        done = _kept(source, target, wanted, recorded, report, pool, trust=trust)
        missing = [each for each in wanted if each.name not in done]
        here = isinstance(source, Folder)  # whose path means nothing elsewhere
        origin = manifest.about if manifest else {} if here else {"source": {"from": source.where}}
        whole = Manifest(done, {**origin, **(about or {})})
        if missing:
            _require_room(target, missing)
            target.put(UNFINISHED, whole.dump())
            target.remove(MANIFEST)
            meter = _meter(target, missing, report)
            for name, each in _copy_all(source, target, missing, meter, pool):
                done[name] = each
                target.put(UNFINISHED, whole.dump())
    target.put(MANIFEST, whole.dump())
    target.remove(UNFINISHED)
    return Copied(whole, len(missing), sum(each.found.size for each in missing))


def _recorded(target: Place) -> dict[str, Recorded]:
    for name in (UNFINISHED, MANIFEST):
        body = target.whole(name)
        if body is not None:
            try:
                return parse(body, f"{target.where}/{name}").files
            except ModelInvalid:  # cut short by a full disk: as if there were none
                continue
    return {}


def _kept(
    source: Place,
    target: Place,
    wanted: list[Wanted],
    recorded: dict[str, Recorded],
    report: Reporter,
    pool: ThreadPoolExecutor,
    *,
    trust: bool,
) -> dict[str, Recorded]:
    """The files that are there already."""
    there = target.files()
    same = [each for each in wanted if each.name in there and there[each.name].size == each.found.size]
    if same:
        report(Progress("checking what is there"))

    def look(each: Wanted) -> Recorded | None:
        record = recorded.get(each.name)
        ours = None if trust else target.checksum(each.name)
        if ours is None and record is not None and record.size == each.found.size:
            ours = record.sha256
        if ours is None:
            return None
        theirs = each.sha256
        if theirs is None and record is not None and record.tag == each.found.tag:
            theirs = record.sha256
        return _record(each, ours) if ours == (theirs or source.checksum(each.name)) else None

    found = zip(same, pool.map(look, same), strict=True)
    return {each.name: record for each, record in found if record is not None}


def _copy_all(
    source: Place, target: Place, missing: list[Wanted], meter: Meter, pool: ThreadPoolExecutor
) -> Iterable[tuple[str, Recorded]]:
    """Each file as it is finished. The first that fails, or an interrupt, stops the others."""
    stop = threading.Event()
    running = {pool.submit(_copy_file, source, target, each, meter, stop): each.name for each in missing}
    try:
        for future in as_completed(running):
            yield running[future], future.result()
    finally:
        stop.set()
        for future in running:
            future.cancel()


def _copy_file(source: Place, target: Place, wanted: Wanted, meter: Meter, stop: threading.Event) -> Recorded:
    """One file; what an earlier copy of it left is read again for the checksum, and continued."""
    writer = target.writer(wanted.name, wanted.version)
    resumed = 0
    try:
        summed = hashlib.sha256()
        for data in writer.kept():
            summed.update(data)
            resumed += len(data)
        done = resumed
        for data in source.pieces(wanted.name, wanted.found, resumed):
            if stop.is_set():
                raise DownloadFailed("stopped; run it again to go on from there")
            writer.append(data)
            summed.update(data)
            done += len(data)
            meter.add(len(data))
        digest = summed.hexdigest()
        right = done == wanted.found.size and wanted.sha256 in (None, digest)
        if right:
            writer.finish()
            return _record(wanted, digest)
        writer.discard()
    except BaseException:
        writer.abandon()
        raise
    meter.add(-done)
    if resumed:  # what was left behind was not the beginning of this
        return _copy_file(source, target, wanted, meter, stop)
    raise ModelInvalid(
        f"{source.where}/{wanted.name}: {done:,} bytes with SHA-256 {digest[:16]}…, recorded are "
        f"{wanted.found.size:,} with {(wanted.sha256 or digest)[:16]}…; copy the model there again"
    )


def _record(wanted: Wanted, digest: str) -> Recorded:
    return Recorded(wanted.found.size, digest, None if wanted.sha256 else wanted.found.tag)


def _meter(target: Place, missing: list[Wanted], report: Reporter) -> Meter:
    begun = sum(target.begun(each.name, each.version) for each in missing)
    return Meter("copying", sum(each.found.size for each in missing), report, begun)


def _require_room(target: Place, missing: list[Wanted]) -> None:
    """A disk that will be full in half an hour is better known now."""
    if not isinstance(target, Folder):
        return
    existing = next(path for path in (target.path, *target.path.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    begun = sum(target.begun(each.name, each.version) for each in missing)
    needed = sum(each.found.size for each in missing) - begun + ROOM_BYTES
    if needed > free:
        raise Misconfigured(
            f"{target.where}: {size(needed)} are needed and {size(free)} are free; make room, or set "
            "GRISTMILL_HOME to a larger disk (one in memory will do: /dev/shm)"
        )


def same_files(manifest: Manifest, wanted: list[Wanted]) -> bool:
    """Whether a copy with this manifest is what its source holds now."""
    if {each.name for each in wanted} != manifest.files.keys():
        return False
    return all(_is(manifest.files[each.name], each) for each in wanted)


def _is(record: Recorded, wanted: Wanted) -> bool:
    if record.size != wanted.found.size:
        return False
    return record.sha256 == wanted.sha256 if wanted.sha256 else record.tag == wanted.found.tag


def whole_copy(path: Path) -> Manifest | None:
    """The manifest of a copy on this machine whose files have their sizes; None: it is not whole."""
    place = Folder(path)
    try:
        manifest = manifest_of(place)
    except ModelInvalid:
        return None
    if manifest is None:
        return None
    there = place.files()
    held = {name: there[name].size if name in there else None for name in manifest.files}
    return manifest if held == {name: each.size for name, each in manifest.files.items()} else None
