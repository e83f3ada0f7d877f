"""What a batch has ended in, written to files of the user's."""

from __future__ import annotations

from contextlib import ExitStack

from ...schemas.settings import Settings
from . import output
from .answers import Answers


def download(answers: Answers, target: str, errors: str | None, settings: Settings) -> tuple[int, int]:
    """(answers, failed rows) written. Without ``errors`` all go to ``target``; an error file that would be
    empty is taken away. Raises Misconfigured, StoreUnavailable, ResultsDamaged.
    """
    if errors is not None:
        good = output.write(target, answers.lines("output"), settings)
        bad = output.write(errors, answers.lines("errors"), settings)
        if not bad:
            output.remove(errors)
        return good, bad
    counts = {"output": 0, "errors": 0}
    with ExitStack() as stack:
        file = stack.enter_context(output.opened(target, settings))
        for kind in ("output", "errors"):
            for line in answers.lines(kind):
                file.write(line)
                counts[kind] += 1
    return counts["output"], counts["errors"]
