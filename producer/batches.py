"""Batches: many requests as one. ``client.batches.submit("requests.jsonl")``, and its handle.

A batch is accepted when ``submit`` returns, and safe to submit again: the same input is the same batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeAlias

from ..schemas.batch import Batch, BatchEvent, BatchOptions, BatchStatus, RequestCounts
from ..schemas.batch_lines import OutputLine
from ..schemas.errors import EmptyFile, GristmillError, InvalidRequest, WaitTimeout
from ..schemas.events import EntryId
from . import core
from .settings import ProducerSettings, producer_settings

if TYPE_CHECKING:
    from .batch.answers import Kind
    from .batch.intake import Intake
    from .link import Link

Source: TypeAlias = str | PathLike[str] | Iterable[Mapping[str, Any]]
POLL_FIRST_S, POLL_GROWTH, POLL_MAX_S = 0.05, 1.5, 2.0
"""How a client waits for a batch."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a caller asks of a batch, beyond its rows."""

    model: str | None = None
    options: BatchOptions = field(default_factory=BatchOptions)
    completion_window_s: float | None = None
    """None: as long as jobs are kept."""
    metadata: Mapping[str, str] | None = None
    defaults: Mapping[str, Any] | None = None
    """Sampling for rows that do not say."""
    dedupe: bool = False
    input_format: str | None = None
    prompt_column: str | None = None
    template: str | None = None
    id_column: str | None = None
    field_columns: tuple[str, ...] = ()
    chat: bool = False
    system: str | None = None
    fresh: bool = False
    """A batch of its own, although the same input was submitted before."""


def pauses() -> Iterator[float]:
    """Between two looks at a batch, in seconds; for ever."""
    pause_s = POLL_FIRST_S
    while True:
        yield pause_s
        pause_s = min(POLL_MAX_S, POLL_GROWTH * pause_s)


def still_running(batch_id: str, timeout_s: float | None) -> WaitTimeout:
    """The error for somebody whose patience ran out."""
    return WaitTimeout(f"batch {batch_id} has not ended after {timeout_s:g} s; it goes on, ask again later")


class BatchHandle:
    """One batch: its id and a connection. Reads nothing before you ask."""

    def __init__(self, link: Link, batch_id: str, warnings: tuple[str, ...] = ()) -> None:
        self._link = link
        self.id = batch_id
        self.warnings = warnings

    def status(self) -> Batch:
        """Where it stands: counts, usage, problems of its input. Raises JobNotFound."""
        from .batch.answers import find

        return find(self._link, self.id)

    def wait(self, timeout_s: float | None = None, *, progress: bool = False) -> Batch:
        """Until it is final, whatever that is: look at its ``status``. ``progress``: show it on stderr.

        Raises WaitTimeout after ``timeout_s`` (the batch goes on), JobNotFound.
        """
        from .batch.forecast import Forecast
        from .progress import show_progress, silent

        deadline, forecast = None if timeout_s is None else time.monotonic() + timeout_s, Forecast()
        with (show_progress if progress else silent)() as report:
            for pause_s in pauses():
                batch = self.status()
                if batch.status.final:
                    return batch
                report(forecast.progress(batch))
                left_s = pause_s if deadline is None else deadline - time.monotonic()
                if left_s <= 0:
                    break
                time.sleep(min(pause_s, left_s))
        raise still_running(self.id, timeout_s)

    def follow(self, after: EntryId | str | None = None) -> Iterator[tuple[EntryId, BatchEvent]]:
        """What happens to it, from the beginning or from after an id, until it is final."""
        from .batch.following import follow

        last = EntryId.parse(after) if isinstance(after, str) else after
        return follow(self._link, self.id, last)

    def lines(self, kind: Kind = "output") -> Iterator[OutputLine]:
        """Answers, or (``errors``) rows that have none; of a batch that runs, those that have ended."""
        from .batch.answers import Answers

        return map(OutputLine.from_json, Answers(self._link, self.status()).lines(kind))

    def download(self, output: str, errors: str | None = None) -> tuple[int, int]:
        """Write them to a path, ``s3://`` or ``-``, packed by name. Returns (answers, failed rows).

        Without ``errors`` all go to ``output``.
        """
        from .batch.answers import Answers
        from .batch.download import download

        return download(Answers(self._link, self.status()), output, errors, self._link.settings)

    def cancel(self) -> BatchStatus:
        """Ask for a stop; what has ended is kept, and delivered. Raises JobNotFound."""
        return self._link.state.batches.cancel(self.id)

    def pause(self) -> BatchStatus:
        """Start no more rows. Raises JobNotFound."""
        return self._link.state.batches.pause(self.id)

    def resume(self) -> BatchStatus:
        """Go on. Raises JobNotFound."""
        return self._link.state.batches.resume(self.id)

    def retry(self) -> BatchHandle:
        """A new batch of its failed rows; the answers of that one have those of this one merged in.

        Raises InvalidRequest if it is not final yet, or no row failed that could run.
        """
        from .batch.retrying import retry

        return BatchHandle(self._link, retry(self._link, self.status()).id)

    def __repr__(self) -> str:
        return f"BatchHandle({self.id!r})"


class Batches:
    """See the module."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def submit(
        self,
        source: Source,
        *,
        model: str | None = None,
        on_invalid: str = "fail",
        input_order: bool = False,
        stop_after_failed: int | None = None,
        webhook: str | None = None,
        webhook_every_percent: int | None = None,
        metadata: Mapping[str, str] | None = None,
        **wishes: Any,
    ) -> BatchHandle:
        """Submit a file (a path, ``s3://…``) or requests as mappings. ``webhook`` is told how it ended, and
        with ``webhook_every_percent`` how far it is. ``wishes``: the fields of ``Wishes``.

        When this returns, the broker has it. Raises InvalidInput (its ``errors`` have line and code),
        EmptyFile, ModelNotFound, BrokerUnavailable, StoreUnavailable.
        """
        options = BatchOptions.from_python(
            {
                "on_invalid": on_invalid,
                "input_order": input_order,
                "stop_after_failed": stop_after_failed,
                "webhook": webhook,
                "webhook_every_percent": webhook_every_percent,
            }
        )
        unknown = sorted(set(wishes) - set(Wishes.__dataclass_fields__))
        if unknown:
            raise InvalidRequest(f"unknown argument {unknown[0]!r}", param=unknown[0])
        asked = Wishes(model=model, options=options, metadata=metadata, **wishes)
        return submit(self._link, source, asked, producer_settings(self._link.settings))

    def get(self, batch_id: str) -> BatchHandle:
        """A handle on a batch by its id. Raises InvalidRequest for what can be no id; looks nothing up."""
        return BatchHandle(self._link, core.check_job_id(batch_id))

    def list(self, after: str | None = None, limit: int = 20) -> list[Batch]:
        """The newest first, from behind ``after`` on."""
        return self._link.state.batches.list(after, limit)


def submit(link: Link, source: Source, asked: Wishes, settings: ProducerSettings) -> BatchHandle:
    """See ``Batches.submit``."""
    from .batch.check import naming_the_line
    from .batch.submission import Submission

    if asked.model or settings.model:  # a wrong name is known before a long file is read
        core.pick_model(asked.model, link.state.models(), settings)
    with read(source, asked, settings) as intake:
        with naming_the_line(intake.checked, asked.model or settings.model):
            name = core.pick_model(asked.model or intake.checked.model, link.state.models(), settings)
        batch = describe(intake, asked, name, settings, "batch_", source_name(source))
        submission = Submission(link, intake, batch)
        submission.run()
    warnings = [] if link.state.alive(name) else [core.nobody_alive(name, settings)]
    if submission.known is not None:
        warnings += _ignored(asked, submission.known)
    return BatchHandle(link, batch.id, tuple(warnings))


def _ignored(asked: Wishes, known: Batch) -> list[str]:
    """What a caller asks now of a batch that was submitted before without, or with another one."""
    pairs = {
        "metadata": (dict(asked.metadata or {}), known.metadata),
        "webhook": (asked.options.webhook, known.options.webhook),
        "completion window": (asked.completion_window_s, known.completion_window_s),
    }
    differ = [name for name, (now, then) in pairs.items() if now and now != then]
    if not differ:
        return []
    own = f"{known.id} was submitted before and keeps its own {' and '.join(differ)}"
    return [f"{own}; --fresh (fresh=True) makes a new batch with these"]


def read(
    source: Source, asked: Wishes, settings: ProducerSettings, models: Iterable[str] | None = None
) -> Intake:
    """The input, checked whole: a context manager. Raises InvalidInput, EmptyFile, BadInput.

    ``models``: names that rows may give.
    """
    from .batch.check import Rules
    from .batch.intake import Intake, InvalidInput
    from .batch.records import Shape
    from .batch.sources import FileName, parse_form

    names = models or ([asked.model or settings.model] if asked.model or settings.model else None)
    rules = Rules(
        settings=settings,
        models=None if names is None else frozenset(str(name) for name in names),
        defaults=dict(asked.defaults or {}),
        shape=Shape(
            asked.prompt_column,
            asked.template,
            asked.id_column,
            asked.chat,
            asked.system,
            tuple(asked.field_columns),
        ),
        dedupe=asked.dedupe,
        max_errors=asked.options.max_errors,
        max_rows=settings.batch_max_rows,
        max_bytes=settings.batch_max_bytes,
    )
    intake = Intake(rules)
    try:
        if isinstance(source, str | PathLike):
            checked = intake.read(FileName.of(fspath(source), parse_form(asked.input_format)))
        else:
            checked = intake.take_requests(source)
        if not checked.rows and not checked.invalid:
            raise EmptyFile("the input has no lines; put one request on each")
        if checked.invalid and (asked.options.on_invalid == "fail" or not checked.rows):
            raise InvalidInput(checked.invalid, checked.rows + checked.invalid, checked.errors)
    except BaseException:
        intake.__exit__()
        raise
    return intake


def describe(
    intake: Intake, asked: Wishes, model: str, settings: ProducerSettings, prefix: str, name: str
) -> Batch:
    """The batch of an input, as it is opened."""
    checked, options = intake.checked, asked.options
    salt = str(time.time_ns()) if asked.fresh else ""
    said = (model, settings.tenant, options.model_dump(exclude={"webhook"}), salt)
    return Batch(
        id=intake.batch_id(prefix, *said),
        model=model,
        endpoint=checked.endpoint or "/v1/completions",
        tenant=settings.tenant,
        input=name,
        input_digest=checked.digest,
        completion_window_s=asked.completion_window_s or settings.job_ttl_s,
        metadata=dict(asked.metadata or {}),
        options=options,
        request_counts=RequestCounts(total=checked.rows + checked.invalid),
    )


def source_name(source: Source) -> str:
    """What a batch's record calls its input."""
    return fspath(source) if isinstance(source, str | PathLike) else ""


def failed(batch: Batch) -> GristmillError | None:
    """Why a final batch has not run, as an error; None: it has."""
    if batch.status is not BatchStatus.FAILED:
        return None
    return InvalidRequest(f"{batch.problems:,} lines are not valid, and nothing ran")
