"""A Generation's journal is complete, in order, and enough to continue from at any point."""

from __future__ import annotations

from pathlib import Path

import pytest
from gristmill.engine.messages import Output
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas import logprobs
from gristmill.schemas.errors import InvalidRequest
from gristmill.schemas.events import Crashed, Delta, Done, EntryId, Event, Started, Trial
from gristmill.schemas.job import Job, JobState
from gristmill.schemas.logprobs import TokenLogprobs
from gristmill.schemas.result import ErrorInfo, FinishReason
from gristmill.schemas.sampling import SamplingParams
from gristmill.worker.generation import Generation
from gristmill.worker.intake import engine_requests

TEXT = "Zürich, 東京 and 🙂 are in the text; STOP here is a stop string."


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(smollm2)


def generation(tokenizer: Tokenizer, *, stream: bool = False, **sampling: object) -> Generation:
    job = Job(
        id="job_1",
        model="m",
        prompt="x",
        stream=stream,
        sampling=SamplingParams.model_validate(sampling),
        submitted_at=1.0,
        expires_at=1e9,
    )
    made = Generation(job, attempt=7, attempts=1, started_at=10.0, tokenizer=tokenizer)
    made.admit([1, 2, 3], 1000, 10.0)
    return made


def token(value: int, **more: object) -> Output:
    return Output(id="job_1", token_ids=[value], **more)  # type: ignore[arg-type]


def journal(made: Generation) -> list[Event]:
    """Write everything that is left, as a publisher would."""
    events: list[Event] = [entry.event for entry in made.take_entries(99.0)]
    made.confirm()
    return events


def shown(log: list[Event]) -> str:
    return "".join(e.text for e in log if isinstance(e, Delta | Done))


@pytest.mark.parametrize("every", [1, 2, 3, 7, 1000])
def test_the_joined_text_of_the_journal_is_the_result(tokenizer: Tokenizer, every: int) -> None:
    made, log = generation(tokenizer), list[Event]()
    for n, value in enumerate(tokenizer.encode(TEXT, add_special_tokens=False)):
        made.push(token(value), now=11.0 + n)
        if n % every == 0:
            log += journal(made)
    made.push(Output(id="job_1", token_ids=[], finish="stop", stop_token_id=2), now=50.0)
    log += journal(made)
    assert made.complete
    assert shown(log) == made.result().text == TEXT
    assert made.result().usage.completion_tokens == made.tokens + 1, "the end token counts"
    assert made.result().timings.first_token_at == 11.0


def test_only_the_engine_knows_how_a_guided_text_ended_that_used_up_its_tokens(tokenizer: Tokenizer) -> None:
    """The worker died before ``Done`` was written: whether the text is complete, its ids alone do not say."""
    log: list[tuple[EntryId, Event]] = [(EntryId(7, 1), Delta(offset=0, ids=(5, 6), text="ab"))]
    for grammar, reason in ((None, FinishReason.LENGTH), ({"kind": "regex", "text": "[a-z]+"}, None)):
        again = generation(tokenizer, grammar=grammar)
        again.replay(log)
        again.admit([1, 2, 3], 2, 10.0)
        assert (again.done and again.done.reason) == reason
    again.push(Output(id="job_1", token_ids=[], finish="length", closed=True), now=11.0)
    assert again.result().choices[0].closed is True


def test_cached_tokens_are_those_of_the_attempt_that_made_the_first_token(tokenizer: Tokenizer) -> None:
    first = generation(tokenizer)
    first.push(token(5, cached_tokens=2), now=11.0)
    log: list[tuple[EntryId, Event]] = [(EntryId(7, e.seq), e.event) for e in first.take_entries(11.0)]
    second = generation(tokenizer)
    second.replay(log)
    second.push(token(6, cached_tokens=3), now=12.0)
    second.push(token(7), now=12.0)
    assert first.usage.cached_tokens == second.usage.cached_tokens == 2


def test_a_successor_continues_from_any_point_as_if_nothing_happened(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    whole = generation(tokenizer, stop=["STOP"])
    for value in ids:
        if whole.push(token(value), now=11.0):
            break
    expected = whole.result()
    assert expected.text == "Zürich, 東京 and 🙂 are in the text; "
    assert expected.choices[0].stop_reason == "STOP"
    for cut in range(whole.tokens + 1):
        first = generation(tokenizer, stop=["STOP"])
        for value in ids[:cut]:
            first.push(token(value), now=11.0)
        entries = [e for e in journal(first) if not isinstance(e, Done)]  # died before Done was written
        log = [
            (EntryId(7, 0), Started(worker="a", at=10.0)),
            *((EntryId(7, n + 1), e) for n, e in enumerate(entries)),
        ]
        second = Generation(first.job, attempt=8, attempts=2, started_at=40.0, tokenizer=tokenizer)
        second.replay(log)
        second.admit([1, 2, 3], 1000, 41.0)
        for value in ids[cut:]:
            if second.done is not None or second.push(token(value), now=42.0):
                break
        result = second.result()
        assert (result.text, result.choices, result.usage) == (
            expected.text,
            expected.choices,
            expected.usage,
        )
        assert shown(entries) + shown(journal(second)) == expected.text
        assert result.timings.started_at == 10.0


def test_tokens_after_a_stop_string_are_neither_counted_nor_shown(tokenizer: Tokenizer) -> None:
    made = generation(tokenizer, stop=["and"])
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    made.push(Output(id="job_1", token_ids=ids), now=11.0)
    assert made.result().text == "Zürich, 東京 "
    assert tokenizer.decode(made.completions[0].ids) == "Zürich, 東京 and"


def test_a_done_log_gives_its_result_without_running(tokenizer: Tokenizer) -> None:
    first = generation(tokenizer)
    first.push(token(504), now=11.0)
    first.push(Output(id="job_1", token_ids=[], finish="length"), now=12.0)
    log = [(EntryId(7, n + 1), e) for n, e in enumerate(journal(first))]
    second = Generation(first.job, attempt=8, attempts=2, started_at=40.0, tokenizer=tokenizer)
    second.replay(log)
    assert second.complete
    assert second.result().model_copy(update={"attempts": 1}) == first.result().model_copy(
        update={"timings": second.result().timings}
    )


def test_an_unconfirmed_write_is_repeated_unchanged(tokenizer: Tokenizer) -> None:
    made = generation(tokenizer, stream=True)
    made.push(token(504), now=11.0)
    once = made.take_entries(11.0)
    made.push(token(505), now=11.1)
    assert made.take_entries(12.0) == once
    assert made.due_at() == 0.0, "an unconfirmed write is always due"
    made.confirm()
    (again,) = made.take_entries(13.0)
    assert isinstance(again.event, Delta)
    assert (again.seq, again.event.offset, again.event.ids) == (2, 1, (505,))


def test_streams_flush_their_first_token_at_once_and_others_gather(tokenizer: Tokenizer) -> None:
    streamed, quiet = generation(tokenizer, stream=True), generation(tokenizer)
    for made in (streamed, quiet):
        made.push(token(504), now=11.0)
    assert streamed.due_at() == 0.0
    assert quiet.due_at() == 11.5
    streamed.take_entries(11.0)
    streamed.confirm()
    streamed.push(token(505), now=11.01)
    assert streamed.due_at() == pytest.approx(11.05)
    for n in range(15):
        quiet.push(token(505), now=11.0 + n / 1000)
    assert quiet.due_at() == 0.0, "16 tokens are waiting"


def test_a_suspect_that_lives_goes_on_record_at_once(tokenizer: Tokenizer) -> None:
    """Everybody else waits for that: until then a death of the worker would be its fault."""
    made = generation(tokenizer)
    made.note(Trial(at=11.0))
    assert not made.on_trial
    made.take_entries(11.0)
    made.push(token(504), now=11.1)  # comes while the server takes the trial down
    assert made.confirm()
    assert made.on_trial
    assert made.due_at() == 0.0, "one token, of the sixteen that others gather"
    made.take_entries(11.2)
    assert made.confirm()
    assert not made.on_trial
    made.push(token(505), now=11.3)
    assert made.due_at() == 11.8
    made.take_entries(11.8)
    assert not made.confirm()


def test_the_record_of_a_trial_ends_with_whatever_ends_the_attempt(tokenizer: Tokenizer) -> None:
    for ending in ("crash", "stop"):
        made = generation(tokenizer)
        made.note(Trial(at=11.0))
        made.take_entries(11.0)
        made.confirm()
        if ending == "crash":
            made.note(Crashed(code="engine_died", worker="w", alone=True, tokens=0, at=12.0))
        else:
            made.end_early(FinishReason.CANCELLED, 12.0)
        made.take_entries(12.0)
        assert made.confirm()
        assert not made.on_trial, ending


@pytest.mark.parametrize("reason", [FinishReason.CANCELLED, FinishReason.EXPIRED])
def test_an_early_end_keeps_the_partial_text(tokenizer: Tokenizer, reason: FinishReason) -> None:
    made = generation(tokenizer, stop=["never"])
    for value in tokenizer.encode("Hello wor n", add_special_tokens=False):
        made.push(token(value), now=11.0)
    made.end_early(reason, now=12.0)
    made.push(token(504), now=13.0)
    assert made.result().text == "Hello wor n"
    assert made.result().state is JobState(reason.value)


def test_a_failure_says_why(tokenizer: Tokenizer) -> None:
    made = generation(tokenizer)
    made.push(Output(id="job_1", token_ids=[], finish="error", error_code="kv_full", error="no"), now=11.0)
    assert made.result().state is JobState.FAILED
    assert made.result().error == ErrorInfo(code="kv_full", message="no")


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_the_engine_is_told_every_end_token_the_tokenizer_knows(
    tokenizer: Tokenizer, ignore_eos: bool
) -> None:
    """A chat model whose end token stood in tokenizer_config.json alone never stopped."""
    (request,) = engine_requests(generation(tokenizer, stop_token_ids=[7], ignore_eos=ignore_eos))
    assert set(request.stop_token_ids) == ({7} if ignore_eos else {7, *tokenizer.eos_token_ids})


# ---- log probabilities, echo, ids


def scored(value: int, top: int) -> TokenLogprobs:
    others = [value + i for i in range(top)]
    return TokenLogprobs(logprob=-value / 7, top_ids=others, top_logprobs=[-(i + 1) / 3 for i in range(top)])


def spoken(made: Generation, values: list[int], top: int, prompt: bool = True) -> None:
    """As an engine would: the prompt in two pieces, then token by token, written after every third."""
    if prompt:
        made.push(Output(id="job_1", token_ids=[], prompt_from=1, prompt_logprobs=[scored(2, 1)]), now=11.0)
        made.push(Output(id="job_1", token_ids=[], prompt_from=2, prompt_logprobs=[scored(3, 1)]), now=11.0)
    for value in values:
        made.push(Output(id="job_1", token_ids=[value], logprobs=[scored(value, top)]), now=11.0)


WISHES: dict[str, object] = {"logprobs": 2, "prompt_logprobs": 1, "echo": True, "return_token_ids": True}


def test_a_result_tells_of_every_token_and_its_text_begins_with_the_prompt(tokenizer: Tokenizer) -> None:
    made = generation(tokenizer, **WISHES)
    values = tokenizer.encode(" Zürich 東", add_special_tokens=False)
    spoken(made, values, 2)
    made.push(Output(id="job_1", token_ids=[], finish="length"), now=12.0)
    log = journal(made)
    assert shown(log) == made.result().text == "x Zürich 東"
    (choice,) = made.result().choices
    assert choice.token_ids == tuple(values)
    assert choice.logprobs is not None
    assert [one.id for one in choice.logprobs] == values
    texts = b"".join(bytes.fromhex(one.raw) if one.raw else one.token.encode() for one in choice.logprobs)
    assert texts.decode() == " Zürich 東"
    assert [one.logprob for one in choice.logprobs] == pytest.approx([-v / 7 for v in values])
    assert [[top.id for top in one.top] for one in choice.logprobs] == [[v, v + 1] for v in values]
    prompt = made.result().prompt_logprobs
    assert prompt is not None
    assert [(one.id, one.logprob) for one in prompt[:1]] == [(1, None)]
    assert [one.id for one in prompt] == [1, 2, 3]


@pytest.mark.parametrize("cut", range(8))
def test_what_was_told_survives_its_worker_at_any_point(tokenizer: Tokenizer, cut: int) -> None:
    values = tokenizer.encode(" one two three four", add_special_tokens=False)[:5]
    whole = generation(tokenizer, **WISHES)
    spoken(whole, values, 2)
    whole.push(Output(id="job_1", token_ids=[], finish="length"), now=12.0)
    journal(whole)

    first, log = generation(tokenizer, **WISHES), list[Event]()
    pieces = [
        Output(id="job_1", token_ids=[], prompt_from=n, prompt_logprobs=[scored(n + 1, 1)]) for n in (1, 2)
    ]
    steps = [*pieces, *(Output(id="job_1", token_ids=[v], logprobs=[scored(v, 2)]) for v in values)]
    for step in steps[:cut]:
        first.push(step, now=11.0)
        log += journal(first)

    second = Generation(first.job, attempt=8, attempts=2, started_at=13.0, tokenizer=tokenizer)
    second.replay([(EntryId(7, n), event) for n, event in enumerate(log)])
    second.admit([1, 2, 3], 1000, 13.0)
    (request,) = engine_requests(second)
    assert request.logprobs == 2
    assert request.prompt_logprobs == (1 if cut < 2 else None), "what is known is not asked for again"
    spoken(second, values[second.tokens :], 2, prompt=request.prompt_logprobs is not None)
    second.push(Output(id="job_1", token_ids=[], finish="length"), now=12.0)
    log += journal(second)
    timings, attempts = whole.result().timings, whole.result().attempts
    assert second.result().model_copy(update={"timings": timings, "attempts": attempts}) == whole.result()

    third = Generation(first.job, attempt=9, attempts=3, started_at=14.0, tokenizer=tokenizer)
    third.replay([(EntryId(9, n), event) for n, event in enumerate(log)])
    assert third.complete
    assert third.result().choices == whole.result().choices, "a complete log is enough"
    assert third.result().prompt_logprobs == whole.result().prompt_logprobs


def test_special_tokens_are_shown_to_who_wants_them(tokenizer: Tokenizer) -> None:
    special = min(tokenizer.special_ids)
    for skip in (True, False):
        made = generation(tokenizer, skip_special_tokens=skip, ignore_eos=True)
        made.push(token(special), now=11.0)
        made.push(token(504, finish="length"), now=11.0)
        assert made.result().text.startswith(tokenizer.decode([special], skip)) is True
        assert ("<|" in made.result().text) is not skip


def test_packed_log_probabilities_that_cannot_be_are_refused() -> None:
    assert logprobs.unpack(logprobs.pack([]), 0) == []
    one = logprobs.pack([scored(5, 3)])
    with pytest.raises(InvalidRequest, match="cannot be 28 bytes"):
        logprobs.unpack(one, 3)
    with pytest.raises(InvalidRequest, match="not base64"):
        logprobs.unpack("?", 1)
