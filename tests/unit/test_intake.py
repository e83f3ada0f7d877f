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
