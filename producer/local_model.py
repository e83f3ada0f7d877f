"""Which model a worker of our own runs, and what it is called in the queue."""

from __future__ import annotations

from pathlib import Path

from ..schemas.errors import ModelNotFound
from ..schemas.settings import Settings


def choose(wanted: str | None, settings: Settings, revision: str | None = None) -> str:
    """The model asked for, or the only one in the cache; checked to be here and whole.

    Raises ModelNotFound, ModelInvalid.
    """
    from ..backends import models

    if wanted is not None:
        models.resolve(wanted, revision, home=settings.home)
        return wanted
    usable = [model.name for model in models.list_models(home=settings.home) if model.problem is None]
    if len(usable) == 1:
        return usable[0]
    if usable:
        raise ModelNotFound(f"say which model: --model {' | '.join(usable)}")
    raise ModelNotFound("no model is on this machine; run: gristmill models pull smollm2-135m")


def served_name(model: str) -> str:
    """The name that jobs use for a worker's ``--model``: a directory's own name, anything else as it is."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model
