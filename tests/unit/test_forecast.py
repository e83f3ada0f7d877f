"""How long the rest of a batch takes, as `gristmill run` says it."""

from gristmill.producer.batch.cutting import Part
from gristmill.producer.batch.forecast import Forecast
from gristmill.schemas.batch import Batch, BatchStatus, RequestCounts
from gristmill.schemas.result import Usage

PARTS = (Part(rows=10, prompt_tokens=0, output_tokens=1000),)


def batch(done: int, tokens: int, total: int = 10, failed: int = 0) -> Batch:
    counts = RequestCounts(total=total, completed=done, failed=failed)
    return Batch(
        id="batch_0",
        model="m",
        status=BatchStatus.IN_PROGRESS,
        request_counts=counts,
        usage=Usage(completion_tokens=tokens),
    )


def test_the_first_answers_took_the_time_until_they_joined_and_not_that_since_the_last_look() -> None:
    forecast = Forecast(PARTS)
    for now in range(60):
        forecast.progress(batch(0, 0), float(now))

    found = forecast.progress(batch(5, 500), now=60.0)

    assert (found.tokens_per_s, found.eta_s) == (50.0, 10.0)


def test_lines_that_were_refused_are_no_part_of_the_work_that_is_done() -> None:
    forecast = Forecast(PARTS)
    forecast.progress(batch(0, 0, total=100, failed=90), now=0.0)

    found = forecast.progress(batch(5, 500, total=100, failed=90), now=10.0)

    assert (found.eta_s, found.live) == (10.0, True)
    assert not forecast.live(batch(0, 0, total=100, failed=90)), "nothing has run"
    assert forecast.tokens(batch(5, 50, total=100, failed=90)) == (0.0, 100.0), (
        "a tenth of what was estimated"
    )
