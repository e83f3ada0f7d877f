"""From a delivered job to token ids: the same ids on every attempt."""

from __future__ import annotations

from pathlib import Path

from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.job import Job, Message
from gristmill.worker import intake

from ..support import tokenizers as made


def test_a_template_that_asks_for_the_date_is_told_when_the_job_was_submitted(tmp_path: Path) -> None:
    """A job resumed after midnight, or in another time zone, would have gone on from another prompt."""
    template = "{{ strftime_now('%Y-%m-%d %H:%M') }} {{ messages[0].content }}"
    tokenizer = Tokenizer(made.write(tmp_path, made.byte_level(), {"chat_template": template}))
    job = Job(
        id="job_1",
        model="m",
        messages=(Message(role="user", content="hi"),),
        submitted_at=86_400.0 * 365 + 60.0,
        expires_at=1e10,
    )
    ids = intake.encode(job, tokenizer, tokenizer.vocab_size)
    assert tokenizer.decode(ids) == "1971-01-01 00:01 hi"
