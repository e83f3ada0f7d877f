"""Which model a worker of our own runs, and what it is called in the queue."""

from __future__ import annotations

from ..schemas.errors import ModelNotFound
from ..schemas.settings import Settings
from .transfer import show_transfer


def choose(wanted: str | None, settings: Settings, revision: str | None = None) -> str:
    """The model asked for, or the only one in the cache; checked to be here and whole.

    One of a bucket is fetched first. Raises ModelNotFound (offline, with what to run where), ModelInvalid,
    DownloadFailed.
    """
    from ..backends import models
    from ..backends.bucket import is_s3

    if wanted is not None and (is_s3(wanted) or settings.offline):
        with show_transfer() as report:
            models.ensure(wanted, revision, report, settings)
        return wanted
    if wanted is not None:
        models.resolve(wanted, revision, settings=settings)
        return wanted
    usable = [model.name for model in models.list_models(settings=settings) if model.problem is None]
    if len(usable) == 1:
        return usable[0]
    if usable:
        raise ModelNotFound(f"say which model: --model {' | '.join(usable)}")
    raise ModelNotFound("no model is on this machine; run: gristmill models pull smollm2-135m")
