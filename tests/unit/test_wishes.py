"""Requests' words become the engine's tokens, and more than the worker allows is refused."""

from __future__ import annotations

from typing import Any

import pytest
from gristmill.engine.messages import Processors, Watermark
from gristmill.engine.tokenizer import Tokenizer
from gristmill.schemas.errors import InvalidRequest
from gristmill.schemas.sampling import SamplingParams
from gristmill.worker import intake, wishes
from gristmill.worker.settings import WorkerSettings

from ..support.journal import make_job
from ..support.played import PlayedEngine

VOCAB = 49_152
SETTINGS = WorkerSettings(model="m", max_stop_sequences=3, max_top_n_tokens=5, max_best_of=2)


def asked(tokenizer: Tokenizer, **given: Any) -> Processors | None:
    return wishes.processors(SamplingParams(**given), tokenizer, VOCAB, SETTINGS)


def test_who_asks_for_nothing_gets_no_processors(tokenizer: Tokenizer) -> None:
    assert asked(tokenizer) is None
    assert asked(tokenizer, temperature=0.3, top_p=0.5, logprobs=3, dry_base=2.0) is None


def test_a_bad_word_is_meant_at_the_start_of_a_line_and_behind_a_blank(tokenizer: Tokenizer) -> None:
    found = asked(tokenizer, bad_words=("paris", " paris"))
    assert found is not None
    texts = [tokenizer.decode(word) for word in found.bad_words]
    assert texts == ["paris", " paris"]


def test_every_token_that_holds_a_breaker_is_one(tokenizer: Tokenizer) -> None:
    found = asked(tokenizer, dry_multiplier=0.8, dry_sequence_breakers=("\n", "<end of chapter>"))
    assert found is not None
    assert found.dry is not None
    singles = {one[0] for one in found.dry.breakers if len(one) == 1}
    assert singles == {token for token in range(VOCAB) if b"\n" in tokenizer.token_bytes(token)}
    longer = [tokenizer.decode(one) for one in found.dry.breakers if len(one) > 1]
    assert longer == ["<end of chapter>", " <end of chapter>"]


def test_the_rest_is_handed_on(tokenizer: Tokenizer) -> None:
    found = asked(
        tokenizer,
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias={5: -1.0},
        allowed_token_ids=(1, 5),
        typical_p=0.9,
        watermark=True,
    )
    assert found == Processors(
        repetition_penalty=1.2,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        logit_bias={5: -1.0},
        allowed_token_ids=[1, 5],
        typical_p=0.9,
        watermark=Watermark(gamma=0.5, delta=2.0),
    )


@pytest.mark.parametrize(
    ("given", "knob", "numbers"),
    [
        ({"stop": ("a", "b", "c", "d")}, "MAX_STOP_SEQUENCES", ("4", "3")),
        ({"logprobs": 6}, "MAX_TOP_N_TOKENS", ("6", "5")),
        ({"prompt_logprobs": 1000}, "MAX_TOP_N_TOKENS", ("1,000", "5")),
        ({"n": 3}, "MAX_BEST_OF", ("3", "2")),
        ({"best_of": 4}, "MAX_BEST_OF", ("4", "2")),
    ],
)
def test_a_refusal_names_the_limit_the_value_and_the_knob(
    given: dict[str, Any], knob: str, numbers: tuple[str, str]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wishes.check_limits(SamplingParams(**given), SETTINGS)
    assert caught.value.param == next(iter(given))
    for word in (f"GRISTMILL_{knob}", *numbers):
        assert word in caught.value.message


@pytest.mark.parametrize(
    "given",
    [{"stop_token_ids": (VOCAB,)}, {"logit_bias": {VOCAB: 1.0}}, {"allowed_token_ids": (1, VOCAB)}],
    ids=lambda given: next(iter(given)),
)
def test_a_token_that_the_model_does_not_have_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        wishes.check_ids(SamplingParams(**given), PlayedEngine.info)
    assert caught.value.param == next(iter(given))
    assert "49,152" in caught.value.message


def test_truncate_keeps_the_end_of_the_prompt(tokenizer: Tokenizer) -> None:
    whole = intake.encode(make_job(prompt="one two three four five"), tokenizer, VOCAB)
    cut = intake.encode(
        make_job(prompt="one two three four five", sampling={"truncate": 2}), tokenizer, VOCAB
    )
    assert cut == whole[-2:]
    assert tokenizer.decode(cut) == " four five"
