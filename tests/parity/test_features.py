"""A request that asks for much is answered alike alone and in any batch, preempted, chunked and resumed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gristmill.engine.engine import Engine
from gristmill.engine.messages import Dry, Output, Processors, Request, Watermark
from gristmill.engine.models.tiny import VOCAB, write_tiny
from gristmill.engine.recorder import NOTHING_ALLOWED
from gristmill.engine.reference import Reference
from gristmill.engine.settings import EngineSettings
from gristmill.schemas.errors import InvalidRequest
from gristmill.schemas.logprobs import TokenLogprobs

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
TOKENS = 24


@dataclass
class Said:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt: list[TokenLogprobs] = field(default_factory=list)
    error: str | None = None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


def engine(model: Path, **knobs: Any) -> Engine:
    given = {"max_batch_total_tokens": 8192, "kv_block_size": 16} | knobs
    return Engine(EngineSettings(model=str(model), dtype="float32", **given))


@pytest.fixture(scope="module")
def roomy(model: Path) -> Engine:
    return engine(model)


@pytest.fixture(scope="module")
def cramped(model: Path) -> Iterator[Engine]:
    """Few blocks and small steps: prompts come in chunks, and the batch has to preempt."""
    few = {"max_batch_total_tokens": 224, "max_total_tokens": 160}
    made = engine(model, **few, max_num_seqs=16, max_batch_prefill_tokens=16)
    yield made
    assert made.stats.preemptions > 0, "nobody was preempted: the tests show nothing"


def run(made: Engine, requests: list[Request]) -> list[Said]:
    said = {request.id: Said(list(request.output_ids)) for request in requests}
    for request in requests:
        made.add(request)
    while made.has_work:
        for output in made.step():
            take(said[output.id], output)
        made.check()
    return list(said.values())


def take(said: Said, output: Output) -> None:
    said.tokens += output.token_ids
    said.logprobs += output.logprobs
    said.error = output.error_code
    if output.prompt_logprobs:
        assert output.prompt_from == len(said.prompt) + 1, "a piece twice, or one is missing"
        said.prompt += output.prompt_logprobs


def mixed(count: int, seed: int) -> list[Request]:
    """Random wishes, a third of the rows without any; prompts that repeat themselves."""
    rng = random.Random(seed)

    def perhaps(value: Any, otherwise: Any) -> Any:
        return value if rng.random() < 0.4 else otherwise

    def words() -> list[list[int]]:
        return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 3))] for _ in range(4)]

    def processors() -> Processors | None:
        if rng.random() < 0.3:
            return None
        return Processors(
            watermark=perhaps(Watermark(), None),
            logit_bias=perhaps({rng.randrange(VOCAB): rng.uniform(-5, 5) for _ in range(5)}, {}),
            repetition_penalty=perhaps(1.3, 1.0),
            frequency_penalty=perhaps(0.7, 0.0),
            presence_penalty=perhaps(-0.5, 0.0),
            dry=perhaps(Dry(multiplier=0.8, breakers=words()), None),
            bad_words=perhaps(words(), []),
            allowed_token_ids=perhaps(sorted(rng.sample(range(VOCAB), 150)), None),
            typical_p=perhaps(0.6, 1.0),
        )

    return [
        Request(
            id=f"r{i}",
            prompt_ids=[rng.randrange(40) for _ in range(rng.randint(2, 100))],
            max_tokens=TOKENS,
            min_tokens=perhaps(8, 0),
            temperature=rng.choice([0.0, 0.8, 1.2]),
            top_p=perhaps(0.9, 1.0),
            top_k=perhaps(50, 0),
            seed=i,
            ignore_eos=True,
            processors=processors(),
            logprobs=perhaps(rng.randint(0, 5), None),
            prompt_logprobs=perhaps(rng.randint(0, 5), None),
        )
        for i in range(count)
    ]


def check_alike(found: list[Said], expected: list[Said]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.error == other.error
        check_close(one.logprobs, other.logprobs)
        check_close(one.prompt, other.prompt)


def check_close(found: list[TokenLogprobs], expected: list[TokenLogprobs]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=TOLERANCE)
        assert one.top_logprobs == pytest.approx(other.top_logprobs, abs=TOLERANCE)


@pytest.fixture(scope="module", params=[1, 2])
def requests(request: pytest.FixtureRequest) -> list[Request]:
    return mixed(16, request.param)


@pytest.fixture(scope="module")
def together(roomy: Engine, requests: list[Request]) -> list[Said]:
    said = run(roomy, requests)
    assert [one.error for one in said] == [None] * len(said)
    assert {len(one.tokens) for one in said} == {TOKENS}
    return said


def test_alone_is_as_in_a_batch(roomy: Engine, requests: list[Request], together: list[Said]) -> None:
    check_alike([run(roomy, [request])[0] for request in requests], together)


def test_chunked_and_preempted_is_as_undisturbed(
    cramped: Engine, requests: list[Request], together: list[Said]
) -> None:
    check_alike(run(cramped, requests), together)


def test_resumed_after_any_token_it_goes_on_alike(
    roomy: Engine, requests: list[Request], together: list[Said]
) -> None:
    cuts = random.Random(7)
    where = [cuts.randint(1, TOKENS - 1) for _ in requests]
    begun = [
        replace(request, output_ids=said.tokens[:cut])
        for request, said, cut in zip(requests, together, where, strict=True)
    ]
    expected = [
        replace(said, logprobs=said.logprobs[cut:]) for said, cut in zip(together, where, strict=True)
    ]
    check_alike(run(roomy, begun), expected)


def test_log_probabilities_are_the_models_own(
    reference: Reference, requests: list[Request], together: list[Said]
) -> None:
    """Whatever was penalised, forbidden or filtered: log-softmax of the logits, in float64."""
    for request, said in zip(requests, together, strict=True):
        logp = reference.logits([*request.prompt_ids, *said.tokens]).double().log_softmax(-1)
        start = len(request.prompt_ids)
        if request.logprobs is not None:
            check_told(said.logprobs, logp[start - 1 : -1], said.tokens, request.logprobs)
        if request.prompt_logprobs is not None:
            check_told(said.prompt, logp[: start - 1], request.prompt_ids[1:], request.prompt_logprobs)
        assert bool(said.logprobs) == (request.logprobs is not None)
        assert bool(said.prompt) == (request.prompt_logprobs is not None)


def check_told(told: list[TokenLogprobs], logp: torch.Tensor, tokens: list[int], count: int) -> None:
    assert len(told) == len(tokens) == len(logp)
    for one, row, token in zip(told, logp, tokens, strict=True):
        assert one.logprob == pytest.approx(float(row[token]), abs=TOLERANCE)
        assert one.top_logprobs == pytest.approx(row.topk(count).values.tolist(), abs=TOLERANCE)
        assert [float(row[i]) for i in one.top_ids] == pytest.approx(one.top_logprobs, abs=TOLERANCE)


def test_an_end_token_has_no_log_probability(roomy: Engine) -> None:
    forced = Processors(allowed_token_ids=[5])
    request = Request(
        id="e", prompt_ids=[1], max_tokens=9, stop_token_ids=[5], processors=forced, logprobs=2, seed=1
    )
    roomy.add(request)
    (output,) = roomy.step()
    assert (output.finish, output.stop_token_id, output.logprobs) == ("stop", 5, [])


def test_a_request_that_forbids_everything_ends_alone_and_says_why(roomy: Engine) -> None:
    stuck = Request(
        id="stuck",
        prompt_ids=[1, 2],
        max_tokens=5,
        min_tokens=3,
        stop_token_ids=[7],
        processors=Processors(allowed_token_ids=[7]),
    )
    fine = Request(id="fine", prompt_ids=[1, 2], max_tokens=5, ignore_eos=True)
    one, other = run(roomy, [stuck, fine])
    assert (one.tokens, one.error) == ([], NOTHING_ALLOWED)
    assert (len(other.tokens), other.error) == (5, None)


@pytest.mark.parametrize(
    ("wish", "param"),
    [
        ({"logprobs": VOCAB + 1}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"processors": Processors(bad_words=[[VOCAB]])}, "bad_words"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(roomy: Engine, wish: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        roomy.add(Request(id="w", prompt_ids=[1], max_tokens=1, **wish))
    assert caught.value.param == param
