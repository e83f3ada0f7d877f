"""Several choices of one job: each is itself whatever becomes of the others, and survives its worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gristmill.engine.messages import Output
from gristmill.engine.tokenizer import Tokenizer
from gristmill.producer.replica import Replica
from gristmill.schemas.events import Candidate, Crashed, Delta, Done, EntryId, Event, Started
from gristmill.schemas.job import Job, JobState
from gristmill.schemas.logprobs import TokenLogprobs, likeliest
from gristmill.schemas.result import FinishReason, Result
from gristmill.schemas.sampling import SamplingParams
from gristmill.worker.generation import Generation
from gristmill.worker.history import History
from gristmill.worker.intake import engine_requests

TEXTS = ["Zürich, 東京 STOP and on", " 🙂 is short", "", " a longer one, to the end of its budget"]
LIKELY = [-0.5, -2.0, -9.0, -0.1]
"""Log probability of each token of each."""
PLAIN: dict[str, Any] = {"n": 4, "logprobs": 1, "return_token_ids": True, "echo": True}
RANKED: dict[str, Any] = {"n": 2, "best_of": 4, "return_token_ids": True}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


def attempt(tokenizer: Tokenizer, number: int, log: list[Event], **sampling: Any) -> Generation:
    job = Job(
        id="job_1",
        model="m",
        prompt="x",
        sampling=SamplingParams(stop=("STOP",), **sampling),
        submitted_at=1.0,
        expires_at=1e9,
    )
    made = Generation(job, number, number, 10.0 * number, tokenizer)
    made.replay([(EntryId(number, n), event) for n, event in enumerate(log)])
    if not made.complete:
        made.admit([1, 2, 3], 1000, 10.0)
    return made


def written(made: Generation) -> list[Event]:
    events: list[Event] = [entry.event for entry in made.take_entries(99.0)]
    made.confirm()
    return events


def step(made: Generation, tokenizer: Tokenizer) -> None:
    """As an engine would: a token of each choice, or its end."""
    for name, one in list(made.running):
        ids = tokenizer.encode(TEXTS[one.index], add_special_tokens=False)
        told = TokenLogprobs(logprob=LIKELY[one.index], top_ids=[7], top_logprobs=[-0.1])
        if len(one.ids) < len(ids):
            last = one.index == 3 and len(one.ids) + 1 == len(ids)
            given: dict[str, Any] = {"token_ids": [ids[len(one.ids)]], "finish": "length" if last else None}
            made.push(Output(id=name, logprobs=[told], cached_tokens=one.index, **given), 11.0)
        elif one.index == 3:  # its budget was used up when its worker died
            made.push(Output(id=name, token_ids=[], finish="length"), 11.0)
        else:
            made.push(Output(id=name, token_ids=[], finish="stop", stop_token_id=2), 11.0)


def run(made: Generation, tokenizer: Tokenizer) -> list[Event]:
    """To the end, each step journalled at once. What was written."""
    log = written(made)
    while not made.complete:
        step(made, tokenizer)
        log += written(made)
    return log


def comparable(result: Result) -> dict[str, Any]:
    return result.model_dump(exclude={"timings", "attempts", "crashes"})


def followed(log: list[Event]) -> dict[int, str]:
    """What a follower has in the end, by choice."""
    replica, texts = Replica(), dict[int, str]()
    for chunk in replica.read([(EntryId(1, n), event) for n, event in enumerate(log)]):
        texts[chunk.choice] = ("" if chunk.reset else texts.get(chunk.choice, "")) + chunk.text
    return texts


def test_each_choice_ends_by_itself_and_is_shown_as_it_comes(tokenizer: Tokenizer) -> None:
    made = attempt(tokenizer, 1, [], **PLAIN)
    assert [(r.id, r.choice) for r in engine_requests(made)] == [(f"job_1@1#{k}", k) for k in range(4)]
    log = run(made, tokenizer)
    result = made.result()
    assert [choice.index for choice in result.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in result.choices] == ["xZürich, 東京 ", *("x" + t for t in TEXTS[1:])]
    assert [(c.finish_reason.value, c.stop_reason) for c in result.choices] == [
        ("stop", "STOP"),
        ("stop", None),
        ("stop", None),
        ("length", None),
    ]
    assert followed(log) == {choice.index: choice.text for choice in result.choices}
    ids = [choice.token_ids or () for choice in result.choices]
    assert result.usage.prompt_tokens == 3
    assert result.usage.completion_tokens == sum(map(len, ids)) + 2, "two end tokens"
    assert result.usage.cached_tokens == 0, "the first choice's: the others find what it computed"


def test_the_best_are_shown_once_all_have_ended_and_all_are_paid_for(tokenizer: Tokenizer) -> None:
    made = attempt(tokenizer, 1, [], **RANKED)
    assert {request.logprobs for request in engine_requests(made)} == {0}
    log = run(made, tokenizer)
    result = made.result()
    assert [(choice.index, choice.text) for choice in result.choices] == [(0, TEXTS[3]), (1, "Zürich, 東京 ")]
    assert followed(log) == {choice.index: choice.text for choice in result.choices}
    shown = [n for n, event in enumerate(log) if isinstance(event, Delta | Done)]
    assert shown == list(range(len(log) - 4, len(log))), "nothing before the last candidate has ended"
    assert [event.ids for event in log if isinstance(event, Delta)] == [c.token_ids for c in result.choices]
    assert result.choices[0].logprobs is None, "nobody asked"
    whole = attempt(tokenizer, 1, [], **(PLAIN | {"echo": False}))
    run(whole, tokenizer)
    assert result.usage == whole.result().usage


@pytest.mark.parametrize("sampling", [PLAIN, RANKED], ids=["n", "best_of"])
def test_a_successor_continues_each_choice_from_any_entry_of_the_log(
    tokenizer: Tokenizer, sampling: dict[str, Any]
) -> None:
    whole = attempt(tokenizer, 1, [], **sampling)
    log = run(whole, tokenizer)
    for cut in range(len(log) + 1):
        second = attempt(tokenizer, 2, log[:cut], **sampling)
        ended = {
            event.choice
            for event in log[:cut]
            if (isinstance(event, Candidate) and event.end) or isinstance(event, Done)
        }
        again = {request.choice for request in engine_requests(second)}
        assert not again & ended, "a choice that had ended was run again"
        rest = run(second, tokenizer)
        assert comparable(second.result()) == comparable(whole.result()), f"cut at {cut}"
        texts = {choice.index: choice.text for choice in whole.result().choices}
        assert followed([*log[:cut], Started(worker="w", at=1.0), *rest]) == texts
        third = attempt(tokenizer, 3, [*log[:cut], *rest], **sampling)
        assert third.complete
        assert comparable(third.result()) == comparable(whole.result())


@pytest.mark.parametrize("sampling", [PLAIN, RANKED], ids=["n", "best_of"])
def test_what_ends_one_choice_from_outside_ends_all_and_ended_ones_stay(
    tokenizer: Tokenizer, sampling: dict[str, Any]
) -> None:
    made = attempt(tokenizer, 1, [], **sampling)
    for _ in range(2):
        step(made, tokenizer)
    assert [one.index for _, one in made.running] == [0, 1, 3]
    made.end_early(FinishReason.CANCELLED, 12.0)
    log = written(made)
    assert made.complete
    result = made.result()
    assert (result.state, result.finish_reason) == (JobState.CANCELLED, FinishReason.CANCELLED)
    assert all(choice.text for choice in result.choices if choice.index != 2)
    assert comparable(attempt(tokenizer, 2, log, **sampling).result()) == comparable(result)


def test_an_error_of_one_choice_is_the_jobs(tokenizer: Tokenizer) -> None:
    made = attempt(tokenizer, 1, [], **PLAIN)
    step(made, tokenizer)
    assert made.push(Output(id="job_1@1#1", token_ids=[], finish="error", error_code="e"), 12.0) == "job_1@1"
    result = made.result()
    assert result.state is JobState.FAILED
    assert result.error is not None
    assert result.error.code == "e"
    assert [choice.finish_reason for choice in result.choices] == [
        FinishReason.ERROR,
        FinishReason.ERROR,
        FinishReason.STOP,
        FinishReason.ERROR,
    ]


def test_the_journal_is_due_when_one_choice_has_enough(tokenizer: Tokenizer) -> None:
    made = attempt(tokenizer, 1, [], n=2)
    made.push(Output(id="job_1@1#0", token_ids=[504] * 15), 11.0)
    made.push(Output(id="job_1@1#1", token_ids=[504] * 15), 11.0)
    assert made.due_at() == 11.5
    made.push(Output(id="job_1@1#1", token_ids=[504]), 11.1)
    assert made.due_at() == 0.0
    assert [(e.choice, len(e.ids)) for e in written(made) if isinstance(e, Delta)] == [(0, 15), (1, 16)]
    assert made.due_at() is None
    made.push(Output(id="job_1@1#0", token_ids=[], finish="length"), 11.2)
    assert made.due_at() == 0.0, "that a choice has ended is worth an entry"


def test_history_counts_the_tokens_of_all_choices_and_an_end_as_progress() -> None:
    started, lost = Started(worker="w", at=1.0), Crashed(code="engine_died", tokens=0, at=2.0)
    deltas = [Delta(choice=n, offset=3, ids=(1, 2)) for n in (0, 1)]
    assert History([started, *deltas, started, started]).crashes[-1].tokens == 10
    assert History([started, lost]).doubtful
    assert not History([started, lost, Done(reason=FinishReason.STOP, choice=1, at=3.0)]).doubtful


def test_the_likeliest_are_those_with_the_best_mean() -> None:
    def told(*logprobs: float) -> list[TokenLogprobs]:
        return [TokenLogprobs(logprob=each) for each in logprobs]

    assert likeliest([told(-1), told(), told(-0.5, -0.7), told(-0.5), told(-0.5)], 4) == [3, 4, 2, 0]
    assert likeliest([told(), told(-5)], 2) == [1, 0]
