"""Several choices of one job go through the queue and a worker's death as if nothing had happened."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gristmill.backends.state import Claim, State, Write
from gristmill.engine.models.tiny import write_tiny
from gristmill.keeper.endings import Ending, complete
from gristmill.producer.replica import Chunk
from gristmill.schemas.events import Candidate, Delta, Done, Started
from gristmill.schemas.job import JobState
from gristmill.schemas.logprobs import TokenLogprobs, pack
from gristmill.schemas.result import FinishReason, Result

from ..support.journal import make_job
from ..support.stack import Stack
from ..support.valkey import Valkey
from ..support.waiting import wait_until

TOKENS = 400
WISHES: dict[str, Any] = {"max_tokens": TOKENS, "seed": 4, "ignore_eos": True, "return_token_ids": True}
CHOICES: list[dict[str, Any]] = [{"n": 3, "stream": True}, {"best_of": 3}]


def ids(result: Result) -> list[tuple[int, ...] | None]:
    return [choice.token_ids for choice in result.choices]


def logged(stack: Stack, job_id: str) -> dict[int, int]:
    """Tokens in the log, by choice."""
    found: dict[int, int] = {}
    for _, event in stack.state.read_log(job_id):
        if isinstance(event, Delta | Candidate):
            found[event.choice] = event.offset + len(event.ids)
    return found


@pytest.fixture
def long_stack(valkey: Valkey, tmp_path: Path) -> Iterator[Stack]:
    """Its texts are so long that a kill comes in the middle."""
    model = write_tiny(tmp_path / "model", tokenizer=True, max_position_embeddings=1024)
    stack = Stack(valkey, tmp_path, model)
    yield stack
    stack.close()


def test_a_killed_workers_choices_go_on_and_are_what_they_always_are(long_stack: Stack) -> None:
    first, client = long_stack.worker(), long_stack.client
    single = client.submit("Tell me a tale", **WISHES)
    jobs = [client.submit("Tell me a tale", **WISHES, **wish) for wish in CHOICES]
    wait_until(
        lambda: all(len(found := logged(long_stack, j.id)) == 3 and min(found.values()) > 20 for j in jobs),
        120,
        "each choice has some tokens",
    )
    first.kill()
    long_stack.worker()
    several, best = (job.result(timeout_s=300) for job in jobs)
    for job in jobs:
        events = [event for _, event in long_stack.state.read_log(job.id)]
        assert sum(isinstance(event, Started) for event in events) > 1, "the kill came too late"
    undisturbed = client.submit("Tell me a tale", **WISHES, n=3).result(timeout_s=300)
    assert ids(several) == ids(undisturbed)
    assert len(set(ids(several))) == 3
    assert ids(single.result(timeout_s=300)) == ids(several)[:1], "the first of several is the only one"
    assert ids(best)[0] in ids(several)
    assert best.usage.completion_tokens == several.usage.completion_tokens == 3 * TOKENS
    assert several.usage.prompt_tokens == 14, "once, as OpenAI counts"

    texts = dict.fromkeys(range(3), "")
    for chunk in client.get(jobs[0].id).stream(timeout_s=60):
        assert isinstance(chunk, Chunk)
        assert not chunk.reset
        texts[chunk.choice] += chunk.text
    assert list(texts.values()) == [choice.text for choice in several.choices]


@pytest.mark.parametrize("ranked", [False, True], ids=["n", "best_of"])
def test_who_ends_a_job_that_nobody_runs_ends_each_choice_with_the_text_it_has(
    state: State, ranked: bool
) -> None:
    job = make_job(sampling={"n": 2, "best_of": 3 if ranked else None})
    claim = state.claim(job.id, "w", job.expires_at)
    assert isinstance(claim, Claim)
    kind, done = (Candidate if ranked else Delta), Done(reason=FinishReason.STOP, choice=1, text="!", at=1.0)
    likely = {n: pack([TokenLogprobs(logprob=-float(n))]) for n in range(3)} if ranked else {}
    events: list[Candidate | Delta | Done] = [
        kind(choice=n, offset=0, ids=(n,), text=f"text {n}", logprobs=likely.get(n))
        for n in ((2, 1) if ranked else (1,))
    ]
    events.append(Candidate(choice=1, offset=1, ids=(), end=done) if ranked else done)
    writes = [Write(job.id, claim.attempt, seq, event.to_json()) for seq, event in enumerate(events, 1)]
    assert not state.publish(writes)
    ending = Ending(
        job_id=job.id, model="m", submitted_at=1.0, expires_at=2.0, reason=FinishReason.EXPIRED, echo={"n": 2}
    )
    for _ in range(2):  # whoever repeats it finds a complete log
        again = state.claim(job.id, "keeper", job.expires_at)
        assert isinstance(again, Claim)
        result = complete(state, ending, again)
        assert result is not None
        assert result.state is JobState.EXPIRED
        assert [choice.index for choice in result.choices] == [0, 1]
        texts = ["text 1!", "text 2"] if ranked else ["", "text 1!"]
        assert [choice.text for choice in result.choices] == texts
        assert result.usage.completion_tokens == (2 if ranked else 1)
