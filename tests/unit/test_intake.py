"""What a job asks for beside what the model holds."""

from __future__ import annotations

import pytest
from gristmill.schemas.errors import PromptTooLong
from gristmill.worker import intake

from ..support.journal import make_job


@pytest.mark.parametrize("name", ["max_tokens", "min_tokens"])
def test_the_refusal_names_the_parameter_that_asks_for_too_much(name: str) -> None:
    job = make_job(sampling={name: 500})
    with pytest.raises(PromptTooLong) as caught:
        intake.budget(job, prompt_tokens=100, limit=512, default_max_tokens=1024)
    assert f"prompt (100 tokens) + {name} (500) is 600" in caught.value.message
    assert f"lower {name} to 412" in caught.value.message


def test_guesses_are_shared_by_rows_of_a_bulk_run_and_never_by_two_tenants() -> None:
    named = [
        ("a", "run.1"),
        ("a", "run.2"),
        ("b", "run.1"),
        ("a", "other.1"),
        ("a", "run"),
        ("a", "x"),
        ("b", "x"),
    ]
    row, next_row, *others = (intake.group_of(make_job(id=job_id, tenant=tenant)) for tenant, job_id in named)
    assert row == next_row
    assert row not in others
    alone, likewise, foreign = others[-3:]
    assert alone == likewise != foreign
